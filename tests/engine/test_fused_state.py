"""The fused optimizer steps as the plain one, and goes on from saved state bit for bit, its counter in its place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distunlearn.engine.backends.optimizer_state import counter, entries_of, nested, spread_state
from distunlearn.engine.optimizer import make_optimizer


def gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def trained(optimizer: torch.optim.Optimizer, model: nn.Module, steps: range) -> None:
    for step in steps:
        gradients(model, step)
        optimizer.step()


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_it_steps_as_torchs_plain_optimizer_in_float64(name):
    model, plain = fresh().double(), fresh().double()
    groups = [{"params": [p for p in plain.parameters() if p.ndim > 1], "weight_decay": 0.1},
              {"params": [p for p in plain.parameters() if p.ndim <= 1], "weight_decay": 0.0}]  # fmt: skip
    reference = (
        torch.optim.AdamW(groups, lr=0.1, fused=False, foreach=False)
        if name == "adamw"
        else torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=False)
    )
    for optimizer, own in ((make_optimizer(name, model.parameters(), 0.1, 0.1), model), (reference, plain)):
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            for p in own.parameters():
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_it_goes_on_from_saved_state_bit_for_bit():
    model = fresh()
    optimizer = make_optimizer("adamw", model.parameters(), 0.1, 0.1)
    trained(optimizer, model, range(3))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    entries = entries_of(optimizer, dict(model.named_parameters()))
    saved = nested("AdamW", [(f"{name}/{key}", value.clone()) for name, key, value in entries])
    trained(optimizer, model, range(3, 6))

    again = fresh()
    again.load_state_dict(weights)
    resumed = make_optimizer("adamw", again.parameters(), 0.1, 0.1)
    spread_state(saved, resumed, dict(again.named_parameters()), lambda value, p: value.to(p.device, copy=True))
    trained(resumed, again, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))

    without = make_optimizer("adamw", (other := fresh()).parameters(), 0.1, 0.1)
    other.load_state_dict(weights)
    trained(without, other, range(3, 6))
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_counter_lies_where_the_optimizer_looks_for_it():
    """torch's fused kernels want the counter on the weights' device, the others want it on the CPU."""
    weight = nn.Parameter(torch.zeros(2))
    fused, plain = torch.optim.AdamW([weight], fused=True), torch.optim.AdamW([weight])
    step = torch.tensor(4.0)
    assert counter(step, fused, torch.device("meta")).device.type == "meta"
    assert counter(step, plain, torch.device("meta")).device.type == "cpu"
    copied = counter(step, fused, torch.device("cpu"))
    assert copied == 4 and copied is not step and copied.data_ptr() != step.data_ptr()
    assert counter(7, fused, torch.device("meta")) == 7
