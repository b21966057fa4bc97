"""Confidence terms against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from distunlearn.constraints.confidence import entropy_confidence, hinge_confidence


def test_hinge_value_active_share_and_derivative():
    c = torch.tensor([0.1, 0.5, 0.9, 0.7], dtype=torch.float64, requires_grad=True)
    loss, active = hinge_confidence(c, 0.6)
    assert loss.item() == pytest.approx((0.3 + 0.1) / 4)
    assert active.item() == 0.5 and not active.requires_grad
    loss.backward()
    torch.testing.assert_close(c.grad, torch.tensor([0, 0, 0.25, 0.25], dtype=torch.float64))


def test_hinge_threshold_gets_no_gradient_and_takes_any_precision():
    c = torch.tensor([0.5, 0.9], requires_grad=True)
    threshold = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    loss, active = hinge_confidence(c, threshold)
    loss.backward()
    assert threshold.grad is None and loss.dtype == torch.float32 and active.item() == 1


def test_hinge_of_nobody_is_zero():
    loss, active = hinge_confidence(torch.zeros(0, requires_grad=True), 0.5)
    loss.backward()
    assert loss.item() == 0 and active.item() == 0


def test_entropy_equals_scipy():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    rows = logits.softmax(-1).flatten(0, 1).numpy()
    expected = np.mean([1 - stats.entropy(row) / np.log(7) for row in rows])
    assert entropy_confidence(logits).item() == pytest.approx(expected, rel=1e-12)


def test_entropy_ends_of_the_scale():
    assert entropy_confidence(torch.full((3, 9), 4.0)).item() == pytest.approx(0, abs=1e-6)
    certain = torch.zeros(3, 9)
    certain[:, 2] = 200
    assert entropy_confidence(certain).item() == pytest.approx(1, abs=1e-6)


def test_masked_entries_count_for_nothing():
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masked = torch.cat([logits, torch.full((4, 3), -torch.inf, dtype=torch.float64)], dim=1).requires_grad_()
    value = entropy_confidence(masked)
    assert value.item() == pytest.approx(entropy_confidence(logits).item(), rel=1e-12)
    value.backward()
    assert torch.isfinite(masked.grad).all() and torch.equal(masked.grad[:, 6:], torch.zeros(4, 3, dtype=torch.float64))


def test_rows_without_a_choice_count_zero():
    logits = torch.full((2, 3), -torch.inf)
    logits[0, 0] = 1.0
    logits.requires_grad_()
    value = entropy_confidence(logits)
    value.backward()
    assert value.item() == 0 and torch.equal(logits.grad, torch.zeros(2, 3))
    assert entropy_confidence(torch.zeros(2, 0, 5)).item() == 0


def test_entropy_derivative_and_direction():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(entropy_confidence, (logits,))
    (slope,) = torch.autograd.grad(entropy_confidence(logits), logits)
    assert entropy_confidence(logits - 0.1 * slope) < entropy_confidence(logits)
