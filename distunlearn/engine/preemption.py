"""Stopping on request: a signal, or a file, sets a flag; all ranks stop after the same step, in a state that resumes.

Signals: SIGTERM (schedulers, launchers), SIGUSR1 (a scheduler's warning before the time limit), SIGINT (Ctrl-C), SIGHUP
(a terminal that closes, unless `nohup` has it ignored). The first sets the flag and gives the signal back its old
meaning, so that a second one ends the process at once; a checkpoint is a folder that appears in one rename, so neither
can tear it. Where a launcher keeps signals to itself, the file `stop` in the run directory does the same.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from distunlearn.distributed.world import World
from distunlearn.errors import RankLostError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
STOP_FILE = "stop"


class StopRequest:
    """Within the block signals ask for a stop. In a thread other than the main one only the file does.

    reason: what asked, on this rank; None: nothing yet.
    """

    def __init__(self, folder: Path) -> None:
        self.reason: str | None = _kept.reason if _kept else None
        self._file = folder / STOP_FILE
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = _install(self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        found = signal.Signals(number)
        self.reason = self.reason or found.name
        before = self._before.pop(found, signal.SIG_DFL)
        if _kept is None:
            signal.signal(found, before)
        else:
            _kept.ask(number, frame)

    def asked(self, world: World) -> bool:
        """Whether this rank was asked to stop, or on the main rank anybody by the file."""
        if self.reason is None and world.is_main and self._file.exists():
            self.reason = f"the file {STOP_FILE}"
        return self.reason is not None

    def agreed(self, world: World, *position: int) -> bool:
        """True if any rank was asked to stop; the same answer on all ranks. Collective.

        Args:
            position: numbers that are alike on ranks that have done the same so far, such as the step.

        Raises:
            RankLostError: they are not alike: the ranks would wait for one another in different places.
        """
        asked, *extremes = world.largest([int(self.asked(world)), *position, *(-number for number in position)])
        if any(high != -low for high, low in zip(extremes, extremes[len(position) :], strict=False)):
            everyone = world.gather_numbers(position)
            told = ", ".join(f"rank {rank}: {numbers}" for rank, numbers in enumerate(everyone[:8]))
            error = RankLostError(f"the ranks are not at the same place ({told}); start the run again.")
            error.agreed = True
            raise error
        return bool(asked)

    def honoured(self, world: World) -> str:
        """To be called when the state is saved: what asked, by the first rank that knows; the file is removed."""
        reasons = world.gather_ids({"reasons": [] if self.reason is None else [self.reason]})["reasons"]
        if world.is_main:
            self._file.unlink(missing_ok=True)
        return reasons[0]


class _Kept:
    """What asked for a stop since the first verb of a command began, and the handlers of before."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.before: dict[signal.Signals, Any] = {}

    def ask(self, number: int, frame: FrameType | None) -> None:
        found = signal.Signals(number)
        self.reason = self.reason or found.name
        signal.signal(found, self.before[found])


_kept: _Kept | None = None


@contextlib.contextmanager
def stop_kept() -> Iterator[None]:
    """Within it a signal that comes after the last step of a verb, or between two, is for the next verb."""
    global _kept
    _kept = kept = _Kept()
    kept.before = _install(kept.ask)
    try:
        yield
    finally:
        for number, handler in kept.before.items():
            signal.signal(number, handler)
        _kept = None


def _install(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Handlers of before, by signal; none in a thread other than the main one. `nohup` has SIGHUP ignored for good."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    wanted = [number for number in SIGNALS if not (ignored and number == signal.SIGHUP)]
    return {number: signal.signal(number, handler) or signal.SIG_DFL for number in wanted}
