"""How long a checkpoint holds training up: written at once, and beside training. Files are synced in both.

    python benchmarks/checkpoint.py --document benchmarks/results/2026-11-26-checkpoint.md

One encoder with AdamW's moments is saved by `engine.checkpoint.async_save.Saver`, as a run does it, into a folder on a
disk. The two ways take turns, in alternating order, within one process. After each save training steps run: beside the
write, until the checkpoint is committed, and after that a few more, undisturbed ones, with which the former are
compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from constraint_step import Bench

from distunlearn.config.schema import CheckpointConfig, EncoderConfig, OptimizerConfig, RuntimeConfig
from distunlearn.engine.backends import open_backend
from distunlearn.engine.checkpoint.async_save import Saver
from distunlearn.engine.checkpoint.format import latest_checkpoint
from distunlearn.engine.ledger import Ledger
from distunlearn.engine.optimizer import make_optimizer
from distunlearn.engine.preemption import StopRequest

ENCODER = EncoderConfig(name="vit_small_patch16_224", image_size=32, in_chans=3, stem="standard")
WAYS = {"synchronous": False, "asynchronous": True}
BOUND = 0.2  # of the time a synchronous save takes


@dataclasses.dataclass(frozen=True)
class Save:
    """One save, in seconds. blocked: in the call; beside: of each step while it was written; after: undisturbed."""

    way: str
    blocked: float
    committed: float  # from the call to the commit
    beside: list[float]
    after: list[float]


class Subject:
    """An encoder in training with its optimizer's moments filled, and a saver for each way."""

    def __init__(self, encoder: EncoderConfig, folder: Path, retain: int = 16) -> None:
        bench = Bench(encoder, retain)
        cfg = dataclasses.replace(bench.cfg, runtime=RuntimeConfig(threads=1))
        self.backend = open_backend(cfg)
        optimizer = make_optimizer(OptimizerConfig(lr=1e-4), bench.model)
        self.backend.prepare(bench.model, optimizer, clip=0.0)
        gradients = bench.step("plain")

        def step() -> None:
            gradients()
            optimizer.step()

        self.step = step
        self.step()
        self.ledger = Ledger(folder / "ledger.jsonl")
        self.folders = {way: folder / way for way in WAYS}
        self.savers = {
            way: Saver(
                self.folders[way], self.backend, CheckpointConfig(asynchronous=beside), self.ledger,
                StopRequest(folder), print,
            )
            for way, beside in WAYS.items()
        }  # fmt: skip
        self.number = 0

    def save(self, way: str, undisturbed: int) -> Save:
        """One save with the steps beside and after it."""
        self.number += 1
        saver = self.savers[way]
        began = time.perf_counter()
        saver.save(self.number, {}, {"digest": "benchmark", "phase": "benchmark", "ranks": []})
        blocked = time.perf_counter() - began
        beside = []
        while (job := saver._job) is not None and job.thread is not None and job.thread.is_alive():
            beside.append(timed(self.step))
        committed = time.perf_counter() - began
        saver.wait()
        return Save(way, blocked, committed, beside, [timed(self.step) for _ in range(undisturbed)])

    def megabytes(self, way: str) -> float:
        """Of the newest checkpoint's files."""
        found = latest_checkpoint(self.folders[way])[0]
        return sum(entry["bytes"] for entry in found.facts["files"].values()) / 1e6

    def close(self) -> None:
        """Leave the backend for others."""
        self.ledger.close()
        self.backend.release()


def timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@contextmanager
def subject(encoder: EncoderConfig, folder: Path | None) -> Iterator[Subject]:
    """In a temporary folder below `folder`."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made = Subject(encoder, Path(place))
        try:
            yield made
        finally:
            made.close()


def measure(made: Subject, repeats: int, undisturbed: int) -> tuple[list[Save], list[Save]]:
    """(first save of each way, which makes its buffers; `repeats` of each way, taking turns)."""
    first = [made.save(way, undisturbed) for way in WAYS]
    saves = []
    for number in range(repeats):
        order = list(WAYS) if number % 2 == 0 else list(WAYS)[::-1]
        saves += [made.save(way, undisturbed) for way in order]
    return first, saves


def figures(saves: list[Save]) -> dict[str, float]:
    """Medians in seconds, and their ratios."""
    blocked = {way: statistics.median(s.blocked for s in saves if s.way == way) for way in WAYS}
    own = [s for s in saves if s.way == "asynchronous"]
    calm = statistics.median(t for s in saves for t in s.after) if any(s.after for s in saves) else float("nan")
    beside = [t for s in own for t in s.beside]
    lost = [s.blocked + sum(t - calm for t in s.beside) for s in own]
    return {
        "synchronous": blocked["synchronous"],
        "asynchronous": blocked["asynchronous"],
        "ratio": blocked["asynchronous"] / blocked["synchronous"],
        "worst_pair": max(
            a.blocked / b.blocked for a, b in zip(own, [s for s in saves if s.way == "synchronous"], strict=True)
        ),
        "committed": statistics.median(s.committed for s in own),
        "step": calm,
        "step_beside": statistics.median(beside) if beside else float("nan"),
        "lost": statistics.median(lost),
        "lost_ratio": statistics.median(lost) / blocked["synchronous"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--undisturbed", type=int, default=4, help="steps after each commit")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: that of temporary files")
    parser.add_argument("--document", type=Path)
    args = parser.parse_args()
    with subject(ENCODER, args.folder) as made:
        first, saves = measure(made, args.repeats, args.undisturbed)
        size = made.megabytes("asynchronous")
        assert size == made.megabytes("synchronous") and size >= 200
    text = document(first, saves, size, args)
    print(text)
    if args.document:
        args.document.write_text(text, encoding="utf-8")


def document(first: list[Save], saves: list[Save], size: float, args: argparse.Namespace) -> str:
    """The dated document: figures, how they were measured, raw numbers."""
    found = figures(saves)
    verdict = "holds" if found["ratio"] <= BOUND else "MISSED"
    raw = [dataclasses.asdict(save) for save in (*first, *saves)]
    for save in raw:
        save |= {key: [round(t, 4) for t in save[key]] for key in ("beside", "after")}
        save |= {key: round(save[key], 4) for key in ("blocked", "committed")}
    lines = [
        "# How long a checkpoint holds training up",
        "",
        f"Weights and AdamW's moments of ViT-S/16 at 32 px: {size:.0f} MB, float32, written, read back for their",
        "digests, synced (`fsync`) and committed by a rename. Medians, in seconds.",
        "",
        "| | synchronous | asynchronous | ratio |",
        "|---|---|---|---|",
        f"| training held up | {found['synchronous']:.3f} | {found['asynchronous']:.3f} | {found['ratio']:.3f} |",
        f"| and slower steps beside the write | | {found['lost']:.3f} | {found['lost_ratio']:.3f} |",
        "",
        f"* The bound of {BOUND} for the first row: {verdict}; worst pair: {found['worst_pair']:.3f}.",
        f"* From the call to the commit, beside training: {found['committed']:.3f} s.",
        f"* A training step: {found['step']:.3f} s undisturbed, {found['step_beside']:.3f} s beside a write.",
        "* The first asynchronous save also makes the buffers: "
        f"{next(s.blocked for s in first if s.way == 'asynchronous'):.3f} s (not in the medians).",
        "",
        "Measured on 2 cores of an x86_64 CPU, training on 1 thread, ext4 on a virtual disk; no GPU (not measured:",
        "copies from a GPU into page-locked memory). Other work ran on the machine: the two ways took turns in one",
        "process, in alternating order, and only ratios are to be relied upon.",
        "",
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}. Command:",
        "",
        "```sh",
        f"OMP_NUM_THREADS=1 python benchmarks/checkpoint.py --repeats {args.repeats} \\",
        f"    --undisturbed {args.undisturbed} --document benchmarks/results/2026-11-26-checkpoint.md",
        "```",
        "",
        f"Load of the machine at the end (1, 5, 15 minutes): {', '.join(f'{x:.1f}' for x in os.getloadavg())}.",
        "",
        "Raw numbers; the first two saves are those that are not in the medians:",
        "",
        "```json",
        *(json.dumps(save) for save in raw),
        "```",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
