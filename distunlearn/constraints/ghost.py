"""Exact per-sample gradient norms over many layers, and the probe along a sample's own gradient.

For a linear layer with inputs a_t and output gradients delta_t (t over tokens, positions, views of one sample),

    G_i = sum_t delta_t a_t^T,      |G_i|^2 = sum_{s,t} (delta_s . delta_t) (a_s . a_t)

by Gram matrices [T, T] where these are smaller than G_i itself, else from G_i (Li et al., arXiv 2110.05679, eq. 4, and
the choice between both: Bu et al., arXiv 2205.10683). A convolution is linear in its unfolded patches. Biases and
normalisation layers are left out.

The norm n_i = |(G_i)_layers| has the derivative <G_i / n_i, dG_i>, with the direction held (envelope theorem). The
ghost probe adds exactly this direction to the weights that sample i sees, by activations alone:

    y = W x + sign * rho / n_i * G_i x,     G_i x = sum_s delta_s (a_s . x)

so that [l_i(+) - l_i(-)] / 2 rho has the gradient of n_i up to O(rho^2). The probe is ours.

Shapes: n = samples, V = rows of a forward per sample (row v * n + i is sample i), T = tokens or positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distunlearn.constraints.probes import Layer

__all__ = ["GhostGradients", "Recorder"]


def columns(layer: Layer, x: Tensor) -> Tensor:
    """What the weight is multiplied with, [R, T, p]: tokens, or patches of a convolution's input."""
    if isinstance(layer, nn.Linear):
        return x.reshape(x.shape[0], -1, layer.in_features)
    return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2)


def tokens(layer: Layer, y: Tensor) -> Tensor:
    """The layer's output, or its gradient, as [R, T, d]."""
    if isinstance(layer, nn.Linear):
        return y.reshape(y.shape[0], -1, layer.out_features)
    return y.flatten(2).transpose(1, 2)


def by_sample(x: Tensor, count: int) -> Tensor:
    """[V * n, T, p] -> [n, V * T, p]."""
    return x.reshape(-1, count, *x.shape[1:]).transpose(0, 1).flatten(1, 2)


class Recorder:
    """Keeps inputs and outputs of layers over the forwards of one pass, to be differentiated by `gradients`."""

    def __init__(self, layers: dict[str, Layer]) -> None:
        self.layers = layers
        self._inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
        self._outputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within the block every forward of the model is recorded."""
        handles = [layer.register_forward_hook(self._hook(name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str):
        def keep(layer: Layer, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self._inputs[name].append(args[0].detach())
            self._outputs[name].append(output)
            return output.clone()  # what follows may write into its input, and the gradient is asked for here

        return keep

    def gradients(self, total: Tensor, count: int) -> GhostGradients:
        """Per-sample gradients of `total` = sum_i l_i, as factors; its graph is used up.

        Args:
            count: n; every forward had its rows branch by branch, n each.

        Raises:
            KeyError: a layer that was never called; the message is its name.
        """
        flat = [output for name in self.layers for output in self._outputs[name]]
        grads = iter(torch.autograd.grad(total, flat, allow_unused=True))
        parts: dict[str, _Factors] = {}
        for name, layer in self.layers.items():
            deltas = [next(grads) for _ in self._outputs[name]]
            if not deltas or any(delta is None for delta in deltas):
                raise KeyError(name)
            a = torch.cat([by_sample(columns(layer, x), count) for x in self._inputs[name]], dim=1)
            d = torch.cat([by_sample(tokens(layer, delta), count) for delta in deltas], dim=1)
            parts[name] = _Factors.made(a, d)
        return GhostGradients(self.layers, parts)


@dataclass(frozen=True, eq=False)
class _Factors:
    """G_i of one layer: as a [n, T, p] and delta [n, T, d], or as itself, [n, d, p], where that is smaller."""

    a: Tensor | None
    delta: Tensor | None
    whole: Tensor | None

    @classmethod
    def made(cls, a: Tensor, delta: Tensor) -> _Factors:
        if a.dtype in (torch.float16, torch.bfloat16) or delta.dtype != a.dtype:
            a, delta = a.float(), delta.float()
        if 2 * a.shape[1] ** 2 <= a.shape[2] * delta.shape[2]:
            return cls(a, delta, None)
        return cls(None, None, delta.transpose(1, 2) @ a)

    def squared_norm(self) -> Tensor:
        """|G_i|^2, [n]."""
        if self.whole is not None:
            return self.whole.square().sum((1, 2))
        return ((self.a @ self.a.transpose(1, 2)) * (self.delta @ self.delta.transpose(1, 2))).sum((1, 2))

    def times(self, x: Tensor, rows: Tensor) -> Tensor:
        """G_{rows} x for every row of x [R, T, p]: [R, T, d]."""
        if self.whole is not None:
            return x @ self.whole[rows].transpose(1, 2).to(x.dtype)
        return (x @ self.a[rows].transpose(1, 2).to(x.dtype)) @ self.delta[rows].to(x.dtype)


class GhostGradients:
    """The per-sample gradients of a set of layers; make it with `Recorder`."""

    def __init__(self, layers: dict[str, Layer], parts: dict[str, _Factors]) -> None:
        self.layers, self._parts = layers, parts

    def norm(self) -> Tensor:
        """n_i = |d l_i / d (weights of all layers)|, [n]."""
        squares = [part.squared_norm() for part in self._parts.values()]
        return torch.stack(squares).sum(0).clamp_min(0).sqrt()

    @contextmanager
    def armed(self, rows: Tensor, factors: Tensor) -> Iterator[None]:
        """Within the block row r of every forward sees the weights W + factors_r * G_{rows_r}.

        rows: int64 [R], the sample of each row. factors: [R]; sign * rho / n_i makes a step of length rho.
        It must span the backward where that runs the forward again, as `ProbeSet.armed`.
        """
        handles = [
            layer.register_forward_hook(self._hook(part, rows, factors))
            for layer, part in zip(self.layers.values(), self._parts.values(), strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _hook(part: _Factors, rows: Tensor, factors: Tensor):
        def add(layer: Layer, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            assert args[0].shape[0] == len(rows), "one sample index per row of the forward"
            x = columns(layer, args[0])
            added = part.times(x, rows) * factors.to(x.dtype)[:, None, None]
            if isinstance(layer, nn.Conv2d):
                added = added.transpose(1, 2)
            return output + added.reshape(output.shape)

        return add
