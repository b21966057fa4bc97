"""Distances that compare sorted values or moments: sliced Wasserstein, quantiles, mean and spread.

All three are plug-in estimates: the distance between the two *empirical* distributions. Two samples of one
distribution never coincide, so the estimates are **biased**: positive on average even where both sides are alike,
with a derivative that pulls x's spread together there (Bellemare et al., "The Cramer distance as a solution to
biased Wasserstein gradients", arXiv 1705.10743, section 3). The bias falls with the number of samples (like n^-1/2 for
`sliced_wasserstein_distance`, like 1/n for the two squared ones), not with the number of steps. As a training
term prefer the energy distance or MMD; these serve where one wants to match just these quantities.

Shapes: n, m = samples, k = features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distunlearn.constraints.distances.common import check_samples, shared_normals, widen

__all__ = ["moments_distance", "quantile_distance", "sliced_wasserstein_distance", "wasserstein_1d"]

NUM_DIRECTIONS = 128
NUM_LEVELS = 19  # 0.05, 0.10 ... 0.95: the extremes, which a batch cannot estimate, are left out

_STREAM = 0x736C69636573  # keeps these random numbers apart from all others of the same seed


def wasserstein_1d(x: Tensor, y: Tensor) -> Tensor:
    """W1 of the empirical distributions of each column, [k]: the integral over u of |quantile_x(u) - quantile_y(u)|.

    x: [n, k], y: [m, k]. Both quantile functions are steps; between two neighbouring steps of either the integrand is
    constant, so the integral is a finite sum, exact for n != m (Villani, "Topics in Optimal Transportation", 2003,
    theorem 2.18). Differentiable almost everywhere; where two sorted values meet the derivative is 0.
    """
    n, m = x.shape[0], y.shape[0]
    # Levels in units of 1 / (n m), as whole numbers: i/n = j/m must be one step, not two that rounding keeps apart.
    steps = torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]).unique()
    low, width = steps[:-1].to(x.device), steps.diff().to(x) / (n * m)
    gap = x.sort(dim=0).values[low // m] - y.sort(dim=0).values[low // n]
    return width @ gap.abs()


def sliced_wasserstein_distance(
    x: Tensor, y: Tensor, *, seed: int = 0, step: int = 0, num_directions: int = NUM_DIRECTIONS
) -> Tensor:
    """Mean over random directions of W1 between the projections, a scalar >= 0; biased (see the module's text).

        SW(X, Y) = mean_d W1(t_d.X, t_d.Y),     t_d uniform on the unit sphere, drawn from (seed, step)

    Source: Rabin, Peyre, Delon and Bernot, "Wasserstein barycenter and its application to texture mixing", SSVM
    2011; with order 1 instead of 2, so that one outlier does not decide the derivative. In one
    dimension it is W1 itself.

    Args:
        x: [n, k], y: [m, k], n, m >= 2. seed, step: 0 .. 2^64 - 1, the same on all ranks. num_directions: >= 1.

    Raises:
        ValueError: fewer than two samples on a side, or other shapes.
    """
    check_samples(x, y)
    x, y = widen(x), widen(y)
    directions = shared_normals((x.shape[1], num_directions), seed, step, _STREAM, like=x)
    directions = directions / directions.norm(dim=0)
    with torch.autocast(device_type=x.device.type, enabled=False):
        return wasserstein_1d(x @ directions, y @ directions).mean()


def quantile_distance(x: Tensor, y: Tensor, *, seed: int = 0, step: int = 0) -> Tensor:
    """Squared differences of each feature's quantiles, a scalar >= 0; biased (see the module's text).

        Q(X, Y) = sum_k mean_u (quantile_{x,k}(u) - quantile_{y,k}(u))^2,     u = 0.05, 0.10 ... 0.95

    A discrete form of W2^2 between the marginals (Villani 2003, theorem 2.18, the integral taken at fixed levels);
    quantiles by linear interpolation (Hyndman and Fan, The American Statistician 50, 1996, definition 7). Sees the
    marginals alone: samples that differ in how features go together are at distance 0.

    Args:
        x: [n, k], y: [m, k], n, m >= 2. seed, step: not used; every distance takes them.

    Raises:
        ValueError: fewer than two samples on a side, or other shapes.
    """
    check_samples(x, y)
    x, y = widen(x), widen(y)
    levels = torch.arange(1, NUM_LEVELS + 1).to(x) / (NUM_LEVELS + 1)
    return (_quantiles(x, levels) - _quantiles(y, levels)).square().mean(0).sum()


def moments_distance(x: Tensor, y: Tensor, *, seed: int = 0, step: int = 0) -> Tensor:
    """Squared differences of means and standard deviations, a scalar >= 0; biased (see the module's text).

        M(X, Y) = sum_k (mean_x - mean_y)^2 + (sd_x - sd_y)^2

    W2^2 between normal distributions with these means and uncorrelated features (Dowson and Landau, J. Multivariate
    Analysis 12, 1982). Standard deviations with n - 1; one that is 0 has derivative 0. Sees nothing else
    of the distributions, and one outlier can move it far.

    Args:
        x: [n, k], y: [m, k], n, m >= 2. seed, step: not used; every distance takes them.

    Raises:
        ValueError: fewer than two samples on a side, or other shapes.
    """
    check_samples(x, y)
    (mean_x, sd_x), (mean_y, sd_y) = _moments(widen(x)), _moments(widen(y))
    return (mean_x - mean_y).square().sum() + (sd_x - sd_y).square().sum()


def _quantiles(x: Tensor, levels: Tensor) -> Tensor:
    """[levels, k]; torch.quantile would refuse more than 2^24 values."""
    ordered = x.sort(dim=0).values
    position = levels * (x.shape[0] - 1)
    below = position.floor().long().clamp_max(x.shape[0] - 2)
    share = (position - below).unsqueeze(1)
    return ordered[below] * (1 - share) + ordered[below + 1] * share


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x, dim=0)
    flat = variance == 0  # sqrt has no finite derivative there
    return mean, torch.where(flat, 1, variance).sqrt().masked_fill(flat, 0)
