"""What happens in a worker of the DataLoader: a batch is decoded into shared memory, whatever goes wrong."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from distunlearn.common.text import printable
from distunlearn.data.loading.dataset import ImageDataset, Wanted
from distunlearn.data.storage.retry import Counts
from distunlearn.errors import DataError

PLACE = 256  # bytes in which a worker notes its process id and, before it turns to an image, its id
PID = 8  # of them, of the process id
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
GO_ON = "the same command goes on from the last checkpoint"


class Answer(NamedTuple):
    """A batch of `number` crops, with the images that cannot be decoded and the reasons, and what it cost.

    crops: uint8 [number, C, S, S]; None: they lie in shared memory, or there is an error.
    error: the sentence that ends the run.
    """

    crops: Tensor | None
    number: int
    failures: list[tuple[int, str]]
    counts: Counts
    error: str | None = None


class Task(Dataset[Any]):
    """A batch of the images as one message. In a worker every error becomes one, too: it might not survive pickling."""

    def __init__(self, dataset: ImageDataset, slots: Tensor | None) -> None:
        self.dataset = dataset
        self.slots = slots
        self.last = ""  # id that was noted last

    def __getitems__(self, asked: tuple[int, Sequence[Wanted]]) -> Answer:
        place, wanted = asked
        worker = get_worker_info()
        if worker is None or self.slots is None:
            return self._decode(wanted, None)
        try:
            # A batch that is larger than the first of its series comes as the DataLoader sends it.
            number = sum(part.crops for part in wanted)
            return self._decode(wanted, self.slots[place, :number] if number <= self.slots.shape[1] else None)
        except DataError as error:
            text = str(error)
        except BaseException as error:
            text = _told(error, worker.id, self.last)
        return Answer(None, 0, [], self.dataset.reader.counts, text)

    def _decode(self, wanted: Sequence[Wanted], shared: Tensor | None) -> Answer:
        """shared: where the crops go; None: to a tensor of their own."""
        counts = self.dataset.reader.counts = Counts()
        number = sum(part.crops for part in wanted)
        crops = torch.empty((number, *self.dataset.shape), dtype=torch.uint8) if shared is None else shared
        failures = [(image, str(error)) for image, error in self.dataset.fill(wanted, crops)]
        return Answer(crops if shared is None else None, number, failures, counts)


def begin_worker(places: mmap.mmap, number: int) -> None:
    """Before the first batch."""
    for each in IGNORED:  # a job that is stopped signals all its processes; the run itself decides when to end
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)  # they were blocked until now; what came meanwhile is dropped
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start = number * PLACE
    places[start : start + PID] = os.getpid().to_bytes(PID, "little")
    places[start + PID] = 0
    worker = get_worker_info()
    assert worker is not None and isinstance(worker.dataset, Task)
    task = worker.dataset

    def note(sample_id: str) -> None:
        task.last = sample_id
        text = sample_id.encode("utf-8", "replace")[: PLACE - PID - 1]
        places[start + PID : start + PID + len(text) + 1] = text + b"\0"

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
        f"data.workers=0 to see the whole trace; {GO_ON}."
    )


def _end_with_parent() -> None:
    """A DataLoader's worker looks after its parent between two batches only."""
    parent = multiprocessing.parent_process()
    while parent is not None and os.getppid() == parent.pid:
        time.sleep(1)
    os._exit(1)
