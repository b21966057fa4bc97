"""Probes and ghost gradients against torch.func in float64, and what happens when they are used wrongly."""

from __future__ import annotations

import copy

import pytest
import small
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointError

from distunlearn.constraints.gradients.ghost_norms import Recorder
from distunlearn.constraints.gradients.layers import probed_layers
from distunlearn.constraints.gradients.probes import ProbeSet
from distunlearn.constraints.gradients.shared_activations import shared_pattern
from distunlearn.errors import ConfigError

N, VIEWS = 3, 2


def problem(encoder: str):
    """A model in float64 and evaluation mode, VIEWS * N images branch by branch, weights of a loss of each sample."""
    ctx = small.context(small.config(encoder.removesuffix(" channels last"), "sketch"))
    if encoder.endswith("channels last"):
        ctx.model.to(memory_format=torch.channels_last)
    g = torch.Generator().manual_seed(0)
    images = torch.randn(VIEWS * N, 1, 16, 16, generator=g, dtype=torch.float64)
    weights = torch.randn(VIEWS * N, 6, generator=g, dtype=torch.float64)
    return ctx.model.eval(), images, weights


def loss(output: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (output.square() * weights + output.sin()).sum()


def per_sample(model, images, weights, names):
    """Gradients of every sample's loss over its views by vmap(grad), [n, ...] by layer."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def one(parameters, x, w):
        return loss(functional_call(model, (parameters, buffers), (x,)).output, w)

    def views(x):
        return x.view(VIEWS, N, *x.shape[1:])

    with sdpa_kernel(SDPBackend.MATH):
        found = vmap(grad(one), in_dims=(None, 1, 1))(parameters, views(images), views(weights))
    return {name: found[f"{name}.weight"] for name in names}


@pytest.mark.parametrize("encoder", ["vit", "resnet", "resnet channels last"])
def test_gradients_of_cores_are_sketches_of_per_sample_gradients(encoder):
    model, images, weights = problem(encoder)
    probes = ProbeSet(probed_layers(model), 3, 2, seed=1, step=4, dtype=torch.float64)
    kinds = {type(layer) for layer in probes.layers.values()}
    assert kinds == {nn.Linear, nn.Conv2d} and len(probes.layers) > 10
    leaves = probes.leaves(N)
    with probes.listening(leaves, torch.arange(N).repeat(VIEWS)):
        found = torch.autograd.grad(loss(model(images).output, weights), leaves)
    exact = per_sample(model, images, weights, probes.layers)
    for name, sketch, inner, outer in zip(probes.layers, found, probes.ins, probes.outs, strict=True):
        expected = outer.T @ exact[name].flatten(2) @ inner.flatten(1).T
        assert (sketch - expected).norm() <= 1e-12 * expected.norm(), name
    wrong = probes.leaves(N)
    with probes.listening(wrong, torch.arange(N).repeat_interleave(VIEWS)):  # negative control: rows of other samples
        found = torch.autograd.grad(loss(model(images).output, weights), wrong)
    assert (found[0] - outer.T @ exact[name].flatten(2) @ inner.flatten(1).T).norm() > 1e-2


@pytest.mark.parametrize("encoder", ["vit", "resnet"])
def test_ghost_norms_are_those_of_per_sample_gradients(encoder):
    model, images, weights = problem(encoder)
    recorder = Recorder(probed_layers(model), len(images))
    with recorder.recording():
        total = loss(model(images).output, weights)
    found = recorder.gradients(total, N)
    forms = {type(part).__name__ for part in found._parts.values()}
    assert forms == {"_Gram", "_Whole"}  # both forms of the norm are at work
    exact = per_sample(model, images, weights, recorder.layers)
    expected = torch.stack([g.flatten(1).square().sum(1) for g in exact.values()]).sum(0).sqrt()
    assert (found.norm() - expected).abs().max() <= 1e-12 * expected.max()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 5),
        nn.Conv2d(3, 5, 3, padding=1),
        nn.Conv2d(3, 5, (3, 2), stride=2, padding=(2, 1), dilation=2, bias=False),
        nn.Conv2d(3, 5, 2, stride=2),
        nn.Conv2d(3, 5, 3, padding=1).to(memory_format=torch.channels_last),
    ],
    ids=["linear", "conv", "strided", "patches", "channels last"],
)
def test_a_probed_row_sees_other_weights(layer):
    """Each row's output is that of the layer with this row's weight: for probes and for ghost gradients."""
    layer = copy.deepcopy(layer).double()
    g = torch.Generator().manual_seed(0)
    shape = (4, 7, 4) if isinstance(layer, nn.Linear) else (4, 3, 9, 8)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    rows, signs = torch.tensor([1, 0, 1, 0]), torch.tensor([1.0, -1.0, -0.5, 0.0], dtype=torch.float64)
    probes = ProbeSet({"it": layer}, 3, 2, seed=0, step=0, dtype=torch.float64)
    core = torch.randn(2, 3, 2, generator=g, dtype=torch.float64)
    change = probes.outs[0] @ core @ probes.ins[0].flatten(1)
    with probes.armed([core], rows, signs.tolist()):
        found = layer(x)
    with probes.armed([core], rows[:3], signs[:3].tolist()):  # none without a sign: nothing is picked
        torch.testing.assert_close(layer(x[:3]), found[:3], rtol=1e-12, atol=1e-12)
    recorder = Recorder({"it": layer}, 4)
    with recorder.recording():
        total = (layer(x).square().flatten(1).sum(1) * torch.arange(1.0, 5.0)).sum()
    ghost = recorder.gradients(total, 4, kept=3)
    steps = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    with ghost.armed((1.0, -1.0, -0.5, 0.0, 1.0, 1.0, 0.5, 0.0), steps):  # the kept three twice, and rows without sign
        stepped = layer(x[[0, 1, 2, 3, 0, 1, 2, 0]])
    still = layer(x)
    for at, row in ((3, 3), (7, 0)):
        torch.testing.assert_close(stepped[at], still[row], rtol=0, atol=1e-14)
    torch.testing.assert_close(stepped[4] - still[0], stepped[0] - still[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(stepped[6] - still[2], still[2] - stepped[2], rtol=1e-9, atol=1e-12)
    for row in range(4):

        def moved(by, row=row):
            changed = dict(layer.named_parameters()) | {"weight": layer.weight + by.view_as(layer.weight)}
            return functional_call(layer, changed, (x[row : row + 1],))

        torch.testing.assert_close(found[row : row + 1], moved(signs[row] * change[rows[row]]), rtol=1e-12, atol=1e-12)
        if row < ghost.kept:
            weight = torch.autograd.grad(layer(x[row : row + 1]).square().sum() * (row + 1), layer.weight)[0]
            expected = moved(signs[row] * steps[row] * weight)
            torch.testing.assert_close(stepped[row : row + 1], expected, rtol=1e-12, atol=1e-9)


def test_random_matrices_are_alike_everywhere_new_every_step_and_keep_the_norm():
    layers = {"a": nn.Linear(40, 30), "b": nn.Conv2d(3, 4, 2)}
    first, again, later = (ProbeSet(layers, 8, 8, seed=3, step=step) for step in (5, 5, 6))
    assert all(torch.equal(x, y) for x, y in zip(first.ins + first.outs, again.ins + again.outs, strict=True))
    assert not torch.equal(first.ins[0], later.ins[0])
    matrix = layers["a"].weight.detach()
    squares = [
        (p.outs[0].T @ matrix @ p.ins[0].T).square().sum()
        for p in (ProbeSet(layers, 8, 8, seed=0, step=step) for step in range(200))
    ]
    assert float(torch.stack(squares).mean() / matrix.square().sum()) == pytest.approx(1, abs=0.2)


def test_layers_are_chosen_by_name_and_frozen_ones_left_out():
    model = small.context(small.config("resnet", "sketch")).model
    assert set(probed_layers(model, r"layer4|last")) < set(probed_layers(model))
    model.backbone.requires_grad_(False)
    assert all("projector" in name for name in probed_layers(model))
    with pytest.raises(ConfigError, match="finds no trained"):
        probed_layers(model, "layer4")


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
             nn.Conv2d(4, 4, 3, padding="same")],
)  # fmt: skip
def test_convolutions_that_probes_cannot_follow_are_left_out(conv):
    with pytest.raises(ConfigError, match=r"can follow; left out: 1 convolutions .* \(0\)"):
        probed_layers(nn.Sequential(conv))
    assert list(probed_layers(nn.Sequential(conv, nn.Conv2d(4, 4, 3)))) == ["1"]


def test_probes_must_span_a_backward_that_runs_the_forward_again():
    """Activation checkpointing: armed to the end it changes nothing, disarmed early it is an error."""
    model, images, weights = problem("vit")
    probes = ProbeSet(probed_layers(model), 3, 2, seed=1, step=4, dtype=torch.float64)
    core = [torch.full((N, 3, 2), 0.01, dtype=torch.float64) for _ in probes.layers]
    rows, parameters = torch.arange(N).repeat(VIEWS), list(model.parameters())

    def gradient() -> torch.Tensor:
        with probes.armed(core, rows):
            return small.flat(torch.autograd.grad(loss(model(images).output, weights), parameters))

    expected = gradient()
    model.train()  # timm runs checkpoints in training mode; batch norms stay as they were
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    model.backbone.set_grad_checkpointing(True)
    assert small.relative(gradient(), expected) < 1e-12
    with probes.armed(core, rows):
        value = loss(model(images).output, weights)
    with pytest.raises(CheckpointError):
        torch.autograd.grad(value, parameters)


def test_copies_share_the_pattern_of_their_midpoint():
    relu, pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
    x = torch.tensor([[0.3], [-0.2], [0.5], [-0.4], [0.1], [-1.0]])  # +, +, -, -, and two without a copy
    moved = torch.tensor([[0.3], [0.2], [-0.1], [-0.4], [0.1], [-1.0]]).requires_grad_()
    with shared_pattern(relu, 2, 6):
        out = relu(moved * 1)
    assert torch.equal(out.detach().flatten(), torch.tensor([0.3, 0.0, -0.1, 0.0, 0.1, 0.0]))
    out.sum().backward()
    assert moved.grad.flatten().tolist() == [1, 0, 1, 0, 1, 0]
    with shared_pattern(relu, 2, 6):
        same = relu(x.clone())
    assert same.flatten()[4:].tolist() == pytest.approx([0.1, 0.0])
    plus, minus = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[2.5, 1.0], [0.0, 0.0]])
    with shared_pattern(pool, 1, 2):
        taken = pool(torch.stack([plus, minus])[:, None]).flatten()
    assert taken.tolist() == [1.0, 2.5]  # the midpoint is largest at the first element
    assert pool(plus[None, None]).item() == 2.0  # outside the block nothing is changed


def test_rows_that_are_windows_go_with_their_sample_and_a_table_of_all_samples_keeps_its_pattern():
    class Windows(nn.Module):
        """Two windows of each sample; and a table, as Swin v2 has one for its positions."""

        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):  # [R, 2]
            return self.relu(x.flatten()[:, None]).view_as(x), self.relu(torch.tensor([[1.0, -1.0]]))

    x = torch.tensor([[0.3, -0.2], [-0.1, 0.4], [1.0, -1.0]])  # +, -, and one without a copy
    model = Windows()
    with shared_pattern(model, 1, 3):
        out, table = model(x)
    assert torch.equal(out, torch.tensor([[0.3, -0.2], [-0.1, 0.4], [1.0, 0.0]]))
    assert torch.equal(table, torch.tensor([[1.0, 0.0]]))
