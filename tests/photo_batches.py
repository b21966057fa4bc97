"""Batches of photos in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distunlearn.data.schedule import Batch
from distunlearn.data.views.crops import Cut, Cutter

PHOTOS: dict[str, Tensor] = {}  # by id, uint8 [C, S, S]: batches are joined, and any of them may be asked for crops


def photo_batch(ids: list[str], photos: Tensor, epochs: np.ndarray, labels: Tensor) -> Batch:
    """photos: uint8 [n, C, S, S]."""
    PHOTOS.update(zip(ids, photos, strict=True))
    return Batch(ids, epochs, labels, photo_cut(Cutter(photos.shape[-1])))


def photo_cut(cutter: Cutter) -> Cut:
    """Crops of PHOTOS."""

    def cut(ids: Sequence[str], epochs: np.ndarray, views: Sequence[int]) -> Tensor:
        channels = PHOTOS[ids[0]].shape[0] if ids else 1
        out = torch.empty((len(ids), len(views), channels, cutter.size, cutter.size), dtype=torch.uint8)
        crops = cutter.crops(ids, epochs, views)
        for row, sample_id in enumerate(ids):
            crops.crop(PHOTOS[sample_id], row, out[row])
        return out

    return cut
