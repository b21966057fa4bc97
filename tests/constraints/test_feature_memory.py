"""Pooled samples: what is held, the gradient against brute force, less noise where distributions agree."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save

from distunlearn.constraints.cross_batch_memory import FeatureMemory
from distunlearn.constraints.distances.energy import energy_distance, value_and_cotangent


def samples(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return shift + torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(steps: int, given: int) -> FeatureMemory:
    memory = FeatureMemory(steps)
    for step in range(given):
        memory.push(samples(4 + step, step), samples(6, 100 + step))
    return memory


def test_the_newest_steps_are_held_behind_this_step():
    x, y = filled(2, 5).pooled(samples(3, 50), samples(7, 51))
    torch.testing.assert_close(x, torch.cat([samples(3, 50), samples(8, 4), samples(7, 3)]), rtol=0, atol=0)
    torch.testing.assert_close(y, torch.cat([samples(7, 51), samples(6, 104), samples(6, 103)]), rtol=0, atol=0)


def test_nothing_is_held_of_zero_steps_or_after_clear():
    cleared = filled(3, 2)
    cleared.clear()
    for memory in (filled(0, 3), cleared):
        x, y = memory.pooled(samples(3, 50), samples(7, 51))
        assert (len(x), len(y)) == (3, 7)


def test_what_is_held_has_no_graph_and_is_a_copy():
    memory, x, y = FeatureMemory(1), samples(4, 0).requires_grad_(), samples(5, 1)
    memory.push(2 * x, y)
    y.zero_()
    past_x, past_y = (part[1:] for part in memory.pooled(samples(1, 2), samples(1, 3)))
    assert not past_x.requires_grad
    torch.testing.assert_close(past_y, samples(5, 1), rtol=0, atol=0)


@pytest.mark.parametrize("given", [0, 1, 5])
def test_state_returns_exactly(given):
    memory, again = filled(3, given), FeatureMemory(3)
    again.load_state_dict(load(save(memory.state_dict())))
    for one, other in zip(memory.pooled(samples(2, 8), samples(2, 9)), again.pooled(samples(2, 8), samples(2, 9)),
                          strict=True):  # fmt: skip
        assert torch.equal(one, other)
    assert given == 0 or len(one) > 2


def test_gradient_is_a_mean_of_directions_over_all_that_is_held():
    """2/n (mean over Y of the direction from y to x, less that over the other X), one sample after the other."""
    x, y = samples(4, 20), samples(6, 21)
    pooled_x, pooled_y = filled(2, 3).pooled(x, y)
    _, cotangent = value_and_cotangent(energy_distance, pooled_x, pooled_y)
    found = cotangent[:4] * (len(pooled_x) / 4)
    for i in range(4):
        away = [torch.nn.functional.normalize(x[i] - other, dim=0) for other in pooled_y]
        within = [torch.nn.functional.normalize(x[i] - pooled_x[k], dim=0) for k in range(len(pooled_x)) if k != i]
        expected = 2 / 4 * (torch.stack(away).mean(0) - torch.stack(within).mean(0))
        torch.testing.assert_close(found[i], expected, rtol=1e-12, atol=1e-14)


def noise(memory_steps: int, shift: float) -> float:
    """Mean norm of the gradient at the newest of 12 steps, over 40 histories; batches of 16 on both sides."""
    norms = []
    for history in range(40):
        memory = FeatureMemory(memory_steps)
        for step in range(12):
            x, y = (samples(16, 1000 * history + 2 * step + side, side * shift) for side in (0, 1))
            pooled = memory.pooled(x, y)
            memory.push(x, y)
        _, cotangent = value_and_cotangent(energy_distance, *pooled)
        norms.append(float(cotangent[:16].norm()) * len(pooled[0]) / 16)
    return sum(norms) / len(norms)


def test_where_distributions_agree_less_pushes_and_elsewhere_as_much_as_before():
    alone, pooled = noise(0, 0.0), noise(11, 0.0)
    assert pooled < 0.5 * alone  # sqrt(12) = 3.5 times less, but for samples that meet themselves in both
    assert noise(11, 3.0) == pytest.approx(noise(0, 3.0), rel=0.05)
