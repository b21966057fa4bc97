"""Shards of the coming images, read from end to end into the operating system's cache before they are asked for.

The images of a block of shards come in random order, so from a disk that nobody has read yet each is a read of its own,
waited for. A thread of the training process reads this block's and the next block's shards in order instead, in long
reads, while workers decode. It is a hint and nothing more: no image comes from it, what it cannot read it leaves, and
the reads that count raise what there is to raise.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from distunlearn.data.manifest.manifest import Manifest

__all__ = ["ReadAhead", "free_memory"]

CHUNK = 1 << 20  # bytes of one read
WANTED = 0.5  # least share of the images' bytes that the stream will ask for
SHARE = 0.25  # of the free memory that the shards which are asked for at once may take
PATIENCE = 5.0  # seconds that the end of a stream waits for the thread
CGROUP = Path("/sys/fs/cgroup/memory.max")


class ReadAhead:
    """Keeps the shards of a stream read ahead by one block; used by one thread.

    Nothing is read where it would not help or could hurt: shards in an object store, roles that are less than half of
    the bytes of their shards' images (a forget set costs what its own images cost), shards that do not fit into a
    quarter of the free memory.

    Args:
        manifest, roles: of the stream.
        blocks: epoch -> names of the shards of each block, in the order in which the epoch visits them.
        rank: of this process; those of one machine begin with different shards, so that each is fetched once.
    """

    def __init__(
        self, manifest: Manifest, roles: str | Sequence[str], blocks: Callable[[int], list[list[str]]], rank: int = 0
    ) -> None:
        chosen = manifest.select(roles)
        self._manifest = manifest
        self._blocks = blocks
        self._rank = rank
        self._images = dict(zip(chosen.shards, np.bincount(chosen.shard_of).tolist(), strict=True))
        self._helps = manifest.remote is None and _mostly_wanted(manifest, roles)
        self._epoch: tuple[int, list[list[str]], np.ndarray] | None = None  # number, blocks, position after each
        self._place: tuple[int, int] | None = None  # epoch and number of the block that images are asked for from
        self._next: tuple[int, int] | None = None  # the block after it, which has been asked for
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def at(self, epoch: int, position: int) -> None:
        """Images from this place on are asked for next."""
        if not self._helps:
            return
        if self._epoch is None or self._epoch[0] != epoch:
            found = self._blocks(epoch)
            self._epoch = epoch, found, np.cumsum([sum(self._images[shard] for shard in block) for block in found])
        _, blocks, ends = self._epoch
        place = epoch, int(np.searchsorted(ends, position, side="right"))
        if place == self._place:
            return
        wanted = [] if place == self._next else blocks[place[1]]
        self._place = place
        if place[1] + 1 < len(blocks):
            self._next = epoch, place[1] + 1
            self._want([*wanted, *blocks[place[1] + 1]])
        else:
            self._next = epoch + 1, 0
            self._want([*wanted, *self._blocks(epoch + 1)[0]])

    def close(self) -> None:
        """End the thread, within one read; one whose disk does not answer is left. Safe to call twice, and `at` starts
        another.
        """
        if self._thread is not None:
            self._ended.set()
            self._queue.put(None)
            self._thread.join(PATIENCE)
            self._thread, self._queue, self._ended = None, queue.SimpleQueue(), threading.Event()
        self._place = self._next = None

    def _want(self, shards: Sequence[str]) -> None:
        if sum(self._manifest.shard_files[shard].bytes for shard in shards) > SHARE * free_memory():
            return
        first = self._rank % len(shards)
        for shard in (*shards[first:], *shards[:first]):
            self._queue.put(shard)
        if self._thread is None:
            work = (self._manifest, self._queue, self._ended)
            self._thread = threading.Thread(target=_work, args=work, name="read ahead", daemon=True)
            self._thread.start()


def _work(manifest: Manifest, wanted: queue.SimpleQueue[str | None], ended: threading.Event) -> None:
    buffer = bytearray(CHUNK)
    while (shard := wanted.get()) is not None:
        with suppress(OSError):
            _read(manifest.shard_path(shard), buffer, ended)


def _read(path: Path, buffer: bytearray, ended: threading.Event) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        place = 0
        while not ended.is_set() and (count := os.preadv(handle, [buffer], place)):
            place += count
    finally:
        os.close(handle)


def _mostly_wanted(manifest: Manifest, roles: str | Sequence[str]) -> bool:
    """Whether the images of these roles are most of the bytes of all images in the shards that hold them."""
    columns = manifest.columns
    rows = manifest.rows((roles,) if isinstance(roles, str) else tuple(roles))
    weight = np.bincount(columns.shard, columns.length)  # bytes of images in each shard
    return float(columns.length[rows].sum(dtype=np.float64)) >= WANTED * float(
        weight[np.unique(columns.shard[rows])].sum()
    )


def free_memory() -> int:
    """Bytes that files may fill without pushing out what is in use, by the machine and by the limit of the container;
    0 where the machine does not say.
    """
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        with suppress(OSError, ValueError):  # no cgroup, or "max"
            free = min(free, int(CGROUP.read_text(encoding="ascii")))
        return free
    return 0
