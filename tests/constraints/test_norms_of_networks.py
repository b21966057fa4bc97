"""Norms of per-sample gradients over whole networks: against one sample at a time, and the memory that they take."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distunlearn.constraints.gradients.ghost_norms import Recorder
from distunlearn.constraints.gradients.layers import probed_layers

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from constraint_cost import peak_bytes  # noqa: E402


def _mlp() -> tuple[nn.Module, Tensor]:
    widths = [512, 1024, 1024, 512, 128]
    layers: list[nn.Module] = []
    for p, d in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(p, d, bias=False), nn.GELU()]
    return nn.Sequential(*layers[:-1]), torch.randn(64, 512)


def _tokens() -> tuple[nn.Module, Tensor]:
    """The linear layers of a ViT-Ti's blocks, without attention."""
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(192, 768, bias=False), nn.GELU(), nn.Linear(768, 192, bias=False)]
    return nn.Sequential(*layers), torch.randn(32, 64, 192)


def _conv() -> tuple[nn.Module, Tensor]:
    """The convolutions of a narrow ResNet."""
    layers: list[nn.Module] = []
    for p, d, stride in ((3, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)):
        layers += [nn.Conv2d(p, d, 3, stride, 1, bias=False), nn.ReLU()]
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 64, bias=False)]
    return nn.Sequential(*layers, *tail), torch.randn(32, 3, 32, 32)


NETWORKS: Mapping[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "Linear, one row a sample": _mlp,
    "Linear, 64 tokens a sample": _tokens,
    "Conv2d, 32 x 32 pixels": _conv,
}


def losses(output: Tensor) -> Tensor:
    """l_i, [n]."""
    return output.flatten(1).square().mean(1)


def our_norms(network: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A function that returns the norms, [n]."""
    layers = probed_layers(network)

    def run() -> Tensor:
        recorder = Recorder(layers, len(x))
        with recorder.recording():
            total = losses(network(x)).sum()
        return recorder.gradients(total, len(x), kept=0).norm()

    return run


def brute_force(network: nn.Module, x: Tensor) -> Tensor:
    """The same sample by sample, in float64."""
    network, weights = network.double(), list(network.parameters())
    found = [
        torch.stack([g.square().sum() for g in torch.autograd.grad(losses(network(row[None].double())).sum(), weights)])
        for row in x
    ]
    return torch.stack(found).sum(1).sqrt()


@pytest.mark.parametrize("name", NETWORKS)
def test_norms_are_those_of_single_samples(name):
    torch.manual_seed(0)
    network, x = NETWORKS[name]()
    x = x[:3]
    torch.testing.assert_close(our_norms(network, x)().double(), brute_force(copy.deepcopy(network), x), rtol=1e-5,
                               atol=0)  # fmt: skip


def test_memory_of_norms_does_not_grow_with_depth_as_gradients_would():
    """A deeper network keeps more inputs; gradients of outputs, which took as much again, are dropped as they come."""
    width, rows = 64, 512

    def peak(depth: int) -> int:
        layers = [torch.nn.Linear(width, width, bias=False) for _ in range(depth)]
        return peak_bytes(our_norms(torch.nn.Sequential(*layers), torch.randn(rows, width)))

    tensor = 4 * rows * width
    assert (peak(24) - peak(12)) / 12 == pytest.approx(tensor, rel=0.1)  # each layer's input, nothing else
