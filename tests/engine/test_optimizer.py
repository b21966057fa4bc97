"""Optimizers against steps written out in float64, what decays, and the rate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn

from distunlearn.config.checks import cross_checks
from distunlearn.config.schema import OptimizerConfig, PretrainConfig, RunConfig, UnlearnConfig
from distunlearn.engine.optimizer import learning_rate, make_optimizer, peak_rate

STEPS = 5
SETTINGS = {
    "adamw": OptimizerConfig(lr=0.1, weight_decay=0.1),
    "sgd": OptimizerConfig(optimizer="sgd", lr=0.1, weight_decay=0.1),
    "plain": OptimizerConfig(optimizer="sgd", lr=0.1, weight_decay=0.1, momentum=0.0),
    "nesterov": OptimizerConfig(optimizer="sgd", lr=0.1, weight_decay=0.1, nesterov=True),
    "all": OptimizerConfig(optimizer="sgd", lr=0.1, weight_decay=0.1, decay_all=True),
    "lars": OptimizerConfig(optimizer="lars", lr=0.1, weight_decay=0.1, trust=0.02),
    "lars nesterov": OptimizerConfig(optimizer="lars", lr=0.1, weight_decay=0.1, trust=0.02, nesterov=True),
    "lars without decay": OptimizerConfig(optimizer="lars", lr=0.1, weight_decay=0.0, trust=0.02),
    "lars all": OptimizerConfig(optimizer="lars", lr=0.1, weight_decay=0.1, trust=0.02, decay_all=True),
}


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()


def gradients(model: nn.Module, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in model.parameters()]


def trained(settings: OptimizerConfig) -> list[Tensor]:
    model = fresh()
    optimizer = make_optimizer(settings, model)
    for step in range(STEPS):
        for p, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            p.grad = gradient
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def written_out(settings: OptimizerConfig) -> list[Tensor]:
    """You, Gitman and Ginsburg (arXiv 1708.03888), algorithm 1; momentum as torch has it; AdamW as in its paper."""
    model, s = fresh(), settings
    weights = [p.detach().clone() for p in model.parameters()]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step in range(STEPS):
        for w, g, m, v in zip(weights, gradients(model, step), first, second, strict=True):
            decays = w.dim() > 1 or s.decay_all
            decay = s.weight_decay if decays else 0.0
            if s.optimizer == "adamw":
                m.copy_(0.9 * m + 0.1 * g)
                v.copy_(0.999 * v + 0.001 * g**2)
                scaled = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                w.sub_(s.lr * (decay * w + scaled))
                continue
            ratio = s.trust * w.norm() / (g.norm() + decay * w.norm() + 1e-8) if w.norm() > 0 else 1.0
            pull = (g + decay * w) * (ratio if s.optimizer == "lars" and decays else 1.0)
            m.copy_(s.momentum * m + pull)
            w.sub_(s.lr * (pull + s.momentum * m if s.nesterov else m))
    return weights


@pytest.mark.parametrize("name", SETTINGS)
def test_it_steps_as_written_out(name):
    for found, expected in zip(trained(SETTINGS[name]), written_out(SETTINGS[name]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_control_every_other_setting_leads_elsewhere(name):
    found = trained(SETTINGS[name])
    for other in SETTINGS.keys() - {name}:
        expected = written_out(SETTINGS[other])
        assert any((f - e).abs().max() > 1e-4 for f, e in zip(found, expected, strict=True)), other


@pytest.mark.parametrize(
    ("name", "spared"),
    [
        ("vit_tiny_patch16_224", {"backbone.cls_token", "backbone.pos_embed"}),
        ("vit_small_patch14_reg4_dinov2", {"backbone.cls_token", "backbone.reg_token", "backbone.pos_embed"}),
        ("swin_tiny_patch4_window7_224", {"backbone.layers.0.blocks.1.attn.relative_position_bias_table"}),
        ("convnext_atto", set()),
    ],
)  # fmt: skip
def test_biases_norms_positions_and_tokens_do_not_decay(name, spared):
    depth = {"depths": (2, 1, 1, 1)} if "swin" in name else {} if "convnext" in name else {"depth": 1}
    with torch.device("meta"):
        model = nn.ModuleDict(
            {"backbone": timm.create_model(name, num_classes=0, **depth), "projector": nn.Linear(4, 4)}
        )
    model.backbone = model["backbone"]
    named = {id(p): name for name, p in model.named_parameters()}
    decay = {
        g["weight_decay"]: {named[id(p)] for p in g["params"]}
        for g in make_optimizer(SETTINGS["sgd"], model).param_groups
    }
    assert decay.keys() == {0.0, 0.1}
    matrices = {n for n, p in model.named_parameters() if p.dim() > 1}
    assert spared <= decay[0.0] and "projector.weight" in decay[0.1] and "projector.bias" in decay[0.0]
    others = {n for n in decay[0.0] & matrices if "relative_position" not in n}
    assert others == {n for n in spared if "relative_position" not in n}


def test_frozen_weights_are_in_no_group():
    model = fresh()
    model[0].requires_grad_(False)
    for settings in (SETTINGS["sgd"], SETTINGS["all"]):
        groups = make_optimizer(settings, model).param_groups
        assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters() if p.requires_grad}


# -- the rate --------------------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[-1] < 0.001
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_the_peak_goes_by_the_global_batch():
    settings = PretrainConfig(lr=0.3, batch=1024)
    assert peak_rate(settings) == 0.3
    assert peak_rate(replace(settings, lr_scaling="linear")) == pytest.approx(1.2)
    assert peak_rate(replace(settings, lr_scaling="sqrt")) == pytest.approx(0.6)
    assert peak_rate(UnlearnConfig(lr=0.3, retain_batch=64, lr_scaling="linear")) == pytest.approx(0.075)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", ["pretrain", "unlearn"])
@pytest.mark.parametrize(
    ("backend", "changes", "problem"),
    [
        ("zero2", {"optimizer": "lars"}, "optimizer=lars needs the norm of every weight"),
        ("fsdp2", {"optimizer": "lars"}, None),
        ("zero2", {"optimizer": "sgd", "nesterov": True}, None),
        ("single", {"nesterov": True}, "nesterov=true needs momentum"),
        ("single", {"nesterov": True, "optimizer": "lars", "momentum": 0.0}, "nesterov=true needs momentum"),
    ],
)
def test_what_cannot_be_stepped_is_refused(section, backend, changes, problem):
    cfg = RunConfig(backend=backend)
    found = cross_checks(replace(cfg, **{section: replace(getattr(cfg, section), **changes)}))
    assert [p for p in found if problem is None or f"{section}.{problem}" in p] == found
    assert len(found) == (problem is not None)
