"""What every evaluator keeps to: a new one in the table falls into these tests by itself.

Their gradients against plain double backward are in test_evaluators.py, those on two ranks in tests/dist.
"""

from __future__ import annotations

import pytest
import torch
from parts import EVALUATORS
from small import bank, batch, config, context, evaluator, step

every_evaluator = pytest.mark.parametrize("name", EVALUATORS)


def asked(name: str, third: str = "third_party"):
    """(what one step of the constraint gives, gradient of its term in the weights, context)."""
    cfg = config("resnet", name)
    ctx = context(cfg)
    held = bank(ctx)
    made = evaluator(cfg)
    ctx.images = 0
    found = step(made, ctx, batch("forget"), batch(third, 5), held)
    weights = [weight for weight in ctx.model.parameters() if weight.requires_grad]
    parts = torch.autograd.grad(found.term, weights, allow_unused=True, retain_graph=True)
    return found, torch.cat([part.flatten() for part in parts if part is not None]), ctx


@every_evaluator
def test_a_step_is_finite_and_a_function_of_its_arguments(name):
    (one, first, ctx), (two, second, _) = asked(name), asked(name)
    assert one.phi.shape == () and not one.phi.requires_grad and torch.isfinite(one.phi)
    assert float(one.phi) == float(two.phi) and float(one.term.detach()) == pytest.approx(float(one.phi))
    assert torch.isfinite(first).all() and first.norm() > 0 and torch.equal(first, second)
    assert ctx.images > 0 and all(torch.isfinite(torch.tensor(float(v))) for v in one.metrics.values())


@every_evaluator
def test_the_forget_images_are_pulled_and_where_is_said(name):
    found, _, _ = asked(name)
    parts = torch.autograd.grad(found.term, found.places, allow_unused=True)
    assert any(part is not None and part.norm() > 0 for part in parts)


@every_evaluator
def test_it_shows_branches_of_every_image_for_the_other_terms(name):
    found, _, ctx = asked(name)
    for images, branches in ((5, found.third), (4, found.forget)):
        for each in branches:
            assert each.output.shape[:2] == (ctx.objective.branches, images) and each.output.requires_grad
