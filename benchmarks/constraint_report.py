"""The results of `constraint.py` as a document and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import textwrap
from datetime import date
from typing import Any

import torch

from distunlearn.engine.environment import environment

__all__ = ["BOUNDS", "document", "json_text", "machine"]

MIB = 2**20
BOUNDS = {"head": 1.6, "sliced": 2.1, "sketch": 2.1}  # operations of a step, relative to the plain step


def machine(device: str) -> dict[str, Any]:
    """Where and by what the figures were made."""
    env = environment()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return {
        "date": str(date.today()), "commit": commit, "python": platform.python_version(), "torch": torch.__version__,
        "timm": env["packages"]["timm"], "cpu": env["cpu"], "memory_gib": env["memory_gib"], "threads": 1,
        "load_average": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }  # fmt: skip


def json_text(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=1, sort_keys=True) + "\n"


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def counts(result: dict[str, Any]) -> str:
    """Operations and live memory of every encoder and step."""
    rows = []
    for encoder, steps in result["counted"].items():
        plain, double = steps["plain"], steps["double_backward"]
        for step, own in steps.items():
            ratio, bound = own["flops"] / plain["flops"], BOUNDS.get(step)
            verdict = "" if bound is None else f"<= {bound}: {'met' if ratio <= bound else 'MISSED'}"
            rows.append([
                encoder, f"`{step}`", f"{own['flops'] / 1e9:,.1f}", f"{ratio:.3f}", verdict,
                f"{own['flops'] / double['flops']:.2f}", f"{own['live_bytes'] / MIB:,.0f}",
                f"{own['live_bytes'] / plain['live_bytes']:.2f}", f"{own['live_bytes'] / double['live_bytes']:.2f}",
            ])  # fmt: skip
    header = [
        "encoder", "step", "operations, 10^9", "to plain", "bound", "to double backward", "live memory, MiB",
        "to plain", "to double backward",
    ]  # fmt: skip
    return table(header, rows)


def spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['smallest']:.2f} to {ratio['largest']:.2f})"


def times(result: dict[str, Any]) -> str:
    """Seconds and their ratios of the encoders that were timed."""
    rows = []
    for encoder, steps in result["timed"].items():
        for step, samples in steps.items():
            found = result["time_ratios"][encoder][step]
            row = [encoder, f"`{step}`", f"{statistics.median(s['seconds'] for s in samples):.4f}"]
            row += [spread(found[f"{key} to plain"]) for key in ("seconds", "cpu_seconds")]
            row += [spread(found["seconds to double_backward"]) if "double_backward" in steps else "not timed"]
            if result["device"] == "cuda":
                row += [f"{statistics.median(s['allocated_bytes'] for s in samples) / MIB:,.0f}",
                        spread(found["allocated_bytes to plain"])]  # fmt: skip
            rows.append(row)
    header = ["encoder", "step", "seconds", "to plain, clock", "to plain, CPU", "to double backward, clock"]
    return table(header + (["allocated, MiB", "to plain"] if result["device"] == "cuda" else []), rows)


def document(result: dict[str, Any]) -> str:
    own, retain = result["machine"], result["retain"]
    cpu, gpu = own["cpu"], own["gpu"] or "no GPU"
    hardware = f"{cpu['model']}, {cpu['cores']} cores, {own['memory_gib']} GiB, {gpu}"
    unmeasured = (
        "CUDA (`--device cuda --precision bf16`: ViT-B/16 and ResNet-50, fused attention, "
        "torch.cuda.max_memory_allocated): **not measured**."
        if result["device"] == "cpu"
        else f"Timed on {own['gpu']} in {result['precision']}."
    )
    raw = [
        f"{encoder:20} {step:16} " + "  ".join(f"{s['seconds']:.4f}/{s['cpu_seconds']:.4f}" for s in samples)
        for encoder, steps in result["timed"].items()
        for step, samples in steps.items()
    ]
    paragraphs = [
        f"Date: {own['date']}. Commit {own['commit']}. Python {own['python']}, torch {own['torch']}, timm "
        f"{own['timm']}. Hardware: {hardware}; one thread, load average {own['load_average']:.1f} at the start. "
        f"The run took {result['minutes']:.1f} minutes.",
        f"Command: `{result['command']}`",
        "A step is loss and backward of the whole `third_party` method (SimCLR, one pair of views), without the "
        "optimizer, at a step that does not check its finite difference; `plain` is the contrastive step on the retain "
        "images alone. Forgotten and third-party images are a quarter of the retain images each. What is counted, and "
        "how: the scripts' texts.",
        unmeasured,
        "## Operations and memory\n",
        "16 retain, 4 forgotten, 4 third-party images, in float32, counted on tensors without values. Operations are "
        "those of matrix products, convolutions and attention; one multiply-add is two. Live memory is the peak of all "
        "tensors made within the step. With n constraint images to N retain images, half of them to forget, and "
        "without the probes' own work, one expects `head` 1 + n/N = 1.50; `sliced` 1 + n/N + (n_t/N)(2/3) + n_f/N = "
        "1.92; `sketch` 1 + (2/3) n_f/N + 2 n_f/N + (4/3) n_t/N = 2.00."
        + (f" Counted by `{result['counted_by']}`." if "counted_by" in result else ""),
        counts(result),
        "## Time\n",
        f"{retain} retain, {retain // 4} forgotten, {retain // 4} third-party images, {result['precision']}. Medians "
        f"over {result['rounds']} rounds of the ratio within a round (smallest to largest).",
        times(result),
        "## Raw numbers\n",
        "Seconds by the clock / of the process's CPU, a column for each round. All figures: the JSON file beside this "
        "one.",
        "```\n" + "\n".join(raw) + "\n```",
    ]
    plain = ("|", "#", "`", "Command")
    text = [part.rstrip() if part.startswith(plain) else textwrap.fill(part, 118) for part in paragraphs]
    return "\n\n".join(["# The price of the gradient constraint", *text]) + "\n"
