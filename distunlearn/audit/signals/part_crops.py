"""Responses of an image to its own small crops, for the PartCrop attack (formulas in `attacks/part_crop.py`).

Feature maps are those of the last stage that has at least MIN_PLACES places: the patch tokens of a ViT's last block,
or for a ResNet, whose last map may be a single place for small images, an earlier stage.

Shapes: n = images, N = crops, L = places, E = channels of the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distunlearn.common.random import VIEW_EPOCHS
from distunlearn.data.views.draws import uniforms

MIN_PLACES = 4
SCALE = (0.08, 0.2)  # share of the image's area that a crop keeps, as in the paper
CROP_EPOCH = VIEW_EPOCHS["part crops"][0]
CROPS_AT_ONCE = 16


def part_responses(backbone: nn.Module, images: Tensor, ids: Sequence[str], crops: int, seed: int) -> np.ndarray:
    """float32 [n, 2 N], both kinds of divergence sorted; [n, 0] without crops.

    Args:
        backbone: in evaluation mode, with `forward_intermediates` as timm has it. images: float [n, C, S, S].

    Raises:
        ValueError: no stage of the backbone has MIN_PLACES places.
    """
    if not crops:
        return np.zeros((len(images), 0), dtype=np.float32)
    places = _maps(backbone, images)  # [n, E, L]
    generator = torch.Generator().manual_seed(seed % 2**63)
    bell = torch.randn(places.shape[-1], generator=generator).to(places).softmax(0)
    found = []
    for start in range(0, crops, CROPS_AT_ONCE):
        batch = range(start, min(start + CROPS_AT_ONCE, crops))
        cut = torch.cat([_cut(images, crop_boxes(seed, ids, k)) for k in batch])
        parts = _maps(backbone, cut).mean(-1).view(len(batch), len(images), -1)  # [N', n, E]
        log_answer = torch.einsum("kne,nel->nkl", parts, places).log_softmax(-1)
        flat = -log_answer.mean(-1) - np.log(places.shape[-1])
        normal = (bell * (bell.log() - log_answer)).sum(-1)
        found.append(torch.stack([flat, normal]))
    return torch.cat(found, dim=2).sort(-1).values.transpose(0, 1).flatten(1).float().cpu().numpy()


def crop_boxes(seed: int, ids: Sequence[str], crop: int) -> np.ndarray:
    """(side, left, top) of a square crop of each image, float64 [n, 3], as shares of the image's side."""
    u = uniforms(seed, np.full(len(ids), CROP_EPOCH, dtype=np.int64), ids, crop, 3)
    side = np.sqrt(SCALE[0] + (SCALE[1] - SCALE[0]) * u[:, 0])
    return np.stack([side, u[:, 1] * (1 - side), u[:, 2] * (1 - side)], axis=1)


def _cut(images: Tensor, boxes: np.ndarray) -> Tensor:
    """The crops, resized (bilinear) to the images' size."""
    side, left, top = torch.from_numpy(boxes).to(images).T
    nothing = torch.zeros_like(side)
    rows = [torch.stack([side, nothing, 2 * left + side - 1], 1), torch.stack([nothing, side, 2 * top + side - 1], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False, padding_mode="border")


def _maps(backbone: nn.Module, images: Tensor) -> Tensor:
    """[n, E, L]: the last feature map with enough places, without class tokens."""
    look: Any = backbone.forward_intermediates
    stages = look(images, norm=True, output_fmt="NCHW", intermediates_only=True)
    for stage in reversed(stages):
        if stage.shape[2] * stage.shape[3] >= MIN_PLACES:
            return stage.flatten(2)
    raise ValueError(f"no feature map of the encoder has {MIN_PLACES} places; set audit.part_crops=0")
