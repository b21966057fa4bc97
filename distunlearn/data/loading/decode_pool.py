"""Reading and decoding ahead in worker processes, or in the calling process where there are none.

The caller says which images it will want, in pieces of at most PIECE; which worker does a piece and when it ends
decides nothing about the result, so any number of workers gives the same tensors. Workers know no order, no epoch and
no rank.

Why not torch's DataLoader: its results pass through /dev/shm, which containers keep small, in one allocation per
batch, and each loader has workers of its own. Here all streams of a process share the workers, and a fixed block of
anonymous shared memory into which workers decode bounds what is held. Why processes: threads were no faster
(benchmarks/dataloading.py), and would take turns with the training for Python's lock.

Workers are forked, never touch a GPU, take no signal that is meant for the run, and end with the process that
forked them.
"""

from __future__ import annotations

import atexit
import mmap
import multiprocessing
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import Tensor

from distunlearn.common.text import printable
from distunlearn.data.loading.shard_reader import Reader
from distunlearn.data.manifest.manifest import Manifest, Sample
from distunlearn.data.sources.decode import decode_square, find_decoder
from distunlearn.data.storage.retry import Counts
from distunlearn.errors import DataError, UndecodableError

__all__ = ["PIECE", "Decoder", "Piece", "Pool"]

PIECE = 32  # most images that are asked for at once
PATIENCE = 300.0  # seconds without an answer after which a worker counts as lost
_QUEUE = 16  # most pieces that wait for one worker: what its connection holds without blocking
_ID_BYTES = 256  # of the id that a worker notes before it turns to an image
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_GO_ON = "the same command goes on from the last checkpoint"

Failures = list[tuple[int, str]]  # rows that cannot be decoded, with the sentence that says why


class Decoder:
    """Samples -> uint8 images [C, S, S], written where the caller wants them.

    Args:
        image_size: S, pixels. channels: C, 1 or 3. max_pixels: larger images are refused before decoding.
        mode: see `decode_square`. retries: see `Reader`.
    """

    def __init__(
        self, manifest: Manifest, image_size: int, channels: int, max_pixels: int, mode: str = "exact", retries: int = 4
    ) -> None:
        self.shape = (channels, image_size, image_size)
        self.max_pixels = max_pixels
        self.mode = mode
        self.reader = Reader(manifest, retries)

    def fill(self, samples: Sequence[Sample], out: Tensor, note: Callable[[str], None]) -> Failures:
        """Decode sample i into out[i]; rows that fail are returned and left as they were.

        note: told each id before its image is decoded, and the first before all are read.

        Raises:
            DataError: see `Reader.read`.
        """
        failures: Failures = []
        channels, size, _ = self.shape
        if samples:
            note(samples[0].id)
        for row, (sample, data) in enumerate(zip(samples, self.reader.read(samples), strict=True)):
            note(sample.id)
            try:
                out[row] = decode_square(data, sample.id, self.max_pixels, channels, size, self.mode)
            except UndecodableError as error:
                failures.append((row, str(error)))
            self.reader.counts.images += 1
        return failures


@dataclass(eq=False)
class Piece:
    """Images asked for together. Without workers they are decoded when they are taken."""

    samples: list[Sample]
    serial: int = -1
    worker: int = -1
    slot: int = -1
    generation: int = -1  # of the worker processes that were asked
    failures: Failures | None = None  # None: not there yet
    abandoned: bool = False


@dataclass
class _Worker:
    process: Any
    connection: Connection
    asked: int = 0  # images it was asked for and has not answered
    waiting: dict[int, Piece] = field(default_factory=dict)


class Pool:
    """Pieces in, images out, in whatever order the caller takes them.

    Args:
        workers: processes; 0: everything happens in `take`.

    Attributes:
        counts: what reading and decoding cost, in all processes.
    """

    def __init__(self, decoder: Decoder, workers: int) -> None:
        self.decoder = decoder
        self.num_workers = workers
        self.spare = max(1, 2 * workers)  # outstanding pieces that need no reservation, for one caller at a time
        self.capacity = self.spare
        self._own = Counts()
        self._workers: list[_Worker] = []
        self._slots: Tensor | None = None
        self._places: mmap.mmap | None = None
        self._free: list[int] = []
        self._serial = 0
        self._generation = 0

    @property
    def counts(self) -> Counts:
        if not self.num_workers:
            return self.decoder.reader.counts
        return self._own

    def reserve(self, pieces: int) -> None:
        """Make room for so many more outstanding pieces, or fewer (< 0); what is outstanding may be done again."""
        self.capacity += pieces
        if self._slots is not None and self.capacity > len(self._slots):
            self.close()

    def submit(self, samples: Sequence[Sample]) -> Piece:
        """Ask for at most PIECE samples; `take` or `abandon` has to follow.

        Raises:
            DataError: a worker was lost.
        """
        assert len(samples) <= PIECE, len(samples)
        piece = Piece(list(samples))
        if self.num_workers and samples:
            self._send(piece)
        return piece

    def take(self, piece: Piece, out: Tensor) -> Failures:
        """Write the images of a piece to out [n, C, S, S] and return the rows that cannot be decoded.

        Raises:
            DataError: see `Reader.read`; or a worker was lost or failed, which names it and the image it was at.
        """
        if not self.num_workers or not piece.samples:
            return self.decoder.fill(piece.samples, out, _nothing)
        if piece.generation != self._generation:  # it was lost when the pool grew
            self._send(piece)
        while piece.failures is None:
            self._receive(self._workers[piece.worker], PATIENCE)
        assert self._slots is not None and piece.slot >= 0, "a piece is taken once"
        out.copy_(self._slots[piece.slot, : len(piece.samples)])
        self._release(piece)
        return piece.failures

    def abandon(self, pieces: Sequence[Piece]) -> None:
        """Give up pieces that nobody will take."""
        for piece in pieces:
            if piece.generation == self._generation and piece.failures is not None and piece.slot >= 0:
                self._release(piece)
            piece.abandoned = True

    def close(self) -> None:
        """End the workers; safe to call twice. The next piece starts new ones."""
        atexit.unregister(self.close)
        self.decoder.reader.close()
        for worker in self._workers:
            worker.process.kill()  # workers write nothing, so nothing can be torn
        for worker in self._workers:
            worker.process.join(5)
            worker.connection.close()
        self._workers, self._slots, self._free = [], None, []
        self._generation += 1

    # -- the processes -------------------------------------------------------------------------------------------

    def _start(self) -> None:
        slots = self.capacity
        channels, size, _ = self.decoder.shape
        # Anonymous memory is not limited by /dev/shm, and a page costs nothing until it is written.
        block = mmap.mmap(-1, slots * PIECE * channels * size * size)
        self._slots = torch.frombuffer(block, dtype=torch.uint8).view(slots, PIECE, channels, size, size)
        self._places = mmap.mmap(-1, self.num_workers * _ID_BYTES)
        self._free = list(range(slots))
        self.decoder.reader.close()
        find_decoder()
        context = multiprocessing.get_context("fork")
        for number in range(self.num_workers):
            ours, theirs = context.Pipe()
            others = [worker.connection for worker in self._workers] + [ours]
            process = context.Process(
                target=_serve,
                args=(theirs, others, self.decoder, self._slots, self._places, number),
                name=f"data worker {number}",
                daemon=True,
            )
            with warnings.catch_warnings():
                # Python warns of forks beside threads: a lock that one of them holds stays locked in the child. The
                # workers use none of torch's thread pools and log nothing.
                warnings.simplefilter("ignore", DeprecationWarning)
                # A signal that comes before the worker ignores it waits, or it would end the worker.
                mask = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
                try:
                    process.start()
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
            self._workers.append(_Worker(process, ours))
        atexit.register(self.close)  # before multiprocessing's own, which would wait for workers that wait for us

    def _release(self, piece: Piece) -> None:
        self._free.append(piece.slot)
        piece.slot = -1

    def _send(self, piece: Piece) -> None:
        if not self._workers:
            self._start()
        for worker in self._workers:
            while worker.connection.poll():
                self._receive(worker, 0)
        while not self._free:
            self._receive(self._oldest(), PATIENCE)
        number = min(range(self.num_workers), key=lambda n: self._workers[n].asked)
        worker = self._workers[number]
        while len(worker.waiting) >= _QUEUE:
            self._receive(worker, PATIENCE)
        piece.serial, piece.worker, piece.slot, piece.failures = self._serial, number, self._free.pop(), None
        piece.generation = self._generation
        self._serial += 1
        worker.waiting[piece.serial] = piece
        worker.asked += len(piece.samples)
        try:
            worker.connection.send((piece.serial, piece.slot, piece.samples))
        except (BrokenPipeError, ConnectionResetError):
            self._lost(number)

    def _oldest(self) -> _Worker:
        busy = [worker for worker in self._workers if worker.waiting]
        assert busy, "more pieces were taken than reserved: take or abandon some first"
        return min(busy, key=lambda worker: min(worker.waiting))

    def _receive(self, worker: _Worker, patience: float) -> None:
        """Wait for one answer of this worker."""
        number = self._workers.index(worker)
        if not wait([worker.connection, worker.process.sentinel], patience):
            self._stuck(number, patience)
        try:
            if not worker.connection.poll():
                raise EOFError
            serial, failures, counts, error = worker.connection.recv()
        except (EOFError, OSError):
            self._lost(number)
        self._own.add(counts)
        piece = worker.waiting.pop(serial)
        worker.asked -= len(piece.samples)
        piece.failures = failures
        if piece.abandoned:
            self._release(piece)
        elif error is not None:
            self.close()
            raise DataError(error)

    def _lost(self, number: int) -> None:
        """Raises DataError: the worker ended."""
        process, place = self._workers[number].process, self._place(number)
        process.join(5)
        code = process.exitcode
        self.close()
        how = f"with code {code}" if code is None or code >= 0 else f"by signal {-code} ({_signal_name(-code)})"
        raise DataError(
            f"Data worker {number} (process {process.pid}) was ended {how} at image {place}; expected it to live as "
            "long as the run; if memory ran out, lower data.workers, data.prefetch or the batch, else look at that "
            f"image; {_GO_ON}."
        )

    def _stuck(self, number: int, patience: float) -> None:
        """Raises DataError: the worker does not answer."""
        process, place = self._workers[number].process, self._place(number)
        self.close()
        raise DataError(
            f"Data worker {number} (process {process.pid}) has not answered for {patience:.0f} s at image {place}; "
            f"check the disk or the network that holds {self.decoder.reader.manifest.place}; {_GO_ON}."
        )

    def _place(self, number: int) -> str:
        """The id that a worker noted last."""
        assert self._places is not None
        noted = self._places[number * _ID_BYTES : (number + 1) * _ID_BYTES].split(b"\0", 1)[0]
        return repr(printable(noted.decode("utf-8", "replace"))) if noted else "none yet"


def _nothing(sample_id: str) -> None:
    pass


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


# -- in the worker -----------------------------------------------------------------------------------------------


def _serve(
    connection: Connection, others: list[Connection], decoder: Decoder, slots: Tensor, places: mmap.mmap, number: int
) -> None:
    """Answer pieces until the other side goes away."""
    for each in _IGNORED:  # a job that is stopped signals all its processes; the run itself decides when to end
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)  # they were blocked until now; what came meanwhile is dropped
    for other in others:  # or a worker would keep its siblings' connections open after the run has gone
        other.close()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)

    last = ""

    def note(sample_id: str) -> None:
        nonlocal last
        last = sample_id
        text = sample_id.encode("utf-8", "replace")[: _ID_BYTES - 1]
        places[number * _ID_BYTES : number * _ID_BYTES + len(text) + 1] = text + b"\0"

    while True:
        try:
            serial, slot, samples = connection.recv()
        except (EOFError, OSError):
            return
        decoder.reader.counts = Counts()
        failures: Failures = []
        error = None
        try:
            failures = decoder.fill(samples, slots[slot], note)
        except DataError as found:
            error = str(found)
        except BaseException as found:  # whatever it is, it has to reach the run as text: it may not survive pickling
            error = _told(found, number, last)
        try:
            connection.send((serial, failures, decoder.reader.counts, error))
        except OSError:
            return


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
    """The sentinel alone would not do: later siblings hold its other end open, too."""
    parent = multiprocessing.parent_process()
    while parent is not None and os.getppid() == parent.pid and not wait([parent.sentinel], 1):
        pass
    os._exit(1)
