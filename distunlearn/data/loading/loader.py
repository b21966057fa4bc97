"""torch's DataLoader over the images of a manifest, for batches whose ids are given in advance.

The DataLoader has the workers, their queues, shared memory and page-locked memory. What this file adds: undecodable
images are data and no errors; an error in a worker, whatever it is, ends the run with one sentence; a worker that is
killed or hangs is named with its image; signals for the run do not end its workers; and workers end with the run.

Workers are forked, decode one batch at a time, never touch a GPU, and know no order, epoch or rank: any number of them
gives the same batches.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import math
import mmap
import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from distunlearn.common.text import printable
from distunlearn.data.loading.dataset import ImageDataset
from distunlearn.data.sources.decode import find_decoder
from distunlearn.data.storage.retry import Counts
from distunlearn.errors import ConfigError, DataError

__all__ = ["Decoded", "Loader"]

PATIENCE = 300.0  # seconds without any progress after which a worker counts as lost
SHARED = "/dev/shm"
_POLL = 2.0  # seconds between two looks at the workers while one is waited for
_PLACE = 256  # bytes in which a worker notes its process id and, before it turns to an image, its id
_PID = 8  # of them, of the process id
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_GO_ON = "the same command goes on from the last checkpoint"


class Decoded(NamedTuple):
    """A batch: images uint8 [n, C, S, S]; rows that cannot be decoded, which are zero, each with the reason; cost.

    error: the sentence that ends the run; there are no images then.
    """

    images: Tensor
    failures: list[tuple[int, str]]
    counts: Counts
    error: str | None = None


class Loader:
    """Batches of given ids, in the given order, decoded ahead by worker processes.

    Args:
        dataset: of the images.
        workers: processes; 0: a batch is decoded in `next`, by the calling process.
        prefetch: batches that each worker is ahead. pin: images come in page-locked memory.

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
        self._batches: Iterator[Decoded] | None = None
        self._processes: list[Any] = []
        self._places = mmap.mmap(-1, max(1, workers) * _PLACE)  # shared with the workers

    @property
    def is_idle(self) -> bool:
        """Whether every batch that was asked for has been taken."""
        return self._sampler.ended and self._taken == self._sampler.given

    def start(self, batches: Iterable[Sequence[str]]) -> int:
        """Begin a series of batches, of which `next` gives one after the other; returns its serial.

        Workers of an earlier series are used again if all its batches were taken.

        Raises:
            ConfigError: the shared memory of this machine does not hold the batches that are decoded ahead.
        """
        if not self.is_idle:
            self.close()
        ahead = iter(batches)
        first = list(itertools.islice(ahead, 1))
        if self.workers and first:
            self._require_shared_memory(len(first[0]))
        series = itertools.chain(first, ahead)
        if self.workers:
            self._hand_out(series)
        else:
            self._sampler.begin(series)
            self._batches = iter(DataLoader(_Task(self.dataset), **self._options()))
        self._taken = 0
        self.serial += 1
        return self.serial

    def next(self) -> Decoded:
        """The next batch of the series.

        Raises:
            DataError: see `Reader.read`; or a worker was lost or failed, which names it and the image it was at.
        """
        found = self._receive()
        self._taken += 1
        self.counts.add(found.counts)
        if found.error is not None:
            self.close()
            raise DataError(found.error)
        return found

    def here(self, ids: Sequence[str]) -> Decoded:
        """One batch, decoded by the calling process; the series goes on.

        Raises:
            DataError: see `Reader.read`.
        """
        found = _Task(self.dataset).__getitems__(ids)
        self.counts.add(found.counts)
        return found

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
        self._processes = []

    # -- the processes -------------------------------------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        # A generator of its own: a DataLoader draws a seed, and the training's generator must not notice.
        own = torch.Generator()
        return {"batch_sampler": self._sampler, "collate_fn": _same, "pin_memory": self.pin, "generator": own}

    def _hand_out(self, series: Iterator[Sequence[str]]) -> None:
        """Give the series to the workers, which are started where there are none."""
        self._sampler.begin(series)
        if self._loader is None:
            self._fork()
            return
        try:
            self._batches = iter(self._loader)
        except RuntimeError:
            self._require_all()
            self.close(kill=True)  # they live, and do not answer: nothing is lost with them
            self._hand_out(series)

    def _fork(self) -> None:
        self.dataset.reader.close()
        find_decoder()
        before = set(multiprocessing.active_children())
        begin = functools.partial(_begin, self._places)
        # A signal that comes before the worker ignores it waits, or it would end the worker.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
        try:
            with warnings.catch_warnings(), _own_child_handler():
                # Python warns of forks beside threads: a lock that one of them holds stays locked in the child. The
                # workers use none of torch's thread pools and log nothing.
                warnings.simplefilter("ignore", DeprecationWarning)
                # How many workers there are is the user's to say.
                warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
                self._loader = DataLoader(
                    _Task(self.dataset), num_workers=self.workers, prefetch_factor=self.prefetch, timeout=_POLL,
                    persistent_workers=True, multiprocessing_context="fork", worker_init_fn=begin, **self._options(),
                )  # fmt: skip
                self._batches = iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self._processes = [p for p in multiprocessing.active_children() if p not in before]
        atexit.register(self.close)  # before multiprocessing's own, which would wait for workers that wait for us

    def _receive(self) -> Decoded:
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
                raise DataError(f"The data workers cannot go on ({problem}); {_GO_ON}.")
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
            f"image; {_GO_ON}."
        )

    def _stuck(self, number: int) -> None:
        """Raises DataError: the worker does not get on."""
        pid, place = self._pid(number), self._place(number)
        self.close(kill=True)
        raise DataError(
            f"Data worker {number} (process {pid}) has not got on for {PATIENCE:.0f} s at image {place}; "
            f"check the disk or the network that holds {self.dataset.manifest.place}; {_GO_ON}."
        )

    def _noted(self, number: int) -> bytes:
        return self._places[number * _PLACE : (number + 1) * _PLACE]

    def _pid(self, number: int) -> int:
        return int.from_bytes(self._noted(number)[:_PID], "little")

    def _place(self, number: int) -> str:
        """The id that a worker noted last."""
        noted = self._noted(number)[_PID:].split(b"\0", 1)[0]
        return repr(printable(noted.decode("utf-8", "replace"))) if noted else "none yet"

    def _require_shared_memory(self, images: int) -> None:
        channels, size, _ = self.dataset.shape
        needed = (self.workers * self.prefetch + 1) * images * channels * size * size
        try:
            found = os.statvfs(SHARED)
        except OSError:
            return
        free = found.f_bavail * found.f_frsize
        if needed > free:
            raise ConfigError(
                f"data.workers={self.workers} and data.prefetch={self.prefetch} keep {needed >> 20} MiB of images in "
                f"shared memory, and {SHARED} has {free >> 20} MiB free; lower one of them, or give the container more "
                "(docker run --shm-size)."
            )


class _Sampler:
    """The ids of each batch, as a DataLoader asks for them."""

    def __init__(self) -> None:
        self._batches: Iterator[Sequence[str]] = iter(())
        self.given = 0
        self.ended = True

    def begin(self, batches: Iterable[Sequence[str]]) -> None:
        self._batches, self.given, self.ended = iter(batches), 0, False

    def __iter__(self) -> Iterator[list[str]]:
        for batch in self._batches:
            self.given += 1
            yield list(batch)
        self.ended = True


class _Task(Dataset[Any]):
    """A batch of the images as one message. In a worker every error becomes one, too: it might not survive pickling."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset
        self.last = ""  # id that was noted last

    def __getitems__(self, ids: Sequence[str]) -> Decoded:
        worker = get_worker_info()
        if worker is None:
            return self._decode(ids)
        try:
            return self._decode(ids)
        except DataError as error:
            text = str(error)
        except BaseException as error:
            text = _told(error, worker.id, self.last)
        return Decoded(torch.empty(0), [], self.dataset.reader.counts, text)

    def _decode(self, ids: Sequence[str]) -> Decoded:
        counts = self.dataset.reader.counts = Counts()
        empty = _shared if get_worker_info() else torch.empty
        found = empty((len(ids), *self.dataset.shape), dtype=torch.uint8)
        failures = self.dataset.fill(ids, found)
        return Decoded(found, [(row, str(error)) for row, error in failures], counts)


def _shared(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in shared memory, from which the training process takes it as it is; as torch's `default_collate`."""
    count = math.prod(shape)
    storage = torch.UntypedStorage._new_shared(max(1, count * dtype.itemsize))
    return torch.empty(0, dtype=dtype).set_(storage)[:count].view(shape)


def _same(batch: Decoded) -> Decoded:
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


# -- in the worker -----------------------------------------------------------------------------------------------


def _begin(places: mmap.mmap, number: int) -> None:
    """Before the first batch."""
    for each in _IGNORED:  # a job that is stopped signals all its processes; the run itself decides when to end
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)  # they were blocked until now; what came meanwhile is dropped
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start = number * _PLACE
    places[start : start + _PID] = os.getpid().to_bytes(_PID, "little")
    places[start + _PID] = 0
    worker = get_worker_info()
    assert worker is not None and isinstance(worker.dataset, _Task)
    task = worker.dataset

    def note(sample_id: str) -> None:
        task.last = sample_id
        text = sample_id.encode("utf-8", "replace")[: _PLACE - _PID - 1]
        places[start + _PID : start + _PID + len(text) + 1] = text + b"\0"

    task.dataset.note = note


def _told(error: BaseException, number: int, last: str) -> str:
    """One sentence about an error that nobody foresaw."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    try:
        text = printable(str(error), 300)
    except Exception:  # an exception may fail at being printed, too
        text = "no readable message"
    return (
        f"Data worker {number} (process {os.getpid()}) failed at image {printable(last)!r} "
        f"({type(error).__name__}: {text}; {os.path.basename(where.filename)}, line {where.lineno}); run with "
        f"data.workers=0 to see the whole trace; {_GO_ON}."
    )


def _end_with_parent() -> None:
    """A DataLoader's worker looks after its parent between two batches only."""
    parent = multiprocessing.parent_process()
    while parent is not None and os.getppid() == parent.pid:
        time.sleep(1)
    os._exit(1)
