"""Mean, sum of squared deviations and gradients of one process's rows in float32 against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distunlearn.distributed.sync_batchnorm import SyncBatchNorm, _global_statistics

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


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("mean", [0.0, 10.0, 1000.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_are_exact_even_far_from_zero(shape, mean, memory_format):
    x = draw(shape, mean, memory_format)
    found, m2, count = _global_statistics(x)  # of a world of one
    assert count == x.numel() // x.shape[1]
    assert float((found - expected(x)[0]).abs().max()) < 2e-6 * (1 + mean)
    assert deviation(m2, x) < 5e-6


def test_the_check_can_fail():
    x = draw(SHAPES[0], 1000.0, torch.contiguous_format)
    count, dims = x.numel() // x.shape[1], [0, 2, 3]
    assert deviation(x.square().sum(dims) - x.sum(dims).square() / count, x) > 1e-3  # by sums of squares


def test_equal_values_have_no_deviation_and_nan_is_not_hidden():
    x = torch.full(SHAPES[0], 123.456)
    assert float(_global_statistics(x)[1].max()) < 1e-6 * x.numel()
    x[3, 2, 1, 1] = torch.nan
    mean, m2, _ = _global_statistics(x)
    assert mean.isnan().tolist() == m2.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_in_float32(shape, memory_format):
    """Against torch's batch norm in float64."""
    x, weights = draw(shape, 2.0, memory_format), draw(shape, 0.0, memory_format).roll(1, 0)
    kind = torch.nn.BatchNorm2d if x.dim() == 4 else torch.nn.BatchNorm1d
    results = []
    for dtype in (torch.float64, torch.float32):
        norm = kind(5).to(dtype)
        torch.nn.init.constant_(norm.weight, 7.0)
        norm = SyncBatchNorm(norm) if dtype == torch.float32 else norm
        leaf = x.to(dtype).requires_grad_()
        y = norm(leaf)
        results.append([y, *torch.autograd.grad((y * weights.to(dtype)).sum(), (leaf, norm.weight, norm.bias))])
    for wanted, found in zip(*results, strict=True):
        assert float((found - wanted).detach().abs().max()) < 1e-5 * max(1.0, float(wanted.detach().abs().max()))
