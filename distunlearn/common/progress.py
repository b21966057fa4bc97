"""Progress for people: a bar on a terminal, one plain line every few seconds anywhere else."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from rich import console, progress

from distunlearn.common.launcher import is_main

PROGRESS_INTERVAL = 10.0  # seconds between plain lines
QUIET = 10.0  # seconds before the first plain line of `progress_of`; a terminal gets its bar after a tenth of that


class Progress:
    """Progress of one phase. stream None: silent (ranks other than the main one).

    phase: printable text. total, start: steps. note: also called with every plain line (the log
    file gets them on a terminal too). interval: seconds between plain lines, of which the first
    and the last step always have one. began: of the work, by time.monotonic; None: now.
    """

    def __init__(
        self,
        phase: str,
        total: int,
        start: int,
        stream: IO[str] | None,
        note: Callable[[str], None] | None = None,
        interval: float = PROGRESS_INTERVAL,
        began: float | None = None,
    ) -> None:
        self.phase, self.total, self.start = phase, total, start
        self._stream, self._note, self._interval = stream, note, interval
        self._images = 0
        self._began = time.monotonic() if began is None else began
        self._last_line = -math.inf
        self._bar: Any = None
        self._task: Any = None
        if stream is not None and stream.isatty():
            self._bar, self._task = _open_bar(stream, phase, total, start)

    @property
    def is_live(self) -> bool:
        """True while a bar is drawn on a terminal."""
        return self._bar is not None

    def update(self, step: int, loss: float | None = None, images: int = 0) -> None:
        """Report that `step` steps are finished; images: passed through the encoder since the phase began, in all."""
        if self._stream is None:
            return
        self._images = images
        now = time.monotonic()
        text = self._figures(step, loss, max(now - self._began, 1e-9))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures="  ".join(text))
        if step < self.total and now - self._last_line < self._interval:
            return
        self._last_line = now
        line = "  ".join([f"{step}/{self.total}", *text])
        if self._note is not None:
            self._note(line)
        if self._bar is None:
            print(f"{self.phase}: {line}", file=self._stream, flush=True)

    def print(self, line: str) -> None:
        """A plain line above the bar."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _figures(self, step: int, loss: float | None, elapsed: float) -> list[str]:
        """Loss, speed and time left, from this attempt's own steps only."""
        text = [] if loss is None else [f"loss {float(loss):.4f}"]
        done = step - self.start
        if self._images and step > 0:
            text.append(f"{self._images * done / step / elapsed:.0f} images/s")  # every step passes as many
        if step >= self.total:
            text.append(f"took {duration(elapsed)}")
        elif done > 0:
            text.append(f"{duration((self.total - step) * elapsed / done)} left")
        return text

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def progress_of(phase: str, unit: str = "") -> Iterator[Callable[[int, int], None]]:
    """A callback (done, all) that shows time left on stderr, once the work has taken a moment; the main process alone.

    unit: "images" shows the rate, too.
    """
    began = time.monotonic()
    quiet = QUIET / 10 if sys.stderr.isatty() else QUIET
    bars: list[Progress] = []

    def show(done: int, total: int) -> None:
        if not bars:
            if time.monotonic() - began < quiet or done == total or not is_main():
                return
            bars.append(Progress(phase, total, 0, sys.stderr, began=began))
        bars[0].update(done, images=done if unit == "images" else 0)

    try:
        yield show
    finally:
        for bar in bars:
            bar.close()


class Rounds:
    """Which of several trainings it is and how long the rest takes, from those that were not finished before."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._began: list[float] = []

    def next(self) -> str:
        """At the start of a round, such as `3 of 12, about 2 h 10 min left`."""
        self._began.append(time.monotonic())
        number = len(self._began)
        took = [end - start for start, end in zip(self._began, self._began[1:], strict=False) if end - start >= 1]
        left = f", about {duration((self.total - number + 1) * sum(took) / len(took))} left" if took else ""
        return f"{number} of {self.total}{left}"


def duration(seconds: float) -> str:
    """Return seconds (>= 0) as people say them: `8 s`, `3 min 05 s`, `2 h 10 min`.

    >>> duration(7.6), duration(185), duration(7800)
    ('8 s', '3 min 05 s', '2 h 10 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _open_bar(stream: IO[str], phase: str, total: int, start: int) -> tuple[Any, Any]:
    bar = progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=None),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[figures]}", markup=False),
        console=console.Console(file=stream),
        refresh_per_second=4,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    bar.start()
    return bar, bar.add_task(phase, total=total, completed=start, figures="")
