"""torch's DataLoader over the images of a manifest, for batches whose crops are named in advance.

The DataLoader has the workers and their queues. What this file adds: one block of shared memory for all batches;
page-locked memory where there is a GPU; undecodable images are data and no errors; an error in a worker, whatever it
is, ends the run with one sentence; a worker that is killed or hangs is named with its image; signals for the run do
not end its workers; and workers end with the run.

Workers are forked, decode and crop one batch at a time, never touch a GPU, and know no order and no rank: any number
of them gives the same batches.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import math
import mmap
import multiprocessing
import signal
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from distunlearn.common.text import printable
from distunlearn.data.loading.dataset import ImageDataset, Wanted
from distunlearn.data.loading.worker import GO_ON, IGNORED, PID, PLACE, Answer, Task, begin_worker
from distunlearn.data.sources.decode import find_decoder
from distunlearn.data.storage.retry import Counts
from distunlearn.errors import DataError

PATIENCE = 300.0  # seconds without any progress after which a worker counts as lost
_POLL = 2.0  # seconds between two looks at the workers while one is waited for


class Decoded(NamedTuple):
    """A batch: crops uint8 [n, C, S, S], part by part, image by image, view by view, and images that cannot be decoded.

    failures: their numbers, counted over all parts, each with the reason; their crops are zero.
    """

    crops: Tensor
    failures: list[tuple[int, str]]


class Loader:
    """Batches of crops, in the given order, made ahead by worker processes.

    Args:
        dataset: of the images.
        workers: processes; 0: a batch is decoded in `next`, by the calling process.
        prefetch: batches that each worker is ahead. pin: crops come in page-locked memory.

    Attributes:
        counts: what reading and decoding cost, in all processes.
        serial: of the present series of batches; another one once somebody else has called `start` or `close`.
    """

    def __init__(self, dataset: ImageDataset, workers: int = 0, prefetch: int = 2, pin: bool = False) -> None:
        self.dataset = dataset
        self.workers = workers
        self.prefetch = prefetch
        self.pin = pin
        self.counts = Counts()
        self.serial = 0
        self._sampler = _Sampler()
        self._taken = 0
        self._loader: DataLoader[Any] | None = None
        self._batches: Iterator[Answer] | None = None
        self._processes: list[Any] = []
        self._slots: Tensor | None = None  # uint8 [places, crops, C, S, S], shared with the workers
        self._places = mmap.mmap(-1, max(1, workers) * PLACE)  # shared with the workers

    @property
    def is_idle(self) -> bool:
        """Whether every batch that was asked for has been taken."""
        return self._sampler.ended and self._taken == self._sampler.given

    def start(self, batches: Iterable[Sequence[Wanted]]) -> int:
        """Begin a series of batches, of which `next` gives one after the other; returns its serial.

        Workers of an earlier series are used again if all its batches were taken and none was smaller than the first.
        """
        if not self.is_idle:
            self.close()
        ahead = iter(batches)
        first = list(itertools.islice(ahead, 1))
        crops = sum(part.crops for part in first[0]) if first else 0
        if self.workers and first and (self._slots is None or crops > self._slots.shape[1]):
            self.close()
            self._share(crops)
        series = itertools.chain(first, ahead)
        if self.workers:
            self._hand_out(series)
        else:
            self._sampler.begin(series)
            self._batches = iter(DataLoader(Task(self.dataset, None), **self._options()))
        self._taken = 0
        self.serial += 1
        return self.serial

    def next(self) -> Decoded:
        """The next batch of the series.

        Raises:
            DataError: see `Reader.read`; or a worker was lost or failed, which names it and the image it was at.
        """
        answer = self._receive()
        slot = self._slots[self._taken % len(self._slots)] if self._slots is not None else None
        self._taken += 1
        self.counts.add(answer.counts)
        if answer.error is not None:
            self.close()
            raise DataError(answer.error)
        if answer.crops is not None:
            return Decoded(answer.crops, answer.failures)
        assert slot is not None
        crops = torch.empty((answer.number, *self.dataset.shape), dtype=torch.uint8, pin_memory=self.pin)
        return Decoded(crops.copy_(slot[: answer.number]), answer.failures)

    def here(self, wanted: Sequence[Wanted]) -> Decoded:
        """One batch, decoded by the calling process; the series goes on.

        Raises:
            DataError: see `Reader.read`.
        """
        answer = Task(self.dataset, None).__getitems__((0, wanted))
        self.counts.add(answer.counts)
        assert answer.crops is not None
        return Decoded(answer.crops, answer.failures)

    def close(self, *, kill: bool = False) -> None:
        """End the workers; safe to call twice, and `start` starts new ones. kill: do not wait for them."""
        atexit.unregister(self.close)
        self.dataset.reader.close()
        self.serial += 1
        self._sampler.begin(())
        self._sampler.ended, self._taken = True, 0
        with _deaf_to_children():
            if kill:
                self._kill()
            self._loader = self._batches = None  # the DataLoader ends its threads, and workers when they are at leisure
            self._kill()
        self._processes, self._slots = [], None

    # -- the processes -------------------------------------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        # A generator of its own: a DataLoader draws a seed, and the training's generator must not notice.
        own = torch.Generator()
        return {"batch_sampler": self._sampler, "collate_fn": _same, "generator": own}

    def _share(self, crops: int) -> None:
        """Memory into which the workers decode, one place for each batch that is ahead and one for that being taken.

        Shared memory of a DataLoader's own is new for every batch, whose pages cost 7 % of the decoding, and lies in
        /dev/shm, which containers keep small.
        """
        shape = (self.workers * self.prefetch + 1, max(1, crops), *self.dataset.shape)
        self._slots = torch.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=torch.uint8).view(shape)
        self._sampler.places = shape[0]

    def _hand_out(self, series: Iterator[Sequence[Wanted]]) -> None:
        """Give the series to the workers, which are started where there are none."""
        self._sampler.begin(series)
        if self._loader is None:
            self._fork()
            return
        try:
            self._batches = iter(self._loader)
        except RuntimeError:
            self._require_all()
            images = self._slots.shape[1] if self._slots is not None else 1
            self.close(kill=True)  # they live, and do not answer: nothing is lost with them
            self._share(images)
            self._hand_out(series)

    def _fork(self) -> None:
        self.dataset.reader.close()
        find_decoder()
        before = set(multiprocessing.active_children())
        begin = functools.partial(begin_worker, self._places)
        # A signal that comes before the worker ignores it waits, or it would end the worker.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        try:
            with warnings.catch_warnings(), _own_child_handler():
                # Python warns of forks beside threads: a lock that one of them holds stays locked in the child. The
                # workers use none of torch's thread pools and log nothing.
                warnings.simplefilter("ignore", DeprecationWarning)
                # How many workers there are is the user's to say.
                warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
                self._loader = DataLoader(
                    Task(self.dataset, self._slots), num_workers=self.workers, prefetch_factor=self.prefetch,
                    timeout=_POLL, persistent_workers=True, multiprocessing_context="fork", worker_init_fn=begin,
                    **self._options(),
                )  # fmt: skip
                self._batches = iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self._processes = [p for p in multiprocessing.active_children() if p not in before]
        atexit.register(self.close)  # before multiprocessing's own, which would wait for workers that wait for us

    def _receive(self) -> Answer:
        """Wait for the next batch for as long as its worker gets on."""
        assert self._batches is not None, "start comes first"
        number = self._taken % max(1, self.workers)  # batches go to the workers in turn
        noted, since = self._noted(number), time.monotonic()
        while True:
            try:
                return next(self._batches)
            except (RuntimeError, OSError, EOFError) as error:  # by the DataLoader: those of a worker's images are data
                if not self.workers:
                    raise
                problem = printable(str(error), 300)  # the error itself would keep the DataLoader alive
            self._require_all()
            if "timed out" not in problem:
                wait([process.sentinel for process in self._processes], 1)  # its sockets go before the worker does
                self._require_all()
                self.close(kill=True)
                raise DataError(f"The data workers cannot go on ({problem}); {GO_ON}.")
            if noted != self._noted(number):
                noted, since = self._noted(number), time.monotonic()
            elif time.monotonic() - since >= PATIENCE:
                self._stuck(number)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()  # workers write nothing, so nothing can be torn
        for process in self._processes:
            process.join(5)

    def _require_all(self) -> None:
        """Raises DataError: a worker ended."""
        process = next((process for process in self._processes if process.exitcode is not None), None)
        if process is None:
            return
        numbers = [n for n in range(self.workers) if self._pid(n) == process.pid]
        who, place = (str(numbers[0]), self._place(numbers[0])) if numbers else ("that had not begun", "none yet")
        code = process.exitcode
        self.close(kill=True)
        how = f"with code {code}" if code >= 0 else f"by signal {-code} ({_signal_name(-code)})"
        raise DataError(
            f"Data worker {who} (process {process.pid}) was ended {how} at image {place}; expected it to live as "
            "long as the run; if memory ran out, lower data.workers, data.prefetch or the batch, else look at that "
            f"image; {GO_ON}."
        )

    def _stuck(self, number: int) -> None:
        """Raises DataError: the worker does not get on."""
        pid, place = self._pid(number), self._place(number)
        self.close(kill=True)
        raise DataError(
            f"Data worker {number} (process {pid}) has not got on for {PATIENCE:.0f} s at image {place}; "
            f"check the disk or the network that holds {self.dataset.manifest.place}; {GO_ON}."
        )

    def _noted(self, number: int) -> bytes:
        return self._places[number * PLACE : (number + 1) * PLACE]

    def _pid(self, number: int) -> int:
        return int.from_bytes(self._noted(number)[:PID], "little")

    def _place(self, number: int) -> str:
        """The id that a worker noted last."""
        noted = self._noted(number)[PID:].split(b"\0", 1)[0]
        return repr(printable(noted.decode("utf-8", "replace"))) if noted else "none yet"


class _Sampler:
    """The place in shared memory and the ids of each batch, as a DataLoader asks for them.

    It asks for batch k + places - 1 before it gives batch k: that takes the place of batch k - 1, which has been taken.
    """

    def __init__(self) -> None:
        self.places = 1
        self._batches: Iterator[Sequence[Wanted]] = iter(())
        self.given = 0
        self.ended = True

    def begin(self, batches: Iterable[Sequence[Wanted]]) -> None:
        self._batches, self.given, self.ended = iter(batches), 0, False

    def __iter__(self) -> Iterator[tuple[int, list[Wanted]]]:
        for batch in self._batches:
            place = self.given % self.places
            self.given += 1
            yield place, list(batch)
        self.ended = True


def _same(batch: Answer) -> Answer:
    return batch


@contextlib.contextmanager
def _own_child_handler() -> Iterator[None]:
    """Takes back the handler of a DataLoader for ended children, which would raise in the midst of anything.

    `Loader._receive` looks after the workers instead.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


@contextlib.contextmanager
def _deaf_to_children() -> Iterator[None]:
    """While workers are ended: a handler that another DataLoader has set would take that for a failure."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
