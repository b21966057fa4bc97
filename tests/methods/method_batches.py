"""Images of every role for methods, and views in double precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from photo_batches import photo_batch

from distunlearn.data.schedule import Batch
from distunlearn.objectives import forward

SIZES = {"retain": 12, "forget": 6, "third_party": 8, "calibration": 10}


def batch(role: str, count: int | None = None) -> Batch:
    """The same images whenever asked."""
    count = count or SIZES[role]
    generator = torch.Generator().manual_seed(sum(map(ord, role)))
    return photo_batch(
        ids=[f"{role}-{i}" for i in range(count)],
        photos=torch.randint(0, 256, (count, 1, 16, 16), generator=generator, dtype=torch.uint8),
        epochs=np.zeros(count, dtype=np.int64),
        labels=torch.arange(count) % 3,
    )


def darker(found: Batch, times: int) -> Batch:
    """The same images with pixels that many times smaller."""
    return replace(found, cut=lambda *wanted: found.cut(*wanted) // times, crops=None)


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Views as double precision numbers."""
    right = forward.make_view
    with mock.patch.object(forward, "make_view", lambda *args, **how: right(*args, **how).double()):
        yield
