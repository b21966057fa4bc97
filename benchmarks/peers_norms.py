"""Norms of per-sample gradients over a whole network: ours (`constraints/ghost.py`) and Opacus' ghost clipping.

Both get the same network and images and return |d l_i / d W| over all weights, for a loss summed over samples. Opacus
gets them from an ordinary backward pass, which also makes the summed gradient of every weight, as its user does; ours
differentiates by the layers' outputs only. Networks have no biases and no normalisation, which the two treat
differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from distunlearn.constraints.gradients.ghost_norms import Recorder
from distunlearn.constraints.gradients.layers import probed_layers

__all__ = ["NETWORKS", "brute_force", "opacus_norms", "our_norms"]


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


def opacus_norms(network: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """The same by Opacus; hooks stay on the network, which must be its own copy."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        network, max_grad_norm=1.0, use_ghost_clipping=True, loss_reduction="sum"
    )

    def run() -> Tensor:
        losses(wrapped(x)).sum().backward()
        norms = wrapped.get_norm_sample()
        wrapped.zero_grad(set_to_none=True)
        return norms

    return run


def brute_force(network: nn.Module, x: Tensor) -> Tensor:
    """The same sample by sample, in float64."""
    network, weights = network.double(), list(network.parameters())
    found = [
        torch.stack([g.square().sum() for g in torch.autograd.grad(losses(network(row[None].double())).sum(), weights)])
        for row in x
    ]
    return torch.stack(found).sum(1).sqrt()
