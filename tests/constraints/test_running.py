"""Running spread and switch: values, stop-gradient, exact state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from distunlearn.constraints.moving_averages import PhiSwitch, RunningSpread
from distunlearn.errors import NumericsError


def batches(count: int, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(20, 3, generator=g) * torch.tensor([0.01, 1.0, 50.0]) + 3 for _ in range(count)]


def test_spread_equals_the_weighted_mean_of_variances():
    momentum, steps = 0.9, batches(5)
    spread = RunningSpread(momentum)
    for step in steps:
        spread.update(step)
    weights = np.array([momentum ** (4 - i) for i in range(5)])
    variances = np.stack([step.double().numpy().var(0, ddof=1) for step in steps])
    expected = np.sqrt((weights[:, None] * variances).sum(0) / weights.sum())
    np.testing.assert_allclose(spread.std.numpy(), expected, rtol=1e-12)


def test_the_first_step_is_not_pulled_towards_zero():
    spread = RunningSpread(0.99)
    (step,) = batches(1)
    spread.update(step)
    torch.testing.assert_close(spread.std, step.double().std(0), rtol=1e-12, atol=0)


def test_momentum_zero_keeps_the_latest_step():
    spread = RunningSpread(0.0)
    for step in batches(3):
        spread.update(step)
    torch.testing.assert_close(spread.std, step.double().std(0), rtol=1e-12, atol=0)


def test_scaling_is_differentiable_in_the_features_only():
    spread = RunningSpread(0.5)
    third = batches(1)[0].requires_grad_()
    spread.update(third)
    x = torch.ones(4, 3, requires_grad=True)
    scaled = spread.scale(x)
    scaled.sum().backward()
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(x.grad, (1 / spread.std).float().expand(4, 3))
    assert third.grad is None
    unit = spread.scale(third.detach()).std(0)
    torch.testing.assert_close(unit, torch.ones(3), atol=1e-5, rtol=0)


def test_a_constant_feature_is_left_as_it_is():
    spread = RunningSpread(0.5)
    third = torch.full((9, 2), 0.1)
    third[:, 1] += torch.arange(9) * 6e-9  # rounds to one or two neighbouring float32 numbers
    spread.update(third)
    assert torch.equal(spread.std, torch.ones(2, dtype=torch.float64))


def test_state_of_the_spread_is_exact_through_a_file():
    steps = batches(6)
    whole, first = RunningSpread(0.9), RunningSpread(0.9)
    for step in steps:
        whole.update(step)
    for step in steps[:3]:
        first.update(step)
    resumed = RunningSpread(0.9)
    resumed.load_state_dict(load(save(first.state_dict())))
    for step in steps[3:]:
        resumed.update(step)
    assert torch.equal(resumed.std, whole.std)
    fresh = RunningSpread(0.9)
    fresh.load_state_dict(load(save(RunningSpread(0.9).state_dict())))
    fresh.update(steps[0])
    torch.testing.assert_close(fresh.std, steps[0].double().std(0))


def test_saved_state_does_not_move_with_later_steps():
    spread = RunningSpread(0.9)
    first, second = batches(2)
    spread.update(first)
    state = spread.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    spread.update(second)
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_switch_follows_the_bias_corrected_mean():
    momentum, phis = 0.8, [0.5, 0.3, -0.2, -0.4, -0.6, 0.9]
    switch = PhiSwitch(0.1, momentum)
    assert switch.active == 1.0 and math.isnan(switch.mean)
    for i, phi in enumerate(phis):
        switch.update(torch.tensor(phi, dtype=torch.float64))
        weights = np.array([momentum ** (i - j) for j in range(i + 1)])
        expected = (weights * phis[: i + 1]).sum() / weights.sum()
        assert switch.mean == pytest.approx(expected, rel=1e-12)
        assert switch.active == float(expected > 0.1)


def test_switch_turns_off_and_on_again():
    switch = PhiSwitch(0.2, 0.5)
    seen = []
    for phi in (0.5, 0.3, 0.05, 0.0, 0.0, 0.9):
        switch.update(phi)
        seen.append(switch.active)
    assert seen == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(("given", "kept"), [(-0.3, 0.0), (0.0, 0.0), (0.25, 0.25), (torch.tensor(0.5), 0.5)])
def test_a_negative_target_counts_as_zero(given, kept):
    switch = PhiSwitch(given, 0.9)
    assert switch.target == kept
    switch.set_target(given)
    assert switch.target == kept
    switch.update(kept)
    assert switch.active == float(kept == 0)  # at a target the term is off; without one it is never switched


def test_without_a_target_the_term_stays_on():
    switch = PhiSwitch(0.0, 0.9)
    for phi in (-0.5, -0.1, 0.3):
        switch.update(phi)
        assert switch.active == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_stop_the_run(bad):
    with pytest.raises(NumericsError, match="distance between the gradients"):
        PhiSwitch(0.0, 0.9).update(bad)
    with pytest.raises(NumericsError, match="target of the constraint"):
        PhiSwitch(bad, 0.9)


class OnGpu(torch.Tensor):
    """A value that says it lies on a GPU; `reads` counts how often one was waited for."""

    reads = 0
    device = torch.device("cuda")

    def __float__(self) -> float:
        OnGpu.reads += 1
        return float(self.as_subclass(torch.Tensor))


def test_a_value_on_a_gpu_is_read_when_the_switch_is_needed():
    own, other = PhiSwitch(1.0, 0.9), PhiSwitch(1.0, 0.9)
    OnGpu.reads = 0
    for step, phi in enumerate([3.0, 0.2, 0.1]):
        assert own.active == other.active and OnGpu.reads == step
        own.update(torch.tensor(phi, dtype=torch.float64).as_subclass(OnGpu))
        other.update(phi)
        assert OnGpu.reads == step, "no step waits for its own"
    assert own.state_dict() == other.state_dict() and OnGpu.reads == 3
    own.update(torch.tensor(math.nan).as_subclass(OnGpu))
    with pytest.raises(NumericsError, match="distance between the gradients"):
        _ = own.mean


def test_state_of_the_switch_is_exact_through_a_file():
    rng = np.random.default_rng(0)
    whole, first, resumed = PhiSwitch(1 / 3, 0.9), PhiSwitch(1 / 3, 0.9), PhiSwitch(0.0, 0.9)
    phis = rng.normal(0.3, 0.2, size=20)
    for phi in phis:
        whole.update(phi)
    for phi in phis[:7]:
        first.update(phi)
    resumed.load_state_dict(load(save(first.state_dict())))
    for phi in phis[7:]:
        resumed.update(phi)
    assert (resumed.mean, resumed.active, resumed.target) == (whole.mean, whole.active, whole.target)


def test_reading_the_switch_before_the_update_is_what_keeps_the_factor_unbiased():
    """With Phi at its target: the factor times Phi's noise has mean 0 if read before, and not if read after."""
    rng = np.random.default_rng(1)
    switch, before, after = PhiSwitch(0.2, 0.5), [], []
    for _ in range(20000):
        noise = rng.normal()
        before.append(switch.active * noise)
        switch.update(0.2 + noise)
        after.append(switch.active * noise)
    error = np.std(before) / np.sqrt(len(before))
    assert abs(np.mean(before)) < 4 * error
    assert np.mean(after) > 20 * error
