"""Tiled against plain NT-Xent over the size of the global batch, one process: extra peak memory and time of a step.

    python benchmarks/infonce.py --document benchmarks/results/DATE-infonce.md

A step is `nt_xent` forward and backward from raw outputs [2, N, D] in float32; N images are 2N embeddings, and one copy
of their similarities takes 16 N^2 bytes. Every measurement is a process of its own, plain and tiled in turn.

Memory: the operating system's peak of resident memory (VmHWM, the figure behind ru_maxrss) during one step, minus what
was resident before it. The peak is reset just before the step, because ru_maxrss of the whole process would still
show the peak of importing torch. tracemalloc does not see torch's memory; torch.profiler sees what torch asks for, not
what the process needs. A small step before warms up thread pools and code, so that they do not count. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import textwrap
import time
from datetime import date
from pathlib import Path

import torch

from distunlearn.engine.environment import environment
from distunlearn.objectives.simclr import nt_xent
from distunlearn.objectives.tiled_softmax import DEFAULT_BUDGET, tile_size

TEMPERATURE = 0.2
MIB = 2**20


def outputs(num_images: int, dim: int, device: str = "cpu") -> torch.Tensor:
    """Raw outputs of both views, [2, N, D]."""
    drawn = torch.randn(2, num_images, dim, generator=torch.Generator().manual_seed(0))
    return drawn.to(device).requires_grad_()


def status(field: str) -> int:
    """A memory figure of this process in bytes: VmRSS (now) or VmHWM (peak)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def measure(form: str, num_images: int, dim: int, device: str = "cpu") -> dict[str, float]:
    """One step in this process: extra peak bytes and seconds."""
    if device == "cuda":
        return measure_gpu(form, num_images, dim)
    torch.set_num_threads(1)
    nt_xent(outputs(64, dim), TEMPERATURE, form=form).backward()
    z = outputs(num_images, dim)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before, start = status("VmRSS"), time.perf_counter()
    loss = nt_xent(z, TEMPERATURE, form=form)
    loss.backward()
    seconds = time.perf_counter() - start
    return {"extra": status("VmHWM") - before, "seconds": seconds, "loss": loss.item()}


def measure_gpu(form: str, num_images: int, dim: int) -> dict[str, float]:
    """The second of two steps on the GPU, which is the one that is warm."""
    found = {}
    for _ in range(2):
        z = outputs(num_images, dim, "cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        loss = nt_xent(z, TEMPERATURE, form=form)
        loss.backward()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        found = {"extra": torch.cuda.max_memory_allocated() - before, "seconds": seconds, "loss": loss.item()}
        del loss, z
    return found


def error(num_images: int, dim: int) -> tuple[float, float]:
    """Relative difference between the forms of loss and gradient, float32."""
    found = []
    for form in ("plain", "tiled"):
        z = outputs(num_images, dim)
        loss = nt_xent(z, TEMPERATURE, form=form)
        loss.backward()
        found.append((loss.detach(), z.grad))
    (plain, plain_grad), (tiled, tiled_grad) = found
    return float((tiled - plain).abs() / plain), float((tiled_grad - plain_grad).norm() / plain_grad.norm())


def child(form: str, num_images: int, dim: int, device: str) -> dict[str, float]:
    """`measure` in a process of its own; on a GPU in this one, whose memory torch counts exactly."""
    if device == "cuda":
        return measure(form, num_images, dim, device)
    command = [sys.executable, __file__, "--child", form, str(num_images), "--dim", str(dim)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout)


def run(
    sizes: list[int], largest_plain: int, dim: int, rounds: int, device: str = "cpu"
) -> dict[tuple[str, int], list[dict[str, float]]]:
    """All measurements, the forms in turn; sizes above `largest_plain` tiled only, and once."""
    results: dict[tuple[str, int], list[dict[str, float]]] = {}
    for num_images in sizes:
        both = num_images <= largest_plain
        for _ in range(rounds if both else 1):
            for form in ("plain", "tiled") if both else ("tiled",):
                results.setdefault((form, num_images), []).append(child(form, num_images, dim, device))
                print(form, num_images, results[form, num_images][-1], flush=True)
    return results


def median(samples: list[dict[str, float]], key: str) -> float:
    return statistics.median(sample[key] for sample in samples)


def rows(results: dict[tuple[str, int], list[dict[str, float]]]) -> tuple[list[list[str]], float]:
    """Table of medians and ratios, and the plain form's memory in copies of the similarities at its largest size."""
    copies = 0.0
    for form, num_images in results:
        if form == "plain":  # sizes ascend: the largest stays
            copies = median(results[form, num_images], "extra") / (16 * num_images**2)
    table = []
    for num_images in dict.fromkeys(size for _, size in results):
        tiled, plain = results["tiled", num_images], results.get(("plain", num_images))
        extra, seconds = median(tiled, "extra"), median(tiled, "seconds")
        plain_extra = median(plain, "extra") if plain else copies * 16 * num_images**2
        table.append(
            [f"{num_images:,}", f"{16 * num_images**2 / MIB:,.0f}",
             f"{plain_extra / MIB:,.0f}" + ("" if plain else " (derived)"), f"{extra / MIB:,.0f}",
             f"1/{plain_extra / extra:.1f}", f"1/{16 * num_images**2 / extra:.1f}",
             f"{median(plain, 'seconds'):.3f}" if plain else "not measured", f"{seconds:.3f}",
             f"{seconds / median(plain, 'seconds'):.2f}" if plain else "not measured"]
        )  # fmt: skip
    return table, copies


ON_CPU = (
    ": other work shared the machine, which blurs times, not memory. GPUs: not measured.",
    "the operating system's peak of resident memory during the step minus what was resident before (how and why: the "
    "script's text).",
)
ON_GPU = (
    "; float32 without TF32, as the package computes losses.",
    "the peak that torch allocated on the GPU during the step minus what was allocated before.",
)

HEADER = [
    "images N", "one copy, MiB", "plain extra, MiB", "tiled extra, MiB", "tiled / plain", "tiled / one copy",
    "plain, s", "tiled, s", "tiled / plain",
]  # fmt: skip


def document(results: dict[tuple[str, int], list[dict[str, float]]], args: argparse.Namespace, load: float) -> str:
    env = environment()
    table, copies = rows(results)
    lines = [f"| {' | '.join(row)} |" for row in [HEADER, ["---"] * len(HEADER), *table]]
    loss_error, grad_error = error(1024, args.dim)
    raw = [
        f"{form:5} {size:6} {s['extra'] / MIB:9.1f} MiB {s['seconds']:8.3f} s  loss {s['loss']:.6f}"
        for (form, size), samples in results.items()
        for s in samples
    ]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    where, memory = ON_GPU if gpu else ON_CPU
    paragraphs = [
        f"Date: {date.today()}. Commit {commit}. Python {platform.python_version()}, torch {torch.__version__}. "
        f"Hardware: {env['cpu']['model']}, {env['cpu']['cores']} cores, {env['memory_gib']} GiB, {gpu or 'no GPU'}; "
        f"one thread, load average {load:.1f} at the start{where}",
        f"Command: `python benchmarks/infonce.py {' '.join(sys.argv[1:])}`",
        f"A step is `nt_xent` forward and backward on one process, float32, D = {args.dim}, tau = {TEMPERATURE}, tiles "
        f"of {tile_size(torch.device(args.device), DEFAULT_BUDGET) // MIB} MiB. N images are 2N embeddings; one copy "
        "of their similarities takes 2N x 2N x 4 "
        f'bytes. Extra memory is {memory} Medians over the measurements under "Raw numbers"; plain and tiled took '
        "turns.",
        "\n".join(lines),
        f"**Derived, not measured:** the plain form above N = {args.largest_plain:,}. At the largest size measured it "
        f"takes {copies:.2f} copies of the similarities; that figure times one copy is what the table shows. The "
        'column "tiled / one copy" does not rest on it: it compares a measurement with the size of one matrix. All '
        "tiled rows are measured, above that N once each.",
        f"Agreement in float32 at N = 1,024: loss {loss_error:.1e}, gradient {grad_error:.1e} (relative difference "
        "between the forms; in float64 the tests hold it to 1e-10).",
    ]
    text = [part if part.startswith(("|", "Command")) else textwrap.fill(part, 118) for part in paragraphs]
    raw_numbers = "```\n" + "\n".join(raw) + "\n```"
    parts = ["# Tiled against plain NT-Xent: memory and time of a step", *text, "## Raw numbers", raw_numbers]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=2, metavar=("FORM", "N"), help="one measurement in this process, as JSON")
    sizes = [1024, 2048, 4096, 8192, 16384, 32768]
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes, help="images of a global batch, ascending")
    parser.add_argument("--largest-plain", type=int, default=8192, help="measure the plain form up to here")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--document", type=Path, help="write the results here")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child[0], int(args.child[1]), args.dim)))
        return
    load = os.getloadavg()[0]
    text = document(run(args.sizes, args.largest_plain, args.dim, args.rounds, args.device), args, load)
    if args.document:
        args.document.parent.mkdir(parents=True, exist_ok=True)
        args.document.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
