"""Watching over the processes of a run: one that hangs is named, its stack is kept, and all end with exit code 5.

The training loop marks where it is. A thread of every process writes the last mark into `watch/rank-RRRR.json` of the
run directory, and counts the time since. After `watchdog_s` seconds in one part of a step (`watchdog_save_s` in a
checkpoint, a calibration or the first step, which compiles) the process writes the stacks of all its threads beside
it, reads what the others wrote, says which of them everybody waits for, and ends. So the whole job ends within
`watchdog_s` + 25 s, whichever process hangs; one that is frozen as a whole is left to its launcher.

Processes that wait in *different* collective operations wait for ever: one of them left one out. That is told from a
quarter of `watchdog_s` on.

A process that fails leaves its error in its file, so that the others, whose connection to it breaks, can name it. An
attempt that ends well, or by agreement, leaves no file.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from distunlearn.common.files import write_atomic
from distunlearn.common.text import printable
from distunlearn.distributed.process_group import lost_rank
from distunlearn.engine.run_lock import born
from distunlearn.errors import DataError, RankLostError
from distunlearn.verify.records import Fields, read_record

WATCH = "watch"
INTERVAL = 15.0  # seconds between two looks, at most
GRACE = 10.0  # seconds for the other processes to come to the same conclusion, at most
SLACK = 5.0  # seconds that a busy machine may let a thread wait
LAST_WORDS = 3.0  # seconds for a process that fails to say so
REPORT: Fields = {
    "host": str, "pid": int, "count": int, "phase": str, "step": int, "place": str, "age": (int, float),
    "sequence": int, "waits": bool, "stack": list,
}  # fmt: skip
PACKAGE = f"{os.sep}distunlearn{os.sep}"
# Who is in one of these waits for others.
COLLECTIVES = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}distributed{os.sep}meeting.py")


@dataclass(frozen=True)
class _Mark:
    count: int = 0
    phase: str = ""
    step: int = 0
    place: str = "between phases"
    slow: bool = False


class Watch:
    """Of one process, from the start of a session to its end: `with Watch(...) as watch: watch.at(...)`.

    Args:
        folder: the run directory; it exists.
        limit: `watchdog_s`; 0: nothing is ended, but reports are written all the same.
        slow_limit: `watchdog_save_s`.
        last: called before the process is ended, to give back what it holds.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world: int,
        limit: float,
        slow_limit: float,
        last: Callable[[], None] | None = None,
    ) -> None:
        self.folder, self.rank, self.world = Path(folder) / WATCH, rank, world
        self.limit, self.slow_limit = limit, max(limit, slow_limit)
        self.interval = min(INTERVAL, limit / 8) if limit else INTERVAL
        self._last = last
        self._mark, self._training = _Mark(), False
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._main = threading.main_thread().ident
        self._ended = threading.Event()

    def __enter__(self) -> Watch:
        self.folder.mkdir(exist_ok=True)
        for old in self.folder.glob("rank-*"):  # of an earlier attempt, perhaps of more processes
            number = int(re.sub(r"\D", "", old.name) or 0)
            if number == self.rank or (self.rank == 0 and number >= self.world):
                old.unlink(missing_ok=True)
        for left in self.folder.glob(f".rank-{self.rank:04d}.*"):  # of a process that was killed as it wrote
            left.unlink(missing_ok=True)
        self._publish()
        self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._ended.set()
        self._thread.join()
        lost = None if error is None else lost_rank(error)
        with contextlib.suppress(OSError):  # a full disk, or a folder that is gone, must not hide the error
            if error is None or getattr(error, "agreed", False):
                self._path(self.rank).unlink(missing_ok=True)
            elif lost is None:
                self._publish(error=printable(f"{type(error).__name__}: {error}", 300))
            else:
                self._publish(lost=True)
        if lost is None or getattr(error, "agreed", False):
            return
        raise RankLostError(f"{self._who_failed()}; {lost}") from error

    @property
    def count(self) -> int:
        """Marks so far; alike on ranks that have done the same."""
        return self._mark.count

    def at(self, place: str, phase: str = "", step: int = 0, *, slow: bool = False) -> None:
        """The main thread has come to `place`; the clock starts anew. slow: `slow_limit` holds there."""
        self._mark = _Mark(self._mark.count + 1, phase, step, place, slow)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Within it the limits hold: outside ranks may work for hours while others wait (`meeting.py`)."""
        self._training = True
        try:
            yield
        finally:
            self._training = False
            self.at("between phases")

    # -- the thread ----------------------------------------------------------------------------------------------

    def _look(self) -> None:
        seen, age, before = self._mark, 0.0, time.monotonic()
        while not self._ended.wait(self.interval):
            now = time.monotonic()
            # A job that was suspended as a whole and goes on has not been hanging in between.
            passed, before = min(now - before, 2 * self.interval), now
            seen, age = (seen, age + passed) if seen is self._mark else (self._mark, 0.0)
            with contextlib.suppress(OSError):
                self._publish(age=age)
            if not self.limit or not self._training:
                continue
            if age > (self.slow_limit if seen.slow else self.limit):
                self._end(age)
            elif self.world > 1 and not seen.slow and age > self.limit / 4 and self._wait_for_different_things():
                self._end(age)

    def _wait_for_different_things(self) -> bool:
        reports = self._reports()
        fixed = [r for r in reports.values() if r.get("waits") and r["age"] > self.limit / 4 and "error" not in r]
        # Of the same number: a rank that has begun one operation more has left its part of the last one to the others.
        same = len({r["sequence"] for r in fixed}) == 1
        return len(fixed) == self.world and same and not self._silent(reports) and len(_places(fixed)) > 1

    def _end(self, age: float) -> None:
        """Keep the stack, say who hangs, end the process."""
        with contextlib.suppress(OSError), open(self._stack_path(), "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        end = time.monotonic() + (min(GRACE, self.limit / 4) if self.world > 1 else 0)
        while True:
            with contextlib.suppress(OSError):
                self._publish(age=age, stuck=True)
            reports = self._reports()
            if all(r.get("stuck") for r in reports.values()) and len(reports) == self.world:
                break
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        verdict = self._verdict(reports)
        with contextlib.suppress(OSError):
            self._publish(age=age, stuck=True, verdict=verdict)
        prefix = f"rank {self.rank}: " if self.world > 1 else ""
        print(f"{prefix}error: {verdict}", file=sys.stderr, flush=True)
        if self._last is not None:
            with contextlib.suppress(Exception):
                self._last()
        os._exit(RankLostError.exit_code)

    def _verdict(self, reports: dict[int, dict[str, Any]]) -> str:
        tail = f"; stacks are in {printable(self.folder)}; the same command goes on from the last checkpoint."
        failed = [f"rank {n} failed ({printable(r['error'], 300)})" for n, r in reports.items() if "error" in r]
        silent = [f"rank {n} says nothing any more{_who(reports.get(n))}" for n in self._silent(reports)]
        if failed or silent:
            return "; ".join(failed + silent) + tail
        moving = {n: r for n, r in reports.items() if not r["waits"]}
        if not moving:
            told = ", ".join(f"rank {n} at {_place(r)}" for n, r in sorted(reports.items())[:8])
            return f"the ranks wait for different things, one of them left a collective operation out: {told}{tail}"
        behind = min((r["count"], r["sequence"]) for r in moving.values())
        found = [n for n, r in moving.items() if (r["count"], r["sequence"]) == behind]
        told = ", ".join(f"rank {n} of {self.world} hangs in {_place(reports[n])}" for n in found[:8])
        return f"{told}, for {reports[found[0]]['age']:.0f} s{tail}"

    # -- reports -------------------------------------------------------------------------------------------------

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:04d}.json"

    def _stack_path(self) -> Path:
        return self.folder / f"rank-{self.rank:04d}.stack.txt"

    def _publish(self, **more: Any) -> None:
        mark = self._mark
        stack = list(_stack(sys._current_frames().get(self._main or 0)))
        report = {
            "rank": self.rank, "host": socket.gethostname(), "pid": os.getpid(), "count": mark.count,
            "phase": mark.phase, "step": mark.step, "place": mark.place, "age": 0.0, "sequence": _sequence(),
            "waits": any(place in path for path, _, _ in stack for place in COLLECTIVES),
            "stack": [f"{Path(path).name}:{line} {name}" for path, line, name in stack if PACKAGE in path][-6:], **more,
        }  # fmt: skip
        write_atomic(self._path(self.rank), json.dumps(report) + "\n", durable=False)

    def _reports(self) -> dict[int, dict[str, Any]]:
        """The last report of every rank that has one, by rank."""
        found = {}
        for rank in range(self.world):
            with contextlib.suppress(DataError):
                found[rank] = read_record(self._path(rank), REPORT)
        return found

    def _silent(self, reports: dict[int, dict[str, Any]]) -> list[int]:
        """Ranks without a report, or whose process writes none any more, by the clock of the file system."""
        silent = [rank for rank in range(self.world) if rank not in reports]
        with contextlib.suppress(OSError):
            mine = self._path(self.rank).stat().st_mtime
            silent += [n for n in reports if mine - self._path(n).stat().st_mtime > 3 * self.interval + SLACK]
        return sorted(set(silent) - {self.rank})

    def _who_failed(self) -> str:
        """Which process broke the connection, as far as can be told within `LAST_WORDS` seconds."""
        end = time.monotonic() + LAST_WORDS
        while True:
            reports = self._reports()
            for rank, report in reports.items():
                if rank != self.rank and "error" in report:
                    return f"rank {rank} failed ({printable(report['error'], 300)})"
                if rank != self.rank and "verdict" in report:
                    return f"rank {rank} ended the run: {printable(report['verdict'], 1000).rstrip('.')}"
            gone = [n for n, r in reports.items() if r["host"] == socket.gethostname() and born(r["pid"]) is None]
            if gone:
                return f"rank {gone[0]} is gone (process {reports[gone[0]]['pid']}, without a word)"
            if time.monotonic() > end:
                return "a rank did not say why it left"
            time.sleep(0.1)


def _stack(frame: FrameType | None) -> Iterator[tuple[str, int, str]]:
    """File, line and function of a stack, outermost first."""
    frames = []
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    yield from reversed(frames)


def _sequence() -> int:
    """Collective operations that this process has begun, those of DDP's backward included; -1: not known."""
    if not dist.is_available() or not dist.is_initialized():
        return -1
    with contextlib.suppress(Exception):  # of torch's own, without a promise
        return int(dist.distributed_c10d._get_default_group()._get_sequence_number_for_group())  # type: ignore[attr-defined]
    return -1


def _places(reports: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
    return {(r["count"], *map(str, r["stack"])) for r in reports}


def _place(report: dict[str, Any]) -> str:
    where = f" ({report['stack'][-1]})" if report["stack"] else ""
    return printable(f"{report['phase']} step {report['step']}, {report['place']}{where}".strip(), 300)


def _who(report: dict[str, Any] | None) -> str:
    return (
        ""
        if report is None
        else f" (process {report['pid']} on {printable(report['host'], 80)}, last in {_place(report)})"
    )
