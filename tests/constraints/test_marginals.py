"""Sliced Wasserstein, quantile matching and moments against scipy, numpy and closed forms in float64."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from scipy import stats

from distunlearn.constraints.distances.energy import DISTANCES, permutation_test
from distunlearn.constraints.distances.plug_in import (
    moments_distance,
    quantile_distance,
    sliced_wasserstein_distance,
    wasserstein_1d,
)

SIZES = [(2, 2), (5, 9), (6, 4), (40, 31), (7, 7)]


def normal(*shape: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_one_dimension_is_scipys_wasserstein_distance(n, m):
    x, y = normal(n, 3, seed=0), normal(m, 3, seed=1) * 1.5 + 0.3
    expected = [stats.wasserstein_distance(x[:, c].numpy(), y[:, c].numpy()) for c in range(3)]
    np.testing.assert_allclose(wasserstein_1d(x, y).numpy(), expected, rtol=1e-12)
    sliced = sliced_wasserstein_distance(x[:, :1], y[:, :1])  # every direction is +1 or -1
    assert sliced.item() == pytest.approx(expected[0], rel=1e-12)


def test_slices_are_averaged_over_directions_of_length_one():
    x, y = normal(9, 4, seed=0), normal(6, 4, seed=1) + 0.4
    bits = np.random.Philox(key=np.array([7, 2], dtype=np.uint64), counter=[0, 0, 0, 0x736C69636573])
    directions = np.random.Generator(bits).standard_normal((4, 10))
    directions /= np.linalg.norm(directions, axis=0)
    every = [stats.wasserstein_distance(x.numpy() @ d, y.numpy() @ d) for d in directions.T]
    found = sliced_wasserstein_distance(x, y, seed=7, step=2, num_directions=10)
    assert found.item() == pytest.approx(np.mean(every), rel=1e-12)
    assert found.item() != sliced_wasserstein_distance(x, y, seed=7, step=3, num_directions=10).item()


def test_a_shift_has_the_closed_form_in_the_limit_of_many_slices():
    """W1 of a shift by b is |t.b|; its mean over the sphere in 3 dimensions is |b| / 2."""
    x, b = normal(5, 3, seed=0), torch.tensor([0.6, 0.0, -0.8], dtype=torch.float64)
    found = sliced_wasserstein_distance(x, x + b, num_directions=200_000).item()
    assert found == pytest.approx(0.5, abs=4 * np.sqrt(1 / 12 / 200_000))


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_quantiles_are_numpys(n, m):
    x, y = normal(n, 3, seed=0), normal(m, 3, seed=1) * 1.5 + 0.3
    levels = np.arange(1, 20) / 20
    gaps = np.quantile(x.numpy(), levels, axis=0) - np.quantile(y.numpy(), levels, axis=0)
    assert quantile_distance(x, y).item() == pytest.approx((gaps**2).mean(0).sum(), rel=1e-11)


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_moments_are_numpys(n, m):
    x, y = normal(n, 3, seed=0).numpy(), normal(m, 3, seed=1).numpy() * 1.5 + 0.3
    expected = ((x.mean(0) - y.mean(0)) ** 2 + (x.std(0, ddof=1) - y.std(0, ddof=1)) ** 2).sum()
    found = moments_distance(torch.from_numpy(x), torch.from_numpy(y)).item()
    assert found == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("distance", [quantile_distance, moments_distance])
def test_a_shift_has_the_closed_form(distance):
    x = normal(8, 2, seed=0)
    assert distance(x, x + torch.tensor([3.0, -4.0], dtype=torch.float64)).item() == pytest.approx(25.0, rel=1e-12)


def test_marginals_do_not_see_how_features_go_together():
    """What the two marginal distances miss, the others see: the same columns, sorted alike or against each other."""
    column = torch.linspace(-1, 1, 30, dtype=torch.float64)
    x, y = torch.stack([column, column], 1), torch.stack([column, column.flip(0)], 1)
    for name, distance in DISTANCES.items():
        value = distance(x, y).item()
        assert (abs(value) < 1e-20) == (name in ("quantile", "moments")), name
    assert permutation_test(x, y, 99, 0) < 0.05


@pytest.mark.parametrize("name", ["sliced_wasserstein", "quantile", "moments"])
def test_derivatives(name):
    x, y = normal(4, 3, seed=0).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(functools.partial(DISTANCES[name], seed=1, step=4), (x, y))


@pytest.mark.parametrize("name", DISTANCES)
def test_identical_points_are_at_distance_zero_with_finite_derivatives(name):
    x = torch.full((4, 3), 0.1, dtype=torch.float64, requires_grad=True)
    value = DISTANCES[name](x, x.detach()[:3])
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12) and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.zeros(1, 2), torch.zeros(5, 2), "at least 2 of each, got 1 and 5"),
        (torch.zeros(5, 2), torch.zeros(5, 3), "are compared, got"),
        (torch.zeros(5), torch.zeros(5), "are compared, got"),
    ],
)
def test_impossible_samples_are_refused(name, x, y, words):
    with pytest.raises(ValueError, match=words):
        DISTANCES[name](x, y)


@pytest.mark.parametrize("name", DISTANCES)
def test_every_distance_sees_a_shift_and_a_stretch(name):
    x, y = normal(64, 3, seed=0), normal(64, 3, seed=1)
    near = DISTANCES[name](x, y).item()
    assert DISTANCES[name](x + 1, y).item() > near + 0.05
    assert DISTANCES[name](3 * x, y).item() > near + 0.05
    found = DISTANCES[name](x.bfloat16(), y.bfloat16())
    assert found.dtype == torch.float32
