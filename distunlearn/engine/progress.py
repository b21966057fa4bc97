"""Progress for people: a bar on a terminal, one plain line every few seconds anywhere else."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import IO, Any

from rich import console, progress

PROGRESS_INTERVAL = 10.0  # seconds between plain lines


class Progress:
    """Progress of one phase. stream None: silent (ranks other than the main one).

    phase: printable text. total, start: steps. note: also called with every plain line (the log
    file gets them on a terminal too). interval: seconds between plain lines, of which the first
    and the last step always have one.
    """

    def __init__(
        self,
        phase: str,
        total: int,
        start: int,
        stream: IO[str] | None,
        note: Callable[[str], None] | None = None,
        interval: float = PROGRESS_INTERVAL,
    ) -> None:
        self.phase, self.total, self.start = phase, total, start
        self._stream, self._note, self._interval = stream, note, interval
        self._images = 0
        self._began = time.monotonic()
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
