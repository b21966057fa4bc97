"""MMD with random Fourier features against loops, the Gaussian kernel, and what the bandwidth may look at."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from distunlearn.constraints.distances.energy import DISTANCES
from distunlearn.constraints.distances.mmd import median_bandwidth, mmd_distance


def normal(*shape: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def u_statistic(kernel: np.ndarray, n: int) -> float:
    """MMD^2 from the kernel matrix of the pooled sample, the first n rows being x, with loops."""
    total = len(kernel)

    def mean(rows, columns):
        pairs = [kernel[i, j] for i in rows for j in columns if i != j]
        return sum(pairs) / len(pairs)

    x, y = range(n), range(n, total)
    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def gaussian(points: torch.Tensor, bandwidth: float) -> np.ndarray:
    squared = ((points[:, None] - points[None]) ** 2).sum(-1).numpy()
    return np.exp(-squared / (2 * bandwidth**2))


@pytest.mark.parametrize(("n", "m", "k"), [(2, 2, 1), (5, 9, 3), (12, 7, 65)])
def test_value_is_the_u_statistic_of_its_own_features(n, m, k):
    """The features are rebuilt from the frequencies that the function drew; the kernel matrix is summed in loops."""
    x, y = normal(n, k, seed=0), normal(m, k, seed=1) * 1.5 + 0.3
    points = torch.cat([x, y])
    bits = np.random.Philox(key=np.array([3, 8], dtype=np.uint64), counter=[0, 0, 0, 0x6D6D64])
    pairs = torch.cdist(points, points)[torch.triu_indices(n + m, n + m, 1).unbind()]
    scale = float(pairs.sort().values[(len(pairs) - 1) // 2])
    frequencies = np.random.Generator(bits).standard_normal((k, 16)) / scale
    phase = points.numpy() @ frequencies
    kernel = np.cos(phase[:, None] - phase[None]).mean(-1)  # phi(x).phi(y) = mean of cos(w.(x - y))
    found = mmd_distance(x, y, seed=3, step=8, num_frequencies=16).item()
    assert found == pytest.approx(u_statistic(kernel, n), rel=1e-11, abs=1e-12)
    assert found == pytest.approx(mmd_distance(y, x, seed=3, step=8, num_frequencies=16).item(), rel=1e-11, abs=1e-12)
    assert DISTANCES["mmd"] is mmd_distance


def test_many_frequencies_approach_the_gaussian_kernel():
    x, y = normal(8, 3, seed=0), normal(11, 3, seed=1) * 1.4 + 0.5
    exact = u_statistic(gaussian(torch.cat([x, y]), 1.7), 8)

    def error(num: int) -> float:
        off = [
            mmd_distance(x, y, seed=5, step=step, num_frequencies=num, bandwidth=1.7).item() - exact
            for step in range(20)
        ]
        return float(np.sqrt(np.mean(np.square(off))))

    coarse, fine = error(256), error(256 * 64)
    assert fine < 5e-3 < 0.05 < abs(exact)
    assert 5 < coarse / fine < 13  # falls like D^(-1/2): 8 expected


def test_frequencies_depend_on_seed_and_step_alone():
    x, y = normal(6, 3, seed=0), normal(6, 3, seed=1)
    assert mmd_distance(x, y, seed=1, step=2).item() == mmd_distance(x, y, seed=1, step=2).item()
    values = {mmd_distance(x, y, seed=s, step=t).item() for s, t in [(1, 2), (2, 1), (1, 3), (2, 2)]}
    assert len(values) == 4


def test_derivatives_with_the_bandwidth_held():
    x, y = normal(4, 3, seed=0).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(functools.partial(mmd_distance, seed=1, bandwidth=1.3), (x, y))
    held = float(median_bandwidth(torch.cat([x, y])))
    (free,) = torch.autograd.grad(mmd_distance(x, y, seed=1), x)
    (expected,) = torch.autograd.grad(mmd_distance(x, y, seed=1, bandwidth=held), x)
    torch.testing.assert_close(free, expected, rtol=1e-12, atol=0)


def test_bandwidth_is_the_median_and_stays_positive():
    assert median_bandwidth(torch.tensor([[0.0], [1.0], [3.0]])).item() == 2.0  # 1, 2, 3
    assert median_bandwidth(torch.zeros(4, 2)).item() == 1.0
    x = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    value = mmd_distance(x, torch.zeros(3, 2, dtype=torch.float64))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12) and torch.isfinite(x.grad).all()


def test_half_precision_is_computed_in_float32():
    x, y = normal(9, 3, seed=0).bfloat16(), normal(9, 3, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mmd_distance(x, y)
    assert found.dtype == torch.float32
    assert found.item() == mmd_distance(x.float(), y.float()).item()
