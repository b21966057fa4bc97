"""What holds for every distance of `constraint.distance`."""

from __future__ import annotations

import pytest
import torch

from distunlearn.constraints.distances.energy import DISTANCES


def normal(*shape: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


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


@pytest.mark.parametrize("name", DISTANCES)
def test_how_features_go_together_is_seen(name):
    """The same columns, sorted alike or against each other: alike in every marginal."""
    column = torch.linspace(-1, 1, 30, dtype=torch.float64)
    x, y = torch.stack([column, column], 1), torch.stack([column, column.flip(0)], 1)
    assert DISTANCES[name](x, y).item() > 0.05
