"""The same function over many jobs in several processes, results in the order of the jobs."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from distunlearn.errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")

_LARGE = 20_000  # images from which starting processes pays
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_SHARED: list[Any] = []  # in a worker: what `run_jobs` was given as `shared`


def num_workers(asked: int, images: int, jobs: int) -> int:
    """Processes to use. asked: 0 leaves the choice to this function."""
    chosen = asked or (len(os.sched_getaffinity(0)) if images >= _LARGE else 1)
    return max(1, min(chosen, jobs))


def run_jobs(work: Callable[[Any, Job], Result], shared: Any, jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    """Yield work(shared, job) for each job, in order. One worker: in this process.

    work, shared, jobs and results must be picklable; workers start afresh, so the main module must be importable.

    Raises:
        DataError: a worker died. What `work` raises is raised here.
    """
    if workers == 1:
        for job in jobs:
            yield work(shared, job)
        return
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(shared, os.getpid())
    )
    waiting: deque[Future] = deque()
    rest = iter(jobs)
    try:
        waiting.extend(executor.submit(_call, work, job) for job in islice(rest, 4 * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(executor.submit(_call, work, job) for job in islice(rest, 1))
    except BrokenProcessPool as error:
        raise DataError(
            "A process that prepares shards was killed, perhaps for want of memory; lower data.prepare_workers and "
            "give the same command again: it goes on from the shards that are whole."
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _begin(shared: Any, parent: int) -> None:
    """A worker dies with its parent and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    _SHARED.append(shared)


def _call(work: Callable[[Any, Job], Result], job: Job) -> Result:
    return work(_SHARED[0], job)
