"""Two small encoders, one loss, and the plain torch loop that every backend must agree with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distunlearn.config.schema import OptimizerConfig
from distunlearn.distributed.collectives import gather_sizes, get_rank, get_world, mean_scale
from distunlearn.encoders.model import MomentumEncoder, batchnorm_mode
from distunlearn.engine.optimizer import make_optimizer
from distunlearn.objectives.simclr import nt_xent

SIDE, OUT = 8, 6
RATES = (0.05, 0.02, 0.04, 0.01)  # another one every step: a backend that ignores the schedule fails


class Output(NamedTuple):
    embedding: Tensor
    output: Tensor


class Conv(nn.Module):
    """Convolutions and linear layers with batch norms, stages named as a ResNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.predictor = nn.Sequential(nn.Linear(6, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, OUT))

    def forward(self, images: Tensor) -> Output:
        embedding = self.layer1(self.bn(self.conv(images)).relu()).mean((2, 3))
        return Output(embedding, self.predictor(embedding))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 11), nn.GELU(), nn.Linear(11, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.mlp(x)


class Vit(nn.Module):
    """Patches, two blocks, a head with a batch norm, as self-supervised ViTs have."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 5, 4, stride=4)
        self.position = nn.Parameter(0.02 * torch.randn(1, 4, 5))
        self.blocks = nn.Sequential(Block(5), Block(5))
        self.predictor = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.GELU(), nn.Linear(9, OUT))

    def forward(self, images: Tensor) -> Output:
        tokens = self.patch(images).flatten(2).transpose(1, 2) + self.position
        embedding = self.blocks(tokens).mean(1)
        return Output(embedding, self.predictor(embedding))


MODELS: dict[str, Callable[[], nn.Module]] = {"conv": Conv, "vit": Vit, "frozen": Conv}


def build(name: str, seed: int = 0) -> nn.Module:
    """ "frozen" is the convolutional encoder whose early layers are not trained, as under a foreign checkpoint."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name]()
    if name == "frozen":
        model.conv.requires_grad_(False)
        model.layer1.requires_grad_(False)
    return model


def optimizer_of(model: nn.Module, name: str = "sgd") -> torch.optim.Optimizer:
    """With two parameter groups, as every training of the package has."""
    return make_optimizer(OptimizerConfig(optimizer=name, lr=1.0, weight_decay=1e-2, trust=0.5), model)


def share(count: int) -> slice:
    edges = [count * r // get_world() for r in range(get_world() + 1)]
    return slice(edges[get_rank()], edges[get_rank() + 1])


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, forward: Callable[[Tensor], Output], step: int, count: int) -> Tensor:
    """This rank's part of NT-Xent over the global batch plus an eval-mode term from a second forward."""
    views = torch.stack([images(count, 100 + step), images(count, 200 + step)])[:, share(count)]
    output = forward(views.flatten(0, 1)).output
    contrast = nt_xent(output.view(2, -1, OUT), 0.2)
    with batchnorm_mode(model, "eval"):
        second = forward(images(count, 300 + step)[share(count)]).output
    scale = mean_scale(gather_sizes(second.shape[0], second.device))
    return 5 * contrast + scale * second.square().sum()  # gradient norms above 1: a clip at 1 by default would show


class Reference(NamedTuple):
    """Parameters and buffers before, after every step; gradient norms; the momentum encoder at the end."""

    states: list[dict[str, Tensor]]
    norms: list[float]
    momentum: dict[str, Tensor]


def snapshot(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def reference(
    name: str, *, count: int, steps: int = 4, clip: float = 0.0, optimizer: str = "sgd", parts: int = 1, first: int = 0
) -> Reference:
    """Plain torch in one process, without any part of the backends.

    parts: micro-batches a step, whose gradients are averaged; those before `first` are left out.
    """
    model = build(name)
    update = optimizer_of(model, optimizer)
    momentum = MomentumEncoder(model)
    states, norms = [snapshot(model.state_dict())], []
    for step in range(steps):
        for group in update.param_groups:
            group["lr"] = RATES[step]
        for micro in range(parts):
            loss = loss_of(model, model, step * parts + micro, count) / parts
            (loss if micro >= first else 0 * loss).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))))
        update.step()
        update.zero_grad()
        momentum.update(model, 0.5)
        states.append(snapshot(model.state_dict()))
    return Reference(states, norms, snapshot(momentum.state_dict()))


def update_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """Norm of the difference between two trainings, relative to how far the expected one went from `start`."""
    assert found.keys() == expected.keys()
    floats = [name for name, value in expected.items() if value.is_floating_point()]
    off = sum(float((found[n].double() - expected[n].double()).square().sum()) for n in floats)
    way = sum(float((expected[n].double() - start[n].double()).square().sum()) for n in floats)
    assert way > 0, "the reference did not move"
    return (off / way) ** 0.5
