"""Weak and strong scaling over processes of this machine.

    python benchmarks/scaling.py --document benchmarks/results/DATE-scaling.md
    torchrun ... benchmarks/throughput.py --cell ...     one point over nodes: see docs/results.md

Three groups of processes, one thread each, stay alive and take turns step by step: two processes that do not
communicate, one process with the global batch, and the processes of a backend. So whatever else the machine does, it
does to all of them.

    weak efficiency   images/s of the backend's processes / images/s of as many that do not communicate, same batch each
    strong speed-up   step time of one process with the global batch / of the backend's processes that share it

By the clock (the slowest process of a group counts) and by CPU seconds (their sum): the clock has what processes wait
for each other, which on a busy machine is mostly the scheduler; CPU seconds have the work of communicating alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from constraint_report import json_text, machine
from scaling_report import document, efficiency_plot
from throughput_step import ENCODERS, configuration, prepared, session, train

WARM_UP = 2
BACKENDS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Job:
    """What the processes of a group train; `batch` is that of one process."""

    encoder: str
    batch: int
    backend: str = "single"
    world: int = 1
    steps: int = 10
    sync_batchnorm: bool = True

    def config(self) -> Any:
        return configuration(
            ENCODERS[self.encoder], self.batch * self.world, backend=self.backend, steps=self.steps + WARM_UP,
            sync_batchnorm=self.sync_batchnorm,
        )  # fmt: skip


def work(jobs: list[Job], folder: Path) -> None:
    """A process of a group, one job after the other: after every step it writes a line and waits for one."""
    torch.set_num_threads(1)

    def between(number: int) -> None:
        if number > job.steps + WARM_UP:  # what an epoch has beyond them
            return
        sample = clock.samples[-1]
        print(f"STEP {json.dumps({'seconds': sample.seconds, 'cpu': sample.cpu})}", flush=True)
        sys.stdin.readline()

    for number, job in enumerate(jobs):
        cfg = prepared(job.config(), folder / "data" / str(number))
        with session(cfg, folder / f"run-{number}", between) as run:
            clock = run.telemetry
            train(run, "pretrain")


class Group:
    """The processes of jobs, or of `copies` that know nothing of each other; they step when told to."""

    def __init__(self, jobs: list[Job], folder: Path, copies: int = 1) -> None:
        self.jobs, job, self.running = jobs, jobs[0], False
        port = 20000 + os.getpid() % 20000 + sum(map(ord, job.backend))
        self.processes, self.logs = [], []
        for number, each in enumerate(jobs):  # by one process, before the others look for it
            prepared(each.config(), folder / "data" / str(number))
        for number in range(max(copies, job.world)):
            own = folder / (f"copy{number}" if copies > 1 else "job")
            own.mkdir(parents=True, exist_ok=True)
            if not (own / "data").exists():
                (own / "data").symlink_to(folder / "data")
            variables = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
            if job.world > 1:
                variables |= {
                    "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(job.world),
                    "LOCAL_WORLD_SIZE": str(job.world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
            command = [sys.executable, __file__, "--worker", json.dumps([asdict(each) for each in jobs]),
                       "--folder", str(own)]  # fmt: skip
            log = (own / f"log-{number}").open("w", encoding="utf-8")
            self.logs.append(log)
            self.processes.append(
                subprocess.Popen(
                    command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                )  # fmt: skip
            )

    def read(self) -> list[dict[str, float]]:
        """The next step's times of all processes.

        Raises:
            RuntimeError: a process has ended.
        """
        found = []
        for process in self.processes:
            line = process.stdout.readline()
            while line and not line.startswith("STEP "):
                line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"a process of {self.jobs[0]} ended with {process.wait()}; see its log")
            found.append(json.loads(line[5:]))
        return found

    def release(self) -> None:
        for process in self.processes:
            process.stdin.write("go\n")
            process.stdin.flush()

    def step(self) -> list[dict[str, float]]:
        self.release()
        return self.read()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        for log in self.logs:
            log.close()


def rounds(groups: dict[str, Group], count: int) -> dict[str, list[list[dict[str, float]]]]:
    """`count` steps of every group in turn, by group: a list of rounds, each of the group's processes."""
    found: dict[str, list[list[dict[str, float]]]] = {name: [] for name in groups}
    for _ in range(count):
        for name, group in groups.items():
            found[name].append(group.step())
    return found


def started(group: Group) -> None:
    """Into the next job, past its warm-up."""
    if group.running:
        group.release()
    group.running = True
    group.read()
    for _ in range(WARM_UP - 1):
        group.step()


def scale(
    cells: list[tuple[str, int]], backends: list[str], count: int, save: Any, sync_batchnorm: bool = True
) -> list[dict[str, Any]]:
    """Rounds of every cell (encoder, batch of a process) and backend beside the independent processes and the single
    one, which stay alive over all of them.
    """
    found: list[dict[str, Any]] = []
    small = [Job(encoder, batch, steps=count) for _ in backends for encoder, batch in cells]
    large = [replace(job, batch=2 * job.batch) for job in small]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        beside = {"independent": Group(small, folder / "small", copies=2), "one": Group(large, folder / "large")}
        try:
            for backend in backends:
                jobs = [Job(encoder, batch, backend, 2, count, sync_batchnorm) for encoder, batch in cells]
                groups = {**beside, "backend": Group(jobs, folder / backend)}
                try:
                    for encoder, batch in cells:
                        for group in groups.values():
                            started(group)
                        samples = rounds(groups, count)
                        found.append({"encoder": encoder, "batch": batch, "backend": backend, "rounds": samples})
                        print(encoder, batch, backend, "done", flush=True)
                        save(found)
                except RuntimeError as error:
                    log = (folder / backend / "job" / "log-0").read_text(encoding="utf-8")[-1500:]
                    print(error, log, file=sys.stderr)
                    found.append({"encoder": "", "batch": 0, "backend": backend, "error": str(error)})
                    save(found)
                    return found  # the groups beside it are out of step now
                finally:
                    groups["backend"].close()
        finally:
            for group in beside.values():
                group.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", default=["vit_tiny16-64:32", "resnet18-64:16"], metavar="ENCODER:BATCH",
                        help="what a process of a backend trains; batch: its images of a step")  # fmt: skip
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--local-batchnorm", action="store_true", help="batch statistics of each process's own images")
    parser.add_argument("--document", type=Path, help="write the results here; .json and .svg (plot) beside it")
    parser.add_argument("--worker", help="a process of a group, as JSON")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.worker:
        work([Job(**job) for job in json.loads(args.worker)], args.folder)
        return
    begun = time.perf_counter()
    result: dict[str, Any] = {"command": " ".join(["python", "benchmarks/scaling.py", *sys.argv[1:]])}
    result |= {"machine": machine("cpu"), "scaling": [], "local_batchnorm": args.local_batchnorm}
    cells = [(name, int(batch)) for name, _, batch in (cell.partition(":") for cell in args.cells)]
    if unknown := [name for name, _ in cells if name not in ENCODERS]:
        parser.error(f"--cells names {unknown[0]}, expected one of {', '.join(ENCODERS)} and a batch")

    def save(found: list[dict[str, Any]] | None = None) -> None:
        result["scaling"] = found or result["scaling"]
        if args.document:
            args.document.with_suffix(".json").write_text(json_text(result), encoding="utf-8")

    torch.set_num_threads(1)
    save(scale(cells, args.backends, args.rounds, save, not args.local_batchnorm))
    result |= {"minutes": (time.perf_counter() - begun) / 60, "load_after": os.getloadavg()[0]}
    save()
    text = document(result)
    if args.document:
        args.document.write_text(text, encoding="utf-8")
        efficiency_plot(result, args.document.with_suffix(".svg"))
    print(text)


if __name__ == "__main__":
    main()
