"""The fused optimizer goes on from saved state bit for bit, its counter in its place."""

from __future__ import annotations

import torch
from torch import nn

from distunlearn.config.schema import OptimizerConfig
from distunlearn.engine.backends.optimizer_state import counter, entries_of, nested, spread_state
from distunlearn.engine.optimizer import make_optimizer

SETTINGS = OptimizerConfig(lr=0.1, weight_decay=0.1)


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


def test_it_goes_on_from_saved_state_bit_for_bit():
    model = fresh()
    optimizer = make_optimizer(SETTINGS, model)
    trained(optimizer, model, range(3))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    entries = entries_of(optimizer, dict(model.named_parameters()))
    saved = nested("AdamW", [(f"{name}/{key}", value.clone()) for name, key, value in entries])
    trained(optimizer, model, range(3, 6))

    again = fresh()
    again.load_state_dict(weights)
    resumed = make_optimizer(SETTINGS, again)
    spread_state(saved, resumed, dict(again.named_parameters()), lambda value, p: value.to(p.device, copy=True))
    trained(resumed, again, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))

    without = make_optimizer(SETTINGS, other := fresh())
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
