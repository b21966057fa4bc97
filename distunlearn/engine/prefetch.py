"""The batches of a phase, on a GPU fetched one step ahead by a thread.

While the GPU works on a step, the thread reads and decodes the next one's images, copies them into page-locked memory
and from there to the GPU on a stream of its own. Which images a step gets is the schedule's alone, and an error of a
read reaches the step that asks for the batch: both are as without the thread. On a CPU there is nobody to overlap with,
and batches are fetched when they are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType

import torch

from distunlearn.data.loading.stream import RoleFeeder
from distunlearn.data.schedule import Batch

__all__ = ["Ahead"]


class Ahead:
    """What a phase's feeders give, draw by draw; used as a context, which waits for the thread.

    Args:
        feeders: by name.
        device: of the encoder.
        last: number of draws of the phase; none beyond it is fetched ahead.
        threaded: fetch ahead; None: where the device is a GPU.
    """

    def __init__(
        self, feeders: Mapping[str, RoleFeeder], device: torch.device, last: int, threaded: bool | None = None
    ) -> None:
        self._feeders, self._device, self._last = feeders, device, last
        wanted = device.type == "cuda" if threaded is None else threaded
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches") if wanted else None
        self._stream = torch.cuda.Stream(device) if wanted and device.type == "cuda" else None
        self._next: tuple[int, Future[dict[str, Batch]]] | None = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def at(self, draw: int) -> dict[str, Batch]:
        """The batches of this draw, images on the GPU if they were fetched ahead.

        Raises:
            DataError, CoverageError: see `RoleFeeder.batch_at`.
        """
        if self._thread is None:
            return self._fetch(draw)
        if self._next is None or self._next[0] != draw:
            self._ask(draw)
        asked, self._next = self._next, None
        batches = asked[1].result()
        if draw + 1 < self._last:
            self._ask(draw + 1)
        for batch in batches.values():
            self._hand_over(batch.images)
        return batches

    def _ask(self, draw: int) -> None:
        assert self._thread is not None
        if self._next is not None:  # of another draw than the one that is wanted
            self._next[1].exception()
        self._next = (draw, self._thread.submit(self._moved, draw))

    def _fetch(self, draw: int) -> dict[str, Batch]:
        return {name: feeder.batch_at(draw) for name, feeder in self._feeders.items()}

    def _moved(self, draw: int) -> dict[str, Batch]:
        """In the thread: the batches, and their images on the GPU once this returns."""
        batches = self._fetch(draw)
        if self._stream is None:
            return batches
        with torch.cuda.stream(self._stream):
            found = {
                name: replace(batch, images=batch.images.pin_memory().to(self._device, non_blocking=True))
                for name, batch in batches.items()
            }
        self._stream.synchronize()  # costs the thread alone; page-locked memory is free for the next batch
        return found

    def _hand_over(self, images: torch.Tensor) -> None:
        """Keep the memory from being given out again before the training's own stream has read it."""
        if self._stream is not None:
            images.record_stream(torch.cuda.current_stream(self._device))
