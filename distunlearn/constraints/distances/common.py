"""What every distance of two samples needs: checked shapes, wide numbers, lengths, and draws that all ranks share."""

from __future__ import annotations

import numpy as np
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


def shared_normals(shape: tuple[int, ...], seed: int, step: int, stream: int, like: Tensor) -> Tensor:
    """Standard normal numbers that are a pure function of (seed, step, stream), hence alike on all ranks.

    seed, step, stream: integers in 0 .. 2^64 - 1; another stream gives other numbers for the same seed and step.
    like: gives device and dtype.
    """
    bits = np.random.Philox(key=np.array([seed, step], dtype=np.uint64), counter=[0, 0, 0, stream])
    return torch.from_numpy(np.random.Generator(bits).standard_normal(shape)).to(like)
