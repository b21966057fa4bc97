"""Whole-network gradient norms against one backward pass per image in float64, and what would be wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parts import objective_settings

from distunlearn.audit.signals import gradient_norms
from distunlearn.audit.signals.gradient_norms import network_gradient_norms
from distunlearn.config.schema import EncoderConfig, RunConfig
from distunlearn.encoders.model import MomentumEncoder, build_model
from distunlearn.objectives import Bank, Branches, make_objective
from distunlearn.objectives.memory_bank import normalise

RESNET = EncoderConfig(
    name="resnet18",
    image_size=16,
    in_chans=1,
    stem="deep",
    args={"stem_width": 4, "channels": [4, 8, 8, 8], "layers": [1, 1, 1, 1]},
)
VIT = EncoderConfig(
    name="vit_tiny_patch16_224", image_size=16, in_chans=1, stem="standard",
    args={"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "class_token": False, "global_pool": "avg"},
)  # fmt: skip
OBJECTIVES = ("simclr", "moco", "mocov3", "byol", "supervised")


def setting(encoder: EncoderConfig, name: str, n: int = 5):
    """A float64 model with running statistics that are not the initial ones, a batch, its branches and a bank."""
    cfg = RunConfig(encoder=encoder, objective=objective_settings(name=name, hidden_dim=10, output_dim=6))
    model = build_model(cfg, 4).double()
    generator = torch.Generator().manual_seed(3)
    views = torch.randn(2, n, 1, 16, 16, generator=generator, dtype=torch.float64)
    model(torch.randn(32, 1, 16, 16, generator=generator, dtype=torch.float64))
    model.eval()
    objective = make_objective(objective_settings(name, hidden_dim=10, output_dim=6, temperature=0.3))
    momentum = MomentumEncoder(model)
    momentum.model.double()
    target = torch.stack([momentum(view).projection for view in views.flip(0)]) if objective.needs_momentum else None
    bank = None
    if objective.uses_bank:
        keys = normalise(torch.randn(7, 6, generator=generator, dtype=torch.float64))
        bank = Bank(keys, torch.arange(100, 107), 0.3)

    def branches(rows: slice) -> Branches:
        outs = [model(view[rows]) for view in views[: objective.branches]]
        part = None if target is None else target[: objective.branches, rows]
        labels = (torch.arange(n) % 4)[rows]
        return Branches(
            torch.stack([o.output for o in outs]),
            torch.stack([o.hidden for o in outs]),
            part,
            labels,
            torch.arange(n)[rows],
        )

    return model, objective, views[: objective.branches], branches, bank


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("encoder", [RESNET, VIT], ids=["resnet", "vit"])
def test_norms_are_those_of_one_backward_pass_per_image(encoder, name, monkeypatch):
    monkeypatch.setattr(gradient_norms, "CHUNK_VIEWS", 5)  # chunks of 2, 2 and 1 images with two views each
    model, objective, views, branches, bank = setting(encoder, name)
    with torch.no_grad():
        delta = objective.per_sample_delta(branches(slice(None)), bank)
    found = network_gradient_norms(model, views, delta)
    expected = []
    for i in range(views.shape[1]):
        loss = objective.per_sample_loss(branches(slice(i, i + 1)), bank)[0]
        parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        expected.append(sum(float(g.square().sum()) for g in parts if g is not None) ** 0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert min(expected) > 1e-8  # else equal norms would say nothing


def test_fewer_images_at_a_time_where_memory_runs_out(monkeypatch):
    model, objective, views, branches, bank = setting(RESNET, "simclr", n=7)
    with torch.no_grad():
        delta = objective.per_sample_delta(branches(slice(None)), bank)
    whole = network_gradient_norms(model, views, delta)
    tried, most = [], 3

    ghosts = gradient_norms._ghost_squares

    def scarce(model, layers, views, delta):
        tried.append(views.shape[1])
        if views.shape[1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ghosts(model, layers, views, delta)

    monkeypatch.setattr(gradient_norms, "_ghost_squares", scarce)
    monkeypatch.setattr(gradient_norms, "CHUNK_VIEWS", 10)
    np.testing.assert_allclose(network_gradient_norms(model, views, delta), whole, rtol=1e-12)
    assert tried == [5, 2, 2, 2, 1]
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        network_gradient_norms(model, views, delta)


def test_leaving_out_a_branch_is_noticed():
    """Negative control: the norm of one branch alone is another number."""
    model, objective, views, branches, bank = setting(RESNET, "simclr")
    with torch.no_grad():
        delta = objective.per_sample_delta(branches(slice(None)), bank)
    whole = network_gradient_norms(model, views, delta)
    half = network_gradient_norms(model, views[:1], delta[:1])
    assert np.abs(whole / half - 1).min() > 1e-3


def test_training_mode_is_refused():
    model, _, views, _, _ = setting(RESNET, "simclr")
    model.train()
    with pytest.raises(AssertionError, match="evaluation mode"):
        network_gradient_norms(model, views, torch.zeros(2, views.shape[1], 6, dtype=torch.float64))


def test_frozen_weights_do_not_count():
    model, objective, views, branches, bank = setting(RESNET, "simclr")
    with torch.no_grad():
        delta = objective.per_sample_delta(branches(slice(None)), bank)
    whole = network_gradient_norms(model, views, delta)
    model.backbone.requires_grad_(False)
    assert (network_gradient_norms(model, views, delta) < whole).all()


@pytest.mark.parametrize("encoder", [RESNET, VIT], ids=["resnet", "vit"])
def test_float32_is_within_1e_5_of_a_float64_gradient_of_each_image(encoder):
    """The bound, with nearly all weights as ghosts; a layer that is left out is noticed."""
    model, objective, views, branches, bank = setting(encoder, "simclr", n=12)
    with torch.no_grad():
        delta = objective.per_sample_delta(branches(slice(None)), bank)
    expected = []
    for i in range(views.shape[1]):
        loss = objective.per_sample_loss(branches(slice(i, i + 1)), bank)[0]
        parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        expected.append(sum(float(g.square().sum()) for g in parts if g is not None) ** 0.5)
    model.float()
    found = network_gradient_norms(model, views.float(), delta.float())
    assert np.abs(found / expected - 1).max() < 1e-5
    trained = dict(model.named_parameters())
    ghosts = gradient_norms._ghosts(model, trained)
    share = sum(layer.weight.numel() for layer in ghosts.values()) / sum(p.numel() for p in trained.values())
    assert share > 0.9
    last = next(reversed(ghosts))
    dict(model.named_modules())[last].requires_grad_(False)
    assert np.abs(network_gradient_norms(model, views.float(), delta.float()) / expected - 1).max() > 1e-3


def test_a_weight_of_two_layers_counts_once_with_the_sum_of_both_gradients():
    model, objective, views, branches, bank = setting(VIT, "simclr")
    first, second = model.backbone.blocks[0].mlp.fc1, model.backbone.blocks[1].mlp.fc1
    second.weight = first.weight
    assert not any("fc1" in name for name in gradient_norms._ghosts(model, dict(model.named_parameters())))
    with torch.no_grad():
        delta = objective.per_sample_delta(branches(slice(None)), bank)
    loss = objective.per_sample_loss(branches(slice(0, 1)), bank)[0]
    parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    expected = sum(float(g.square().sum()) for g in parts if g is not None) ** 0.5
    np.testing.assert_allclose(network_gradient_norms(model, views, delta)[0], expected, rtol=1e-10)
