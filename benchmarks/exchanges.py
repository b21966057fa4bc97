"""What the small exchanges between the processes of one machine cost: alone, and within the steps of a ResNet.

    python benchmarks/exchanges.py --document benchmarks/results/DATE-exchanges.md

Two processes, one thread each, run forward and backward of a ResNet-18 (no views, no optimizer, no gradients averaged)
in five ways that take turns step by step:

    torch          torch's batch norm, each process for itself
    layers         the layers with statistics over all ranks, but nothing exchanged
    barrier        as `layers`, and at each exchange the processes wait for each other at the process group's barrier
    process group  statistics over both processes, through gloo
    mailbox        statistics over both processes, through shared memory (`objectives/mailbox.py`): what a run does

So `barrier` against `layers` is what it costs to meet by way of the process group, `process group` against `barrier`
what the data add, and `mailbox` against `layers` what it costs to meet and exchange in shared memory.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from constraint_report import json_text, machine
from throughput_stats import paragraphs, preamble, ratio, shown, table
from torch import Tensor, nn

from distunlearn.engine import batchnorm
from distunlearn.engine.memory import keep_freed_memory
from distunlearn.objectives import gather
from distunlearn.objectives.mailbox import Mailbox, open_mailbox

WAYS = ("torch", "layers", "barrier", "process group", "mailbox")
VALUES = 257  # of an exchange on its own: mean, M2 of 128 channels and the count
REPEATS = 1000

Step = dict[str, float]


class Ways:
    """The networks of one process, and how they exchange."""

    def __init__(self, mailbox: Mailbox) -> None:
        torch.manual_seed(0)
        self.mailbox = mailbox
        self.plain = timm.create_model("resnet18", num_classes=0)
        self.synchronised = batchnorm.convert(copy.deepcopy(self.plain), dist.get_world_size())
        self.exchanges = batchnorm.all_gather_detached, batchnorm.sum_over_ranks

    def choose(self, way: str) -> nn.Module:
        gather.use_mailbox(self.mailbox if way == "mailbox" else None)
        batchnorm.all_gather_detached, batchnorm.sum_over_ranks = self.exchanges
        if way in ("layers", "barrier"):
            batchnorm.all_gather_detached = batchnorm.sum_over_ranks = _meet if way == "barrier" else _pass
        return self.plain if way == "torch" else self.synchronised


def _pass(x: Tensor) -> Tensor:
    return x


def _meet(x: Tensor) -> Tensor:
    dist.barrier()
    return x


def seconds_alone(exchange: Callable[[Tensor], Tensor]) -> float:
    """Of one exchange among many in a row."""
    x = torch.randn(1, VALUES)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(REPEATS):
        exchange(x)
    return (time.perf_counter() - start) / REPEATS


def step(network: nn.Module, x: Tensor) -> Step:
    dist.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    network(x).square().mean().backward()
    found = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    network.zero_grad()
    return found


def work(rank: int, folder: str, batch: int, rounds: int, queue: Any) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mailbox = open_mailbox(60.0)
    if mailbox is None:
        raise RuntimeError("this machine has no mailbox (two cores, x86-64 and /dev/shm are needed)")
    ways = Ways(mailbox)
    alone = {}
    for way in ("process group", "mailbox"):
        ways.choose(way)
        for name, exchange in (("gather", gather.all_gather_detached), ("sum", gather.sum_over_ranks)):
            alone[f"{name}, {way}"] = seconds_alone(exchange)
    x = torch.randn(batch, 3, 64, 64)
    for way in WAYS:  # warm-up
        step(ways.choose(way), x)
    steps = [{way: step(ways.choose(way), x) for way in WAYS} for _ in range(rounds)]
    queue.put((rank, {"alone": alone, "steps": steps}))
    dist.barrier()
    dist.destroy_process_group()


def measure(batch: int, rounds: int, folder: Path) -> dict[str, Any]:
    queue = mp.get_context("spawn").SimpleQueue()
    started = mp.start_processes(work, (str(folder), batch, rounds, queue), nprocs=2, join=False, start_method="spawn")
    found = dict(queue.get() for _ in range(2))
    started.join()
    (folder / "store").unlink(missing_ok=True)
    return {"batch": batch, "ranks": [found[rank] for rank in range(2)]}


def pairs(found: dict[str, Any], way: str) -> list[list[Step]]:
    """The steps of both processes, by round."""
    return [[own[way] for own in both] for both in zip(*(rank["steps"] for rank in found["ranks"]), strict=True)]


def clocks(found: dict[str, Any], way: str, key: str = "seconds") -> list[float]:
    """Of every round the slower process's seconds, or the mean of their CPU seconds."""
    merge = max if key == "seconds" else statistics.mean
    return [merge([own[key] for own in both]) for both in pairs(found, way)]


ABOUT = (
    "Two processes of one machine, one thread each: forward and backward of a ResNet-18 on images of 64 x 64 pixels, "
    "without views, optimizer and averaged gradients; five ways that took turns step by step. `torch`: its batch norm, "
    "each process for itself. `layers`: the layers with statistics over all ranks, nothing exchanged. `barrier`: as "
    "these, but the processes wait for each other where they would exchange. `process group`: statistics over both "
    "processes through gloo. `mailbox`: through shared memory, as runs do. Seconds: the slower process; CPU: their "
    "mean; against `torch`: median of the rounds' ratios with a distribution-free 95 % interval."
)


def steps_table(found: dict[str, Any]) -> str:
    rows = []
    for way in WAYS:
        own, cpu = clocks(found, way), clocks(found, way, "cpu")
        against = shown(ratio(own, clocks(found, "torch")))
        rows.append([way, f"{statistics.median(own):.3f}", f"{statistics.median(cpu):.3f}", against])
    return table(["way", "seconds", "CPU seconds", "seconds, against torch"], rows)


def raw(found: dict[str, Any]) -> str:
    lines = []
    for way in WAYS:
        told = [" ".join(f"{own['seconds']:.3f}/{own['cpu']:.3f}" for own in both) for both in pairs(found, way)]
        lines.append(f"{found['batch']} images, {way}: {'  '.join(told)}")
    return "\n".join(lines)


def document(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    parts = [*preamble(result), ABOUT]
    for found in result["found"]:
        parts += [f"## {found['batch']} images a process", steps_table(found)]
    alone = [rank["alone"] for rank in result["found"][0]["ranks"]]
    rows = [[name, f"{1e6 * max(own[name] for own in alone):.0f}"] for name in alone[0]]
    parts += [f"## {REPEATS:,} exchanges of {VALUES} values in a row", table(["exchange", "microseconds each"], rows)]
    parts += ["## Raw numbers", "Seconds by the clock / CPU seconds, rank 0 and rank 1 of a round together."]
    parts.append("```\n" + "\n".join(raw(found) for found in result["found"]) + "\n```")
    return paragraphs("Small exchanges between two processes", parts)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256], help="images of a process (both views)")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--document", type=Path, help="write the results there, and a JSON file beside it")
    given = parser.parse_args(arguments)
    command = "python benchmarks/exchanges.py " + " ".join(arguments)
    result: dict[str, Any] = {"machine": machine("cpu"), "command": command}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result["found"] = [measure(batch, given.rounds, Path(folder)) for batch in given.batches]
    result |= {"load_after": os.getloadavg()[0], "minutes": (time.perf_counter() - start) / 60}
    text = document(result)
    print(text)
    if given.document:
        given.document.write_text(text, encoding="utf-8")
        given.document.with_suffix(".json").write_text(json_text(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
