"""Distances between two sets of per-sample features, exact over shards.

| name | estimate | bias at equal distributions | where |
|---|---|---|---|
| `energy` | U-statistic | none | here |
| `mmd` | U-statistic on random Fourier features | none for a given bandwidth | `mmd` |

Energy distance (Szekely and Rizzo, "Energy statistics", J. Stat. Plan. Inference 143, 2013, eq. 5.1)

    E(X, Y) = 2 E|x - y| - E|x - x'| - E|y - y'| >= 0, and 0 only for equal distributions,

estimated as a U-statistic: pairs of a sample with itself are left out. The estimate is unbiased, and so is
its derivative; it can be negative. The V-statistic (self-pairs included) and plug-in Wasserstein distances
are biased, and minimising them shrinks X's spread even when X and Y are already alike (Bellemare et al.,
arXiv 1705.10743, section 3).

Over W ranks, features are all-gathered without gradient, each rank differentiates the distance for its own rows
(`own_rows`: of the energy distance it looks at no other pairs, a W-th of them) and back-propagates that (`surrogate`;
the idea is that of gradient caching, Gao et al., arXiv 2101.06983). No gradient crosses a collective.

Shapes: n, m = samples, k = features.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from distunlearn.constraints.distances.common import check_samples, pairwise
from distunlearn.constraints.distances.mmd import mmd_distance


class Distance(Protocol):
    """A distance of two samples [n, k] and [m, k], a scalar, differentiable in the first.

    What it draws at random is a pure function of (seed, step), so that all ranks draw alike.
    """

    def __call__(self, x: Tensor, y: Tensor, *, seed: int = 0, step: int = 0) -> Tensor: ...


def energy_distance(x: Tensor, y: Tensor, *, seed: int = 0, step: int = 0) -> Tensor:
    """Energy distance of two samples as a U-statistic, a scalar, differentiable in both.

    Args:
        x: [n, k], y: [m, k], n, m >= 2. seed, step: not used; every distance takes them.

    Coinciding points have distance 0 with derivative 0.

    Raises:
        ValueError: fewer than two samples on a side, or other shapes.
    """
    check_samples(x, y)
    n, m = x.shape[0], y.shape[0]
    between = pairwise(x, y).mean()
    within_x = pairwise(x, x).sum() / (n * (n - 1))
    within_y = pairwise(y, y).sum() / (m * (m - 1))
    return 2 * between - within_x - within_y


DISTANCES: dict[str, Distance] = {"energy": energy_distance, "mmd": mmd_distance}


def value_and_cotangent(
    distance: Distance, x_global: Tensor, y_global: Tensor, *, seed: int = 0, step: int = 0
) -> tuple[Tensor, Tensor]:
    """Phi(x, y) and dPhi/dx, both without graph.

    Args:
        distance: one of `DISTANCES`.
        x_global: features of all ranks, [n, k]. y_global: what they are compared with, [m, k]; gets no gradient.
        seed, step: of what the distance draws; the same on all ranks, another step every step.

    Returns:
        Scalar and [n, k]; the same on all ranks if the inputs are.
    """
    with torch.enable_grad():
        leaf = x_global.detach().requires_grad_()
        phi = distance(leaf, y_global.detach(), seed=seed, step=step)
        (cotangent,) = torch.autograd.grad(phi, leaf)
    return phi.detach(), cotangent


def own_rows(
    distance: Distance, x_global: Tensor, y_global: Tensor, rows: tuple[slice, slice], world: int, **draw: int
) -> tuple[Tensor, Tensor]:
    """A share of Phi(x, y), whose sum over the ranks is Phi, and this rank's rows of dPhi/dx; both without graph.

    Args:
        rows: this rank's of x and of y. world: W. Others: see `value_and_cotangent`.

    Returns:
        Scalar and [n_local, k].
    """
    if distance is not energy_distance:
        phi, cotangent = value_and_cotangent(distance, x_global, y_global, **draw)
        return phi / world, cotangent[rows[0]]
    check_samples(x_global, y_global)
    n, m = x_global.shape[0], y_global.shape[0]
    x, y = x_global.detach(), y_global.detach()
    with torch.enable_grad():
        own = x[rows[0]].clone().requires_grad_()
        between = pairwise(own, y).sum() / (n * m)
        within = pairwise(own, x).sum() / (n * (n - 1))
        # A pair within x counts once for each of its rows: what others' rows add to the derivative of ours is as much.
        (cotangent,) = torch.autograd.grad(2 * between - 2 * within, own)
    share = 2 * between - within - pairwise(y[rows[1]], y).sum() / (m * (m - 1))
    return share.detach(), cotangent


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
    check_samples(x, y)
    if num < 1:
        raise ValueError(f"a permutation test needs at least 1 permutation, got {num}")
    n, m = x.shape[0], y.shape[0]
    pooled = torch.cat([x, y]).detach().double()
    distances = pairwise(pooled, pooled)
    first = np.zeros((num + 1, n + m))
    first[0, :n] = 1  # row 0: the labels as they are
    order = np.random.default_rng(np.random.Philox(key=seed)).permuted(np.tile(np.arange(n + m), (num, 1)), axis=1)
    np.put_along_axis(first[1:], order[:, :n], 1, axis=1)
    statistic = _energy_of_labels(distances, torch.from_numpy(first).to(distances.device))
    tolerance = 1e-10 * distances.max()  # equal statistics count as equal whatever the order of summation
    return (1 + int((statistic[1:] >= statistic[0] - tolerance).sum())) / (1 + num)


def _energy_of_labels(distances: Tensor, first: Tensor) -> Tensor:
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
