"""Distances between two sets of per-sample features, unbiased, and exact over shards.

Energy distance (Szekely and Rizzo, "Energy statistics", J. Stat. Plan. Inference 143, 2013, eq. 5.1)

    E(X, Y) = 2 E|x - y| - E|x - x'| - E|y - y'| >= 0, and 0 only for equal distributions,

estimated as a U-statistic: pairs of a sample with itself are left out. The estimate is unbiased, and so is
its derivative; it can be negative. The V-statistic (self-pairs included) and plug-in Wasserstein distances
are biased, and minimising them shrinks X's spread even when X and Y are already alike (Bellemare et al.,
arXiv 1705.10743, section 3).

Over W ranks, features are all-gathered without gradient, the distance is differentiated there, on every rank
alike, and each rank back-propagates its own rows of that derivative (`surrogate`; the idea is that of
gradient caching, Gao et al., arXiv 2101.06983). No gradient crosses a collective.

Shapes: n, m = samples, k = features.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["DISTANCES", "Distance", "energy_distance", "permutation_test", "surrogate", "value_and_cotangent"]

Distance = Callable[[Tensor, Tensor], Tensor]


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """Energy distance of two samples as a U-statistic, a scalar, differentiable in both.

    Args:
        x: [n, k], y: [m, k], n, m >= 2.

    Coinciding points have distance 0 with derivative 0.

    Raises:
        ValueError: fewer than two samples on a side, or other shapes.
    """
    _check_samples(x, y)
    n, m = x.shape[0], y.shape[0]
    between = _pairwise(x, y).mean()
    within_x = _pairwise(x, x).sum() / (n * (n - 1))
    within_y = _pairwise(y, y).sum() / (m * (m - 1))
    return 2 * between - within_x - within_y


DISTANCES: dict[str, Distance] = {"energy": energy_distance}


def value_and_cotangent(distance: Distance, x_global: Tensor, y_global: Tensor) -> tuple[Tensor, Tensor]:
    """Phi(x, y) and dPhi/dx, both without graph.

    Args:
        distance: one of `DISTANCES`.
        x_global: features of all ranks, [n, k]. y_global: what they are compared with, [m, k]; gets no gradient.

    Returns:
        Scalar and [n, k]; the same on all ranks if the inputs are.
    """
    with torch.enable_grad():
        leaf = x_global.detach().requires_grad_()
        phi = distance(leaf, y_global.detach())
        (cotangent,) = torch.autograd.grad(phi, leaf)
    return phi.detach(), cotangent


def surrogate(x_local: Tensor, cotangent_local: Tensor, world: int) -> Tensor:
    """W sum_i <v_i, x_i> over this rank's rows: its gradient, averaged over ranks, is that of Phi.

    Args:
        x_local: this rank's features with graph, [n_local, k] (0 rows are fine).
        cotangent_local: this rank's rows of `value_and_cotangent`, [n_local, k].
        world: W; undoes the averaging of gradients that every backend does. Never combine this with
            features gathered by a differentiable collective, whose backward sums over ranks already.
    """
    assert x_local.shape == cotangent_local.shape, "one cotangent per local feature"
    return world * (x_local * cotangent_local.detach()).sum()


def permutation_test(x: Tensor, y: Tensor, num: int, seed: int) -> float:
    """p-value of "x and y have one distribution" by permuting the labels under the energy distance.

    (1 + permutations at least as distant) / (1 + num), exact for any sample size (Phipson and Smyth, 2010,
    eq. 2). Features are used as they come: scale them first.

    Args:
        x: [n, k], y: [m, k], n, m >= 2.
        num: permutations, >= 1; the smallest possible p is 1 / (1 + num).
        seed: of the permutations, >= 0.

    Raises:
        ValueError: as `energy_distance`, or num < 1.
    """
    _check_samples(x, y)
    if num < 1:
        raise ValueError(f"a permutation test needs at least 1 permutation, got {num}")
    n, m = x.shape[0], y.shape[0]
    pooled = torch.cat([x, y]).detach().double()
    distances = _pairwise(pooled, pooled).cpu().numpy()
    first = np.zeros((num + 1, n + m))
    first[0, :n] = 1  # row 0: the labels as they are
    order = np.random.default_rng(np.random.Philox(key=seed)).permuted(np.tile(np.arange(n + m), (num, 1)), axis=1)
    np.put_along_axis(first[1:], order[:, :n], 1, axis=1)
    statistic = _energy_of_labels(distances, first)
    tolerance = 1e-10 * distances.max()  # equal statistics count as equal whatever the order of summation
    return float((1 + (statistic[1:] >= statistic[0] - tolerance).sum()) / (1 + num))


def _energy_of_labels(distances: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Energy distance (U-statistic) of many labellings of one pooled sample, [num].

    distances: [N, N] of all pairs. first: [num, N], 1 for members of the first sample, else 0.
    """
    n = first[0].sum()
    m = first.shape[1] - n
    towards_first = first @ distances
    within_x = (towards_first * first).sum(1)
    between = towards_first.sum(1) - within_x
    within_y = distances.sum() - within_x - 2 * between
    return 2 * between / (n * m) - within_x / (n * (n - 1)) - within_y / (m * (m - 1))


def _pairwise(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances [n, m], from differences: the matrix-product form loses close pairs in float32."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x, y = x.float(), y.float()
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _check_samples(x: Tensor, y: Tensor) -> None:
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"two samples [n, k] and [m, k] are compared, got {list(x.shape)} and {list(y.shape)}")
    if min(x.shape[0], y.shape[0]) < 2:
        raise ValueError(f"a distance of two samples needs at least 2 of each, got {x.shape[0]} and {y.shape[0]}")
