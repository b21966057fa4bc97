"""Work that ranks do each at its own pace, for hours if need be, before they go on together.

A collective operation has a limit of time, and a rank that waits in one hears nothing. Here a rank that has ended its
part asks the store of the process group instead how many have ended, for as long as all others say that they are
alive: a thread of every rank at work counts up a number of its own every BEAT seconds, and the main rank looks at
these numbers. Nothing is limited but silence.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from types import TracebackType
from typing import Any, Protocol

import torch.distributed as dist

from distunlearn import errors
from distunlearn.common.files import disk_trouble
from distunlearn.errors import RankLostError

BEAT = 5.0  # seconds between two signs of life
SILENCE = 120.0  # seconds without one after which a rank is lost
ARRIVAL = 1800.0  # seconds for a rank to begin at all, after the main rank has
POLL = 0.5  # seconds between two questions of a rank that waits, at most

_held = 0  # meetings with other ranks so far; alike on all ranks


class Ranks(Protocol):
    """What is asked of a world."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...


class Meeting:
    """`with Meeting(world) as meeting:` a rank's part of the work; the block ends when that of every rank has.

    Collective. What one rank raises ends the block on all: at once where it waits, at its next `check` where it works.

    Raises:
        DistunlearnError: what another rank raised. RankLostError: it failed otherwise, or says nothing any more.
    """

    def __init__(self, world: Ranks) -> None:
        global _held
        self._world = world
        self._shared = world.size > 1 and dist.is_initialized()
        _held += self._shared  # one that a rank holds alone, within the main rank's own work, is not counted
        self._store = self._open() if self._shared else dist.HashStore()
        self._told = False  # that another rank has failed
        self._left = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name="pulse", daemon=True)

    @staticmethod
    def _open() -> dist.Store:
        store = dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
        return dist.PrefixStore(f"distunlearn/meeting {_held}", store)

    def count(self, name: str, more: int = 0) -> int:
        """A number of all ranks together, after adding to it."""
        return self._store.add(name, more)

    def check(self) -> None:
        """Raise what another rank has raised, if one has."""
        if not self._shared or not self._store.check(["failed"]):
            return
        self._told = True
        rank, kind, text = json.loads(self._store.get("failed"))
        known = getattr(errors, kind, None)
        if known is None:
            raise RankLostError(f"rank {rank} failed ({kind}) while rank {self._world.rank} waited; see what it said.")
        agreed = known(text)
        agreed.agreed = True
        raise agreed

    def __enter__(self) -> Meeting:
        if self._shared:
            self._pulse.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._shared:
            return
        try:
            if isinstance(error, Exception):
                self._fail(error)
            elif error is None:
                self._store.add("ended", 1)
                self._wait()
        finally:
            self._left.set()
            self._pulse.join()

    def _fail(self, error: Exception) -> None:
        """Tell the others; the first rank that fails is the one that counts."""
        found: Any = disk_trouble(error) or error
        if self._told:
            return
        with contextlib.suppress(RuntimeError):  # the main rank is gone, and its store with it
            self._store.compare_set("failed", "", json.dumps([self._world.rank, type(found).__name__, str(found)]))
        if getattr(errors, type(found).__name__, None) is not None:
            found.agreed = True
            if found is not error:
                raise found from error

    def _wait(self) -> None:
        pause, ended, main = 0.001, 0, _Silence(0)
        while ended < self._world.size:
            self.check()
            ended = self._store.add("ended", 0)
            if lost := main.heard(self._store):
                raise RankLostError(lost)
            if ended < self._world.size:
                time.sleep(pause)
                pause = min(2 * pause, POLL)

    def _beat(self) -> None:
        """The thread: say that this rank is alive; on the main rank also look who no longer does."""
        everyone = [_Silence(rank) for rank in range(self._world.size if self._world.rank == 0 else 0)]
        while True:
            try:
                self._store.add(f"pulse {self._world.rank}", 1)
                for lost in filter(None, [silence.heard(self._store) for silence in everyone]):
                    self._store.compare_set("failed", "", json.dumps([0, "RankLostError", lost]))
            except RuntimeError:  # of torch's own
                return  # the store is gone; whoever asks it next says so
            if self._left.wait(BEAT):
                return


class _Silence:
    """How long a rank has given no sign of life. A job that was suspended as a whole has not been silent meanwhile."""

    def __init__(self, rank: int) -> None:
        self.rank, self._beat, self._silent, self._before = rank, 0, 0.0, time.monotonic()

    def heard(self, store: dist.Store) -> str | None:
        """Look once more; a sentence if it is too long."""
        now, found = time.monotonic(), store.add(f"pulse {self.rank}", 0)
        passed, self._before = min(now - self._before, 2 * BEAT), now
        self._silent = self._silent + passed if found == self._beat else 0.0
        self._beat = found
        if self._silent <= (SILENCE if found else ARRIVAL):
            return None
        return f"rank {self.rank} has said nothing for {self._silent:.0f} s; start the run again."
