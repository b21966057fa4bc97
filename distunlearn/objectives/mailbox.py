"""Small exchanges between the processes of one machine, through memory that they share.

gloo sends even a few bytes through a socket and other threads, and a process that waits for them sleeps. That cost a
millisecond or two an exchange where it was measured (`benchmarks/exchanges.py`), and a convolutional network with batch
statistics over all ranks exchanges some forty times a step. Here a process writes its part where the others read it and
looks again and again, for `SPIN` seconds, before it begins to sleep.

Every rank has two slots, used in turn. It writes slot `count % 2`, then its own counter; the others read once they see
the counter. A slot is written again only after the exchange in between, for which every rank had to have read it.
That needs stores to be seen in the order in which they were made, which x86-64 promises and other processors do not:
there, and wherever the ranks do not all share a machine, everything goes through the process group as before.

A rank that ends is noticed by the lock that it held on its byte of the file, which the kernel takes away with it. The
file has no name any more once all ranks have opened it, so nothing is left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import platform
import secrets
import sys
import tempfile
import time

import torch
import torch.distributed as dist
from torch import Tensor

from distunlearn.errors import RankLostError

__all__ = ["Mailbox", "open_mailbox", "usable_cores"]

CAPACITY = 1 << 22  # bytes of a slot, at most; more goes through the process group
ALL_SLOTS = 1 << 25  # bytes of all slots together: containers give /dev/shm 64 MiB
LINE = 128  # bytes for a rank's counter and the labels of both slots: no two ranks write to one cache line
LABEL = 56  # bytes of a label
SPIN = 0.005  # seconds to look for the others without sleeping
NAP = 0.02  # seconds of sleep between two looks, at most; a hundredth of the time waited before
LONG = 0.1  # seconds of waiting from which on the others' locks are looked at
FOLDER = "/dev/shm"


class Mailbox:
    """One rank's end. All ranks call `gather` equally often, for the same things, from one thread at a time.

    Args:
        file: descriptor of the shared file, which the mailbox closes in the end.
        patience: seconds to wait for the others before `dist.DistNetworkError`.
    """

    def __init__(self, file: int, rank: int, world: int, patience: float) -> None:
        self.file, self.rank, self.world, self.patience = file, rank, world, patience
        self.count = 0  # exchanges that this rank has begun
        self.is_mine = True
        os.register_at_fork(after_in_child=self._disown)
        self._shared = mmap.mmap(file, size(world))
        self._numbers = memoryview(self._shared).cast("q")
        slots = torch.frombuffer(self._shared, dtype=torch.uint8, offset=world * LINE)
        self.capacity = capacity(world)
        self._slots = slots.view(2, world, self.capacity)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)

    def takes(self, x: Tensor) -> bool:
        """True if `x` is small enough, and on the CPU, and this process is the rank itself, not a fork of it."""
        return self.is_mine and x.device.type == "cpu" and 0 < x.numel() * x.element_size() <= self.capacity

    def _disown(self) -> None:
        self.is_mine = False

    @torch.compiler.disable
    def gather(self, x: Tensor, what: str = "gather") -> Tensor:
        """The `x` of all ranks, [W, *x.shape] in rank order. Collective; `takes(x)` must hold.

        what: a short name, by which the ranks notice that they are not at the same exchange; so do type and shape.

        Raises:
            dist.DistNetworkError: a rank has ended, or did not come within `patience`.
            RankLostError: the ranks exchange different things; one of them left an exchange out.
        """
        part = x.detach().contiguous().view(-1).view(torch.uint8)
        label = f"{what} {str(x.dtype)[6:]} {tuple(x.shape)}".encode()[:LABEL].ljust(LABEL)
        self.count += 1
        slots = self._slots[self.count % 2]
        slots[self.rank, : len(part)] = part
        self._shared[self._label(self.rank)] = label
        self._numbers[self.rank * LINE // 8] = self.count  # last: what it announces is complete
        for rank in range(self.world):
            if rank != self.rank:
                self._await(rank)
        labels = [self._shared[self._label(rank)] for rank in range(self.world)]
        if labels != [label] * self.world:
            told = ", ".join(found.decode().rstrip() for found in labels)
            raise RankLostError(
                f"the ranks exchange different things, in rank order: {told}; one of them left an exchange out; the "
                "same command goes on from the last checkpoint."
            )
        return slots[:, : len(part)].contiguous().view(x.dtype).view(self.world, *x.shape)

    def _label(self, rank: int) -> slice:
        """Where `rank` says what it put into the slot of this exchange."""
        start = rank * LINE + 8 + self.count % 2 * LABEL
        return slice(start, start + LABEL)

    def _await(self, rank: int) -> None:
        numbers, place, count = self._numbers, rank * LINE // 8, self.count
        if numbers[place] >= count:
            return
        start = time.perf_counter()
        while numbers[place] < count:
            waited = time.perf_counter() - start
            if waited < SPIN:
                os.sched_yield()  # to a process or a thread of this one that has something to do, if there is one
                continue
            if waited > LONG:
                self._look_after(rank, waited)
            time.sleep(min(NAP, waited / 100))

    def _look_after(self, rank: int, waited: float) -> None:
        """Raise if `rank` is gone. One that has answered and then ended is not in the way."""
        ended = False
        with contextlib.suppress(OSError):  # its lock is its own: it lives
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, rank)
            ended = True
        if ended and self._numbers[rank * LINE // 8] < self.count:
            raise dist.DistNetworkError(f"rank {rank} has ended; rank {self.rank} waited for it")
        if waited > self.patience:
            raise dist.DistNetworkError(f"rank {rank} did not come within {self.patience:.0f} s")

    def close(self) -> None:
        """Give the memory and the file back. The other ranks then see this one as ended."""
        self._slots = torch.empty(0)
        self._numbers.release()
        with contextlib.suppress(BufferError):  # a tensor still looks at it: it goes with the process
            self._shared.close()
        os.close(self.file)


def capacity(world: int) -> int:
    """Bytes of a slot: `CAPACITY`, or less where that would be too much for so many ranks."""
    return min(CAPACITY, ALL_SLOTS // (2 * world) // LINE * LINE)


def size(world: int) -> int:
    """Bytes of the shared file."""
    return world * (LINE + 2 * capacity(world))


def open_mailbox(patience: float) -> Mailbox | None:
    """The mailbox of the default process group; None where its ranks cannot have one. Collective.

    None with one rank, with a group that is not gloo's, on other processors than x86-64, over several machines or
    containers, with more ranks than cores (one that spins would take the core from one that computes), and where the
    shared memory has no room.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if world == 1 or dist.get_backend() != "gloo":
        return None
    cores: list[set[int]] = [set()] * world
    dist.all_gather_object(cores, usable_cores())
    fits = len(set().union(*cores)) >= world
    told = [_create(world) if rank == 0 and fits else None]
    dist.broadcast_object_list(told, src=0)
    file = _opened(told[0], world)
    mailbox = None if file is None else _joined(file, rank, world, patience)
    agreed = torch.tensor([int(mailbox is not None)])
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)  # also: all have opened it
    if rank == 0 and told[0] is not None:
        os.unlink(told[0][0])
    if agreed or mailbox is None:
        return mailbox
    mailbox.close()
    return None


def _joined(file: int, rank: int, world: int, patience: float) -> Mailbox | None:
    """None where the system refuses the mapping or the lock: all ranks hear of it, and do without."""
    try:
        return Mailbox(file, rank, world, patience)
    except OSError:
        os.close(file)
        return None


def usable_cores() -> set[int]:
    """The cores that this process may use; none where there can be no mailbox."""
    return os.sched_getaffinity(0) if sys.platform == "linux" and platform.machine() == "x86_64" else set()


def _create(world: int) -> tuple[str, bytes] | None:
    """A new shared file with room for all: its path, and the token in its last bytes. None: not here."""
    token = secrets.token_bytes(16)
    try:
        file, path = tempfile.mkstemp(prefix="distunlearn-", dir=FOLDER)
    except OSError:
        return None
    try:
        os.posix_fallocate(file, 0, size(world))  # a page that cannot be had later would kill the process
        os.pwrite(file, token, size(world) - len(token))
    except OSError:
        os.unlink(path)
        return None
    finally:
        os.close(file)
    return path, token


def _opened(told: tuple[str, bytes] | None, world: int) -> int | None:
    """The file that rank 0 spoke of, opened; None if it is not to be found here (another machine, a container)."""
    if told is None:
        return None
    path, token = told
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if os.pread(file, len(token), size(world) - len(token)) == token:
            return file
        os.close(file)
    return None
