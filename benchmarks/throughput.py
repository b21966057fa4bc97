"""Images/s of whole training steps, where their time goes, MFU and memory, by encoder, objective, method and backend.

    python benchmarks/throughput.py --document benchmarks/results/DATE-throughput.md
    python benchmarks/throughput.py --encoders vit_base16-224 resnet50-224 --batch 256 --precisions bf16 \
        --objectives simclr moco --backends --compile --data /tmp/noise --document ...                      on a GPU

Every cell is a run of its own (`throughput_step.py`), one thread a process; cells of several processes are started by
torchrun. The default grid changes one thing at a time. Images/s counts source images of the global batch (retain,
forgotten and third-party), of which an encoder sees several views. MFU is counted operations (torch's FlopCounterMode,
with the corrections of `constraint_cost.py`) by the time of a step and the rate that a matrix product of this process
reached right before and after the steps; on a GPU also by the datasheet's dense peak. Memory is the peak of resident
memory during the timed steps, and on a GPU torch.cuda.max_memory_allocated. A GPU works behind the clock of the
program's own parts, so that there the split comes from SPLIT further steps, in which every part waits for the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from constraint_cost import CORRECTED
from constraint_report import json_text, machine
from infonce import status
from throughput_report import document
from throughput_split import Split
from throughput_step import ENCODERS, configuration, prepared, session, train
from torch.utils.flop_counter import FlopCounterMode

WARM_UP = 3
SPLIT = 3
PEAKS = {"H100": {"bf16": 989e12, "fp32": 67e12}, "H200": {"bf16": 989e12, "fp32": 67e12}}  # dense, SXM datasheets


@dataclass(frozen=True)
class Cell:
    """One combination; `batch` is that of a process."""

    encoder: str = "resnet18-64"
    objective: str = "simclr"
    method: str = "pretrain"
    evaluator: str = "head"
    backend: str = "single"
    precision: str = "fp32"
    world: int = 1
    batch: int = 16
    compile: bool = False
    channels_last: bool = True  # of convolutions on a GPU, as the package has it

    def __str__(self) -> str:
        method = self.method if self.method != "third_party" else f"third_party/{self.evaluator}"
        other = f"{' compiled' * self.compile}{' channels first' * (not self.channels_last)}"
        return f"{self.encoder} {self.objective} {method} {self.backend} x{self.world} {self.precision}{other}"


def grid(args: argparse.Namespace) -> list[Cell]:
    """The first of every list is the base; each other value is a cell of its own."""
    base = Cell(encoder=args.encoders[0], precision=args.precisions[0], batch=args.batch)
    cells = [base]
    cells += [replace(base, encoder=name) for name in args.encoders[1:]]
    cells += [replace(base, objective=name) for name in args.objectives if name != base.objective]
    cells += [replace(base, method="third_party", evaluator=name) for name in args.evaluators]
    cells += [replace(base, precision=name) for name in args.precisions[1:]]
    cells += [replace(base, backend=name, world=args.world) for name in args.backends]
    if args.compile:
        cells += [replace(cell, compile=True) for cell in cells if cell.world == 1]
    if args.channels_first:
        cells += [replace(base, encoder=name, channels_last=False) for name in args.encoders if "resnet" in name]
    return cells


def matrix_rate(device: str, precision: str) -> float:
    """Operations per second of a square matrix product in this precision, the median of several."""
    side, dtype = (1024 if device == "cpu" else 8192), (torch.bfloat16 if precision == "bf16" else torch.float32)
    a, found = torch.randn(side, side, device=device, dtype=dtype), []
    for _ in range(5):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(2 * side**3 / (time.perf_counter() - start))
    return statistics.median(found)


class Meter:
    """What happens between the steps of a cell: splits, operations of one step, rate of the machine, memory."""

    def __init__(self, cell: Cell, steps: int) -> None:
        self.cell, self.last = cell, WARM_UP + steps
        self.split, self.parts = Split(), []
        self.rates: list[float] = []
        self.resident = 0
        self.allocated: int | None = None
        self.counter: FlopCounterMode | None = None
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.extra = SPLIT if self.device == "cuda" else 0
        self.clock: Any = None

    def between(self, number: int) -> None:
        seconds = self.clock.samples[-1].seconds
        if (self.last if self.extra else WARM_UP) < number <= self.last + self.extra:
            self.parts.append(self.split.take(seconds))
        else:
            self.split.seconds.clear()
        if self.extra:
            self.split.waits = self.last <= number < self.last + self.extra
        if number in (WARM_UP, self.last):
            self.rates.append(matrix_rate(self.device, self.cell.precision))
        if number == WARM_UP:
            Path("/proc/self/clear_refs").write_text("5")
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
        if number == self.last:
            self.resident = status("VmHWM")
            self.allocated = torch.cuda.max_memory_allocated() if self.device == "cuda" else None
        if number == self.last + self.extra and self.cell.world == 1 and not self.cell.compile:
            # One more step, counted. Neither shards of a tensor are, nor what compiled code does.
            self.counter = FlopCounterMode(display=False, custom_mapping=CORRECTED)
            self.counter.__enter__()
        elif self.counter is not None and number == self.last + self.extra + 1:
            self.counter.__exit__(None, None, None)


def measure(cell: Cell, steps: int) -> dict[str, Any]:
    """Run a cell in this process (one of `world`); figures of the main rank."""
    torch.set_num_threads(1)
    meter = Meter(cell, steps)
    cfg = configuration(
        ENCODERS[cell.encoder], cell.batch * cell.world, objective=cell.objective, method=cell.method,
        evaluator=cell.evaluator, backend=cell.backend, precision=cell.precision, compile=cell.compile,
        steps=WARM_UP + steps + meter.extra + 1,
    )  # fmt: skip
    folder = Path(os.environ["THROUGHPUT_FOLDER"])
    data = Path(os.environ.get("THROUGHPUT_DATA", folder / "data"))
    if os.environ.get("RANK", "0") == "0":
        prepared(cfg, data)
    from distunlearn.engine.backends import Backend, open_backend

    backend = open_backend(cfg)
    backend.world.barrier()
    cfg = prepared(cfg, data)
    meter.split.install(backend)
    Backend.channels_last = cell.channels_last
    with session(cfg, folder / "run", meter.between) as run:
        meter.clock = run.telemetry
        samples = train(run, cell.method)[WARM_UP : meter.last]
    batch = cell.batch * cell.world
    images = batch if cell.method == "pretrain" else batch + 2 * max(2, batch // 4)
    return {
        "cell": asdict(cell), "images": images, "samples": [asdict(s) for s in samples], "parts": meter.parts,
        "matrix_rate": statistics.median(meter.rates), "resident_bytes": meter.resident,
        "allocated_bytes": meter.allocated, "main": backend.world.is_main,
        "flops": meter.counter.get_total_flops() if meter.counter else None,
    }  # fmt: skip


def child(cell: Cell, steps: int, data: Path | None = None) -> dict[str, Any]:
    """`measure` in processes of its own. data: folder of images and shards that cells of one size share."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cell.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(cell.world)]
        command = [sys.executable, *(launcher if cell.world > 1 else []), __file__, "--cell", json.dumps(asdict(cell)),
                   "--steps", str(steps), "--out", str(out)]  # fmt: skip
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "THROUGHPUT_FOLDER": folder}
        if data is not None:
            size = f"{ENCODERS[cell.encoder].image_size}px-{cell.batch * cell.world}"
            variables["THROUGHPUT_DATA"] = str(data.resolve() / size)
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr[-4000:], file=sys.stderr)
            return {"cell": asdict(cell), "error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
        return json.loads(out.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoders", nargs="+", choices=list(ENCODERS), default=["resnet18-64", "vit_tiny16-64"])
    parser.add_argument("--objectives", nargs="+", default=["simclr", "moco", "mocov3", "byol", "supervised"])
    parser.add_argument("--evaluators", nargs="*", default=["head", "sketch", "ghost_norm"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--backends", nargs="*", default=["ddp", "fsdp2", "zero1", "zero2", "zero3"])
    parser.add_argument("--world", type=int, default=2, help="processes of the backends' cells")
    parser.add_argument("--batch", type=int, default=16, help="images per process and step")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a cell, after a warm-up of 3")
    parser.add_argument("--compile", action="store_true", help="also every cell of one process with compile=true")
    parser.add_argument("--channels-first", action="store_true", help="also ResNets with the usual layout of weights")
    parser.add_argument("--data", type=Path, help="keep images and shards here, for all cells of one size")
    parser.add_argument("--document", type=Path, help="write the results here, and as .json beside it")
    parser.add_argument("--cell", help="one measurement in this process, as JSON")
    parser.add_argument("--out", type=Path, help="with --cell: where to write it")
    args = parser.parse_args()
    if args.cell:
        found = measure(Cell(**json.loads(args.cell)), args.steps)
        if found.pop("main"):
            args.out.write_text(json.dumps(found), encoding="utf-8")
        return
    started = time.perf_counter()
    result: dict[str, Any] = {"command": " ".join(["python", "benchmarks/throughput.py", *sys.argv[1:]])}
    own = machine("cuda" if torch.cuda.is_available() else "cpu")
    result |= {"machine": own, "cells": []}
    result["peaks"] = next((peaks for name, peaks in PEAKS.items() if name in (own["gpu"] or "")), {})
    for cell in grid(args):
        found = child(cell, args.steps, args.data)
        result["cells"].append(found)
        seconds = [sample["seconds"] for sample in found.get("samples", ())]
        print(cell, f"{statistics.median(seconds):.3f} s" if seconds else f"FAILED: {found['error']}", flush=True)
    result |= {"minutes": (time.perf_counter() - started) / 60, "load_after": os.getloadavg()[0]}
    if args.document:
        args.document.with_suffix(".json").write_text(json_text(result), encoding="utf-8")
    text = document(result)
    if args.document:
        args.document.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
