"""Stopping on request: a signal, or a file, sets a flag; all ranks stop after the same step, in a state that resumes.

Signals: SIGTERM (schedulers, launchers), SIGUSR1 (a scheduler's warning before the time limit), SIGINT (Ctrl-C). The
first sets the flag and gives the signal back its old meaning, so that a second one ends the process at once; a
checkpoint is a folder that appears in one rename, so neither can tear it. Where a launcher keeps signals to itself, the
file `stop` in the run directory does the same.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from distunlearn.distributed.world import World
from distunlearn.errors import RankLostError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOP_FILE = "stop"


class StopRequest:
    """Within the block signals ask for a stop. In a thread other than the main one only the file does.

    reason: what asked, on this rank; None: nothing yet.
    """

    def __init__(self, folder: Path) -> None:
        self.reason: str | None = None
        self._file = folder / STOP_FILE
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number in list(self._before):
            self._give_back(number)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        found = signal.Signals(number)
        self.reason = self.reason or found.name
        self._give_back(found)

    def _give_back(self, number: signal.Signals) -> None:
        signal.signal(number, self._before.pop(number, signal.SIG_DFL) or signal.SIG_DFL)

    def agreed(self, world: World, *position: int) -> bool:
        """True if any rank was asked to stop; the same answer on all ranks. Collective.

        Args:
            position: numbers that are alike on ranks that have done the same so far, such as the step.

        Raises:
            RankLostError: they are not alike: the ranks would wait for one another in different places.
        """
        if self.reason is None and world.is_main and self._file.exists():
            self.reason = f"the file {STOP_FILE}"
        everyone = world.gather_numbers([int(self.reason is not None), *position])
        if any(numbers[1:] != everyone[0][1:] for numbers in everyone):
            told = ", ".join(f"rank {rank}: {numbers[1:]}" for rank, numbers in enumerate(everyone[:8]))
            error = RankLostError(f"the ranks are not at the same place ({told}); start the run again.")
            error.agreed = True
            raise error
        return any(numbers[0] for numbers in everyone)

    def honoured(self, world: World) -> str:
        """To be called when the state is saved: what asked, by the first rank that knows; the file is removed."""
        reasons = world.gather_ids({"reasons": [] if self.reason is None else [self.reason]})["reasons"]
        if world.is_main:
            self._file.unlink(missing_ok=True)
        return reasons[0]
