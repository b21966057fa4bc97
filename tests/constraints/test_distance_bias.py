"""Which distances are unbiased in value and derivative where both sides are alike; the others are shown not to be."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from distunlearn.constraints.distances.common import pairwise
from distunlearn.constraints.distances.energy import DISTANCES
from distunlearn.constraints.distances.mmd import median_bandwidth, mmd_distance


def with_third_party_bandwidth(x: torch.Tensor, y: torch.Tensor, *, seed: int, step: int) -> torch.Tensor:
    return mmd_distance(x, y, seed=seed, step=step, num_frequencies=64, bandwidth=median_bandwidth(y))


def v_statistic(x: torch.Tensor, y: torch.Tensor, *, seed: int, step: int) -> torch.Tensor:
    """The energy distance with the pairs of a sample with itself: what `energy_distance` must not be."""
    return 2 * pairwise(x, y).mean() - pairwise(x, x).mean() - pairwise(y, y).mean()


CASES = dict(DISTANCES)
CASES["energy, self-pairs included"] = v_statistic
CASES["mmd"] = functools.partial(mmd_distance, num_frequencies=64)
CASES["mmd, bandwidth of one side"] = with_third_party_bandwidth


@functools.cache
def null_statistics(name: str, n: int, m: int, repetitions: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Value and derivative with respect to the scale of x at scale 1, for x and y of one Student-t(5) distribution."""
    rng = np.random.default_rng(21)
    values, slopes = [], []
    for step in range(repetitions):
        x, y = (torch.from_numpy(rng.standard_t(5, size=(size, 2))) for size in (n, m))
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        value = CASES[name](scale * x, y, seed=4, step=step)
        value.backward()
        values.append(value.item())
        slopes.append(scale.grad.item())
    return np.array(values), np.array(slopes)


def deviation(sample: np.ndarray) -> float:
    """Mean in standard errors."""
    return sample.mean() / (sample.std(ddof=1) / np.sqrt(len(sample)))


@pytest.mark.parametrize(("n", "m"), [(16, 16), (4, 4), (5, 12)])
@pytest.mark.parametrize("name", ["energy", "mmd"])
def test_u_statistics_are_unbiased_when_both_are_alike(name, n, m):
    values, slopes = null_statistics(name, n, m)
    assert abs(deviation(values)) < 3
    assert abs(deviation(slopes)) < 3
    assert (values < 0).mean() > 0.3  # as an unbiased estimate of 0 must be


def test_a_v_statistic_is_biased():
    """Negative control: too large, never negative, and the derivative shrinks x though nothing is to be done."""
    values, slopes = null_statistics("energy, self-pairs included", 16, 16)
    assert deviation(values) > 20
    assert deviation(slopes) > 10
    assert (values > 0).all()


def test_a_bandwidth_that_looks_at_one_side_is_biased():
    """Negative control for the pooled median: the third-party side's chance width leaks into the derivative."""
    assert deviation(null_statistics("mmd, bandwidth of one side", 4, 4)[1]) > 5
