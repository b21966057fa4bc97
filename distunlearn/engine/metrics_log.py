"""What a run says while it works: metrics.jsonl, experiment trackers, logs/<phase>.log and progress.

Only the main process writes; on every other rank all calls do nothing. Nothing here decides
anything: a tracker that fails is switched off with one warning and the run goes on.

A step number is the count of optimizer steps finished, so the first step of a phase is logged as 1
and a phase resumed from a checkpoint at `start` logs `start + 1` next.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from distunlearn.common.progress import PROGRESS_INTERVAL, Progress
from distunlearn.common.records import LineFile
from distunlearn.common.text import printable
from distunlearn.engine.trackers import Trackers

METRICS = "metrics.jsonl"


class Telemetry:
    """The running record of one attempt at a run.

    folder: the run directory. is_main: False makes every call do nothing.
    attempt: names this start of the run on every line, so that attempts can be told apart.
    tracking: names of trackers that get the finite numbers, too; see `trackers`.
    interval: seconds between progress lines. stream: where people read; standard error by default.
    """

    def __init__(
        self,
        folder: str | Path,
        is_main: bool = True,
        *,
        attempt: int | str | None = None,
        tracking: Sequence[str] = (),
        interval: float = PROGRESS_INTERVAL,
        stream: IO[str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.is_main = is_main
        self.attempt = printable(new_attempt() if attempt is None else attempt, 64)
        self.interval = interval
        self.stream = stream if stream is not None else sys.stderr
        self._trackers = Trackers(tracking if is_main else (), self.folder, self.note)
        self._starts: dict[str, int] = {}
        self._logs: dict[str, LineFile] = {}
        self._metrics: LineFile | None = None
        self._bar: Progress | None = None
        if is_main:
            self._metrics = LineFile(self.folder / METRICS)

    def log(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl, and give the finite numbers among `values` to the trackers.

        values: numbers, booleans, short texts, or scalars with `.item()` (tensors, numpy).
        """
        if self._metrics is None:
            return
        plain = {printable(key, 64): _plain(value) for key, value in values.items()}
        row = {"phase": printable(phase, 64), "step": int(step), "wall": round(time.time(), 3), "attempt": self.attempt}
        row["values"] = {key: _jsonable(value) for key, value in plain.items()}
        self._metrics.record(row)
        finite = {k: v for k, v in plain.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        self._trackers.log(_file_name(printable(phase, 64)), self._starts.get(phase, 0), int(step), finite)

    def progress(self, phase: str, total: int, start: int = 0) -> Progress:
        """Open the progress of `phase`: `with telemetry.progress(...) as bar: bar.update(step, loss=, images=)`.

        start: steps that an earlier attempt finished; in TensorBoard anything it wrote beyond them is hidden.
        """
        self._starts[phase] = start
        name = printable(phase, 64)
        note = (lambda line: self._append(name, line)) if self.is_main else None
        self._bar = Progress(name, total, start, self.stream if self.is_main else None, note, self.interval)
        return self._bar

    def note(self, phase: str, text: str) -> None:
        """One line for people: to logs/<phase>.log and to the stream, control characters escaped."""
        if not self.is_main:
            return
        line = printable(text, 2000)
        name = printable(phase, 64)
        self._append(name, line)
        if self._bar is not None and self._bar.is_live:
            self._bar.print(f"{name}: {line}")  # above the bar, not through it
        else:
            print(f"{name}: {line}", file=self.stream, flush=True)

    def close(self) -> None:
        """Flush and close every file; safe to call twice."""
        if self._bar is not None:
            self._bar.close()
        self._trackers.close()
        for log in self._logs.values():
            log.close()
        if self._metrics is not None:
            self._metrics.close()
        self._logs, self._metrics, self._bar = {}, None, None

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, phase: str, line: str) -> None:
        log = self._logs.get(phase)
        if log is None:
            log = self._logs[phase] = LineFile(self.folder / "logs" / f"{_file_name(phase)}.log")
        stamp = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        log.line(f"{stamp} attempt={self.attempt} {line}")


def new_attempt() -> str:
    """Return a name for this start of the process: UTC time and process id, e.g. `20260131T120000Z-4711`."""
    return f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{os.getpid()}"


def _plain(value: Any) -> Any:
    """A scalar of torch or numpy as a Python number; other objects as short text."""
    if isinstance(value, (bool, int, float)) or value is None:
        return value
    if hasattr(value, "item"):
        return value.item()
    return printable(value)


def _jsonable(value: Any) -> Any:
    """JSON has no nan, inf and -inf: they are written as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _file_name(name: str) -> str:
    return "".join(char if char.isalnum() and char.isascii() or char in "-_" else "_" for char in name) or "_"
