"""What every distance of two samples needs: checked shapes and lengths of wide numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from distunlearn.objectives.memory_bank import widen


def check_samples(x: Tensor, y: Tensor) -> None:
    """Raises ValueError unless x is [n, k] and y [m, k] with n, m >= 2."""
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"two samples [n, k] and [m, k] are compared, got {list(x.shape)} and {list(y.shape)}")
    if min(x.shape[0], y.shape[0]) < 2:
        raise ValueError(f"a distance of two samples needs at least 2 of each, got {x.shape[0]} and {y.shape[0]}")


def pairwise(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances [n, m], from differences: the matrix-product form loses close pairs in float32."""
    return torch.cdist(widen(x), widen(y), compute_mode="donot_use_mm_for_euclid_dist")
