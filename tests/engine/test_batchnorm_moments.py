"""Mean and sum of squared deviations, and the sums of the backward, of one process's rows against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distunlearn.distributed.sync_batchnorm import _local_moments, _local_sums

SHAPES = [(32, 5, 8, 8), (32, 5, 4, 4), (3, 5, 4, 4), (1, 5, 32), (64, 5, 2, 2), (64, 5, 1, 1), (64, 5)]
FORMATS = (torch.contiguous_format, torch.channels_last)


def draw(shape: tuple[int, ...], mean: float, memory_format: torch.memory_format) -> Tensor:
    """Rows in an order: the first ones are no sample of the others."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + mean
    x[: shape[0] // 2] += 3
    return x.to(memory_format=memory_format) if x.dim() == 4 else x


def expected(x: Tensor) -> tuple[Tensor, Tensor]:
    dims = [0, *range(2, x.dim())]
    return x.double().mean(dims), x.double().var(dims, correction=0) * (x.numel() // x.shape[1])


def deviation(m2: Tensor, x: Tensor) -> float:
    return float((m2 / expected(x)[1] - 1).abs().max())


@pytest.mark.parametrize("mean", [0.0, 10.0, 1000.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_are_exact_even_far_from_zero(shape, mean):
    x = draw(shape, mean, torch.contiguous_format)  # channels last: torch's own kernel
    found, m2 = _local_moments(x, x.numel() // x.shape[1])
    assert float((found - expected(x)[0]).abs().max()) < 2e-6 * (1 + mean)
    assert deviation(m2, x) < 5e-6


def test_the_check_can_fail():
    x = draw(SHAPES[0], 1000.0, torch.contiguous_format)
    count, dims = x.numel() // x.shape[1], [0, 2, 3]
    assert deviation(x.square().sum(dims) - x.sum(dims).square() / count, x) > 1e-3  # by sums of squares


def test_equal_values_have_no_deviation_and_nan_is_not_hidden():
    x = torch.full(SHAPES[0], 123.456)
    assert float(_local_moments(x, x.numel() // 5)[1].max()) < 1e-6 * x.numel()
    x[3, 2, 1, 1] = torch.nan
    mean, m2 = _local_moments(x, x.numel() // 5)
    assert mean.isnan().tolist() == m2.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_the_backward(shape, memory_format):
    x, grad = draw(shape, 2.0, memory_format), draw(shape, 0.0, memory_format).roll(1, 0)
    dims = [0, *range(2, x.dim())]
    mean, m2 = (part.float() for part in expected(x))
    variance = m2 / (x.numel() // x.shape[1])
    view = (1, -1) + (1,) * (x.dim() - 2)
    normalised = (x.double() - mean.double().view(view)) / (variance.double().view(view) + 1e-5).sqrt()
    wanted = torch.stack([grad.double().sum(dims), (grad * normalised).sum(dims)])
    found = _local_sums(grad, x, torch.full((5,), 7.0), mean, variance, 1e-5)
    assert float((found - wanted).abs().max()) < 1e-5 * x.numel() / x.shape[1]
