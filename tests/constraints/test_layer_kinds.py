"""Probes on layers of every family of encoders, against one backward pass for each sample alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parents[1] / "encoders"))

from encoder_configs import run_config  # noqa: E402
from families import FAMILIES, family  # noqa: E402

from distunlearn.constraints.gradients.ghost_norms import Recorder  # noqa: E402
from distunlearn.constraints.gradients.layers import followed_layers, left_out, left_out_text  # noqa: E402
from distunlearn.constraints.gradients.probes import ProbeSet  # noqa: E402
from distunlearn.encoders.model import ContrastiveModel, Head, build_model  # noqa: E402

N, VIEWS = 3, 2


def spread_out(model: nn.Module) -> nn.Module:
    """Weights that are 0 in a fresh model (scales at the end of a block) hide what lies before them."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any() or weight.abs().max() < 1e-4:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=g, dtype=weight.dtype))
    return model.double().eval()


def problem(model: ContrastiveModel) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    images = torch.rand(VIEWS * N, *model.image_shape, generator=g, dtype=torch.float64) * 2 - 1
    return images, torch.randn(VIEWS * N, model(images).output.shape[1], generator=g, dtype=torch.float64)


def loss(output: Tensor, weights: Tensor) -> Tensor:
    return (torch.tanh(output) * weights).sum()


def alone(model: ContrastiveModel, images: Tensor, weights: Tensor, layers: dict) -> list[dict[str, Tensor]]:
    """The gradients of every sample's loss, from a forward of its own views and nothing else."""
    found = []
    for i in range(N):
        rows = [view * N + i for view in range(VIEWS)]
        one = loss(model(images[rows]).output, weights[rows])
        found.append(dict(zip(layers, torch.autograd.grad(one, [la.weight for la in layers.values()]), strict=True)))
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_sketches_and_norms_are_those_of_each_sample_alone(name):
    model = spread_out(build_model(run_config(family(name)), None))
    images, weights = problem(model)
    layers = followed_layers(model, model)
    left = left_out_text(left_out(model, model))
    expected_left = FAMILIES[name][2]
    assert all(reason in left for reason in expected_left) and bool(left) == bool(expected_left), left
    gradients = alone(model, images, weights, layers)

    probes = ProbeSet(layers, 3, 2, seed=1, step=4, dtype=torch.float64)
    leaves = probes.leaves(N)
    with probes.listening(leaves, torch.arange(N).repeat(VIEWS)):
        found = torch.autograd.grad(loss(model(images).output, weights), leaves)
    for at, (layer, inner, outer) in enumerate(zip(layers, probes.ins, probes.outs, strict=True)):
        exact = torch.stack([outer.T @ g[layer].flatten(1) @ inner.flatten(1).T for g in gradients])
        assert (found[at] - exact).norm() <= 1e-9 * exact.norm() + 1e-14, layer

    recorder = Recorder(layers, len(images))
    with recorder.recording():
        total = loss(model(images).output, weights)
    ghost = recorder.gradients(total, N)
    exact = torch.stack([torch.stack([w.square().sum() for w in g.values()]).sum().sqrt() for g in gradients])
    torch.testing.assert_close(ghost.norm(), exact, rtol=1e-9, atol=0)

    cores = [
        0.05 * torch.randn(N, 3, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64) for _ in layers
    ]
    signs = ([1.0] * (N - 1) + [0.0]) * VIEWS
    changes = [
        outer @ core @ inner.flatten(1) for core, inner, outer in zip(cores, probes.ins, probes.outs, strict=True)
    ]
    with torch.no_grad(), probes.armed(cores, torch.arange(N).repeat(VIEWS), signs):
        output = model(images).output
    check_moved(model, images, output, layers, lambda layer, i: (i < N - 1) * changes[layer][i])
    with torch.no_grad(), ghost.armed([0.5] * len(images), torch.full((N,), 0.1, dtype=torch.float64)):
        output, names = model(images).output, list(layers)
    check_moved(model, images, output, layers, lambda layer, i: 0.05 * gradients[i][names[layer]])


@torch.no_grad()
def check_moved(model, images, output, layers, change) -> None:
    """Every row of an output is that of a model whose weights have this sample's change."""
    for i in range(N):
        changed = {
            f"{name}.weight": layer.weight + change(at, i).view_as(layer.weight)
            for at, (name, layer) in enumerate(layers.items())
        }
        own = functional_call(model, changed, (images[i : i + 1],)).output
        torch.testing.assert_close(output[i : i + 1], own, rtol=1e-8, atol=1e-10)


class Sequence(nn.Module):
    """Tokens first, as torch's own transformers have them; a table of all images; attention and a 1-d convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.mix = nn.Linear(8, 8)  # [tokens, n, 8]: a coincidence of sizes is no excuse
        self.table = nn.Parameter(torch.randn(9, 4))
        self.place = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.along = nn.Conv1d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 8)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).permute(2, 0, 1)
        tokens = self.mix(tokens) + self.place(self.table)[:, None]
        tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        return self.last(self.along(tokens.permute(1, 2, 0)).mean(2))


def test_layers_of_an_own_module_are_looked_at_not_assumed():
    torch.manual_seed(0)
    model = ContrastiveModel(Sequence(), Head(8, 6, 4), None, (3, 12, 12)).double().eval()
    said: list[str] = []
    layers = followed_layers(model, model, note=said.append)
    assert list(layers) == ["backbone.patch", "backbone.last", "projector.body.0", "projector.last"]
    assert followed_layers(model, model, note=said.append) == layers and len(said) == 1
    left = left_out(model, model)
    assert left == {
        "backbone.mix": "whose rows are not those of one image after the other",
        "backbone.place": "whose rows are not those of one image after the other",
        "backbone.attention": "neither nn.Linear nor nn.Conv2d",
        "backbone.attention.out_proj": "whose weight is used past their own forward, or not at all",
        "backbone.along": "neither nn.Linear nor nn.Conv2d",
    }
    assert "4 layers are probed" in said[0] and "backbone.mix" in said[0]
    images, weights = problem(model)
    control = {"backbone.mix": model.backbone.mix}  # taken for samples, tokens give other gradients
    probes = ProbeSet(control, 3, 2, seed=1, step=4, dtype=torch.float64)
    leaves = probes.leaves(9)
    rows = torch.arange(9)
    with probes.listening(leaves, rows):
        found = torch.autograd.grad(loss(model(images).output, weights), leaves)[0][:N]
    exact = torch.stack([
        probes.outs[0].T @ g["backbone.mix"] @ probes.ins[0].T for g in alone(model, images, weights, control)
    ])  # fmt: skip
    assert (found - exact).norm() > 0.1 * exact.norm()
