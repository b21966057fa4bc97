"""Exact per-sample gradient norms over many layers, and the probe along a sample's own gradient.

For a linear layer with inputs a_t and output gradients delta_t (t over tokens, positions, views of one sample),

    G_i = sum_t delta_t a_t^T,      |G_i|^2 = sum_{s,t} (delta_s . delta_t) (a_s . a_t)

by Gram matrices [T, T], or from G_i itself (Li et al., arXiv 2110.05679, eq. 4, and the choice between both: Bu et
al., arXiv 2205.10683). Norm, storage and product with G_i cost T (p + d) numbers a token by the first way and p d by
the second, so the smaller of both decides. A convolution is linear in its unfolded patches; G_i itself is found, and
multiplied with, by grouped convolutions without unfolding. Biases and normalisation layers are left out.

The norm n_i = |(G_i)_layers| has the derivative <G_i / n_i, dG_i>, with the direction held (envelope theorem). The
ghost probe adds exactly this direction to the weights that sample i sees, by activations alone:

    y = W x + sign * rho / n_i * G_i x,     G_i x = sum_s delta_s (a_s . x)

so that [l_i(+) - l_i(-)] / 2 rho has the gradient of n_i up to O(rho^2). The probe is ours.

Shapes: n = samples, V = rows of a forward per sample (row v * n + i is sample i), T = tokens or positions, p and d =
columns and rows of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from distunlearn.common.device import on_device
from distunlearn.constraints.gradients.inplace_ops import (
    added_to,
    constant_conv2d,
    folded,
    moved_rows,
    unfolded,
)
from distunlearn.constraints.gradients.layers import Layer
from distunlearn.encoders.activation_checkpointing import recomputing
from distunlearn.encoders.blocks import replaced_forwards


def columns(layer: Layer, x: Tensor) -> Tensor:
    """What the weight is multiplied with, [R, T, p]: tokens, or patches of a convolution's input."""
    if isinstance(layer, nn.Linear):
        return x.reshape(x.shape[0], -1, layer.in_features)
    return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2)  # type: ignore[arg-type]


def tokens(layer: Layer, y: Tensor) -> Tensor:
    """The layer's output, or its gradient, as [R, T, d]."""
    if isinstance(layer, nn.Linear):
        return y.reshape(y.shape[0], -1, layer.out_features)
    return y.flatten(2).transpose(1, 2)


def by_sample(x: Tensor, count: int) -> Tensor:
    """[V * n, T, p] -> [n, V * T, p]."""
    return x.reshape(-1, count, *x.shape[1:]).transpose(0, 1).flatten(1, 2)


def by_row(x: Tensor, rows: int) -> Tensor:
    """Inverse of `by_sample`: [n, V * T, d] -> [V * n, T, d], where V * n = rows."""
    count = x.shape[0]
    return x.unflatten(1, (rows // count, -1)).transpose(0, 1).flatten(0, 1)


class _Tap(torch.autograd.Function):
    """Passes a layer's output on, and its gradient to `arrived` on the way back.

    A copy, since what follows may write into its input. Asking for the gradient of `anchor` runs the backward through
    every tap, and through nothing that is not needed for one: no gradient of a weight is made.
    """

    @staticmethod
    def forward(ctx, output: Tensor, anchor: Tensor, arrived: Callable[[Tensor], None]) -> Tensor:
        ctx.arrived = arrived
        return output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, delta: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.arrived(delta)
        return delta, delta.new_zeros(()), None


class Recorder:
    """Keeps inputs of layers over the forwards of one pass, and what `gradients` makes of them in the backward.

    rows: of every forward, one for each view of a sample; a layer may have several for each (windows of an image).
    """

    def __init__(self, layers: dict[str, Layer], rows: int) -> None:
        self.layers, self.rows = layers, rows
        self._inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
        self._deltas: dict[str, dict[int, Tensor]] = {name: {} for name in layers}
        self._anchor: Tensor | None = None
        self._finish: Callable[[str, list[Tensor], list[Tensor]], None] | None = None

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
            if recomputing():
                return output.clone()  # the graph, and the tap in it, are those of the first forward
            if self._anchor is None:
                self._anchor = torch.zeros((), device=output.device, requires_grad=True)
            call = len(self._inputs[name])
            self._inputs[name].append(folded(args[0].detach(), self.rows))
            return _Tap.apply(output, self._anchor, lambda delta: self._arrived(name, call, delta))

        return keep

    def _arrived(self, name: str, call: int, delta: Tensor) -> None:
        """A layer is finished when the gradients of all its calls are here; its records are dropped at once."""
        if name not in self._deltas:
            return  # a later backward, which is not about these gradients
        deltas = self._deltas[name]
        deltas[call] = folded(delta, self.rows)
        if len(deltas) == len(self._inputs[name]):
            inputs = self._inputs.pop(name)
            del self._deltas[name]
            assert self._finish is not None, "the backward belongs to `gradients`"
            self._finish(name, inputs, [deltas[number] for number in range(len(inputs))])

    def gradients(self, total: Tensor, count: int, kept: int | None = None, *, lasting: bool = False) -> GhostGradients:
        """Per-sample gradients of `total` = sum_i l_i, as norms and factors; its graph and the records are used up.

        Args:
            count: n; every forward had its rows branch by branch, n each.
            kept: how many samples, from the first on, the factors are kept of; None: all.
            lasting: the graph stays, for a backward that is not recorded.

        Raises:
            KeyError: a layer that was never called, or that `total` does not depend on; the message is its name.
        """
        kept = count if kept is None else kept
        parts: dict[str, _Gram | _Whole] = {}
        squares: dict[str, Tensor] = {}

        def finish(name: str, inputs: list[Tensor], deltas: list[Tensor]) -> None:
            with torch.no_grad():
                whole = _factors(self.layers[name], inputs, deltas, count)
                squares[name] = whole.squared_norm()
                parts[name] = whole.first(kept)

        self._finish = finish
        if self._anchor is not None:
            torch.autograd.grad(total, self._anchor, retain_graph=lasting, allow_unused=True)
        for name in self.layers:
            if name not in parts:
                raise KeyError(name)
        ordered = {name: parts[name] for name in self.layers}
        norms = torch.stack([squares[name] for name in self.layers]).sum(0).clamp_min(0).sqrt()
        return GhostGradients(self.layers, ordered, norms, kept)


@dataclass(frozen=True, eq=False)
class _Gram:
    """G_i of one layer as a [n, T, p] and delta [n, T, d], T over all rows of a sample."""

    layer: Layer
    a: Tensor
    delta: Tensor

    def first(self, count: int) -> _Gram:
        """Those of the first samples, in storage of their own."""
        return self if count == len(self.a) else _Gram(self.layer, self.a[:count].clone(), self.delta[:count].clone())

    def squared_norm(self) -> Tensor:
        """|G_i|^2, [n]."""
        return ((self.a @ self.a.transpose(1, 2)) * (self.delta @ self.delta.transpose(1, 2))).sum((1, 2))

    def times(self, x: Tensor) -> Tensor:
        """G_i x for every input of the layer, rows of the samples in turn: [V * n, ...] as the layer's output."""
        moved = by_sample(columns(self.layer, x), len(self.a))
        added = (moved @ self.a.transpose(1, 2).to(x.dtype)) @ self.delta.to(x.dtype)
        return _as_output(self.layer, by_row(added, len(x)))


@dataclass(frozen=True, eq=False)
class _Whole:
    """G_i of one layer as itself, [n, *weight]."""

    layer: Layer
    matrix: Tensor

    def first(self, count: int) -> _Whole:
        """Those of the first samples, in storage of their own."""
        return self if count == len(self.matrix) else _Whole(self.layer, self.matrix[:count].clone())

    def squared_norm(self) -> Tensor:
        """|G_i|^2, [n]."""
        return self.matrix.flatten(1).square().sum(1)

    def times(self, x: Tensor) -> Tensor:
        """See `_Gram.times`."""
        layer, count, matrix = self.layer, len(self.matrix), self.matrix.to(x.dtype)
        if isinstance(layer, nn.Linear):
            return _as_output(layer, by_row(by_sample(columns(layer, x), count) @ matrix.transpose(1, 2), len(x)))
        side_by_side = x.reshape(-1, count * x.shape[1], *x.shape[2:])
        out = constant_conv2d(layer, side_by_side, matrix.flatten(0, 1), groups=count)
        return out.reshape(len(x), layer.out_channels, *out.shape[2:])


def _as_output(layer: Layer, y: Tensor) -> Tensor:
    """[R, T, d], T flat, in an order that reshapes to the layer's output."""
    return y if isinstance(layer, nn.Linear) else y.transpose(1, 2)


def _factors(layer: Layer, inputs: list[Tensor], deltas: list[Tensor], count: int) -> _Gram | _Whole:
    """From what went into every forward and what came back, the cheaper form of G_i; half precision is widened."""
    if inputs[0].dtype in (torch.float16, torch.bfloat16) or deltas[0].dtype != inputs[0].dtype:
        inputs, deltas = [x.float() for x in inputs], [delta.float() for delta in deltas]
    weight = (
        (layer.out_features, layer.in_features)
        if isinstance(layer, nn.Linear)
        else (layer.out_channels, layer.in_channels, *layer.kernel_size)
    )
    d, p = weight[0], torch.Size(weight[1:]).numel()
    rows = sum(delta.numel() // (count * d) for delta in deltas)  # T
    by_gram = rows * (p + d) <= p * d
    if by_gram or isinstance(layer, nn.Linear):
        a = _joined([by_sample(columns(layer, x), count) for x in inputs])
        delta = _joined([by_sample(tokens(layer, delta), count) for delta in deltas])
        return _Gram(layer, a, delta) if by_gram else _Whole(layer, delta.transpose(1, 2) @ a)
    side = [
        torch.cat([x.reshape(-1, count * x.shape[1], *x.shape[2:]) for x in parts]) for parts in (inputs, deltas)
    ]  # [V, n * C, H, W]: the samples are groups of channels, whose own weight gradient is G_i
    matrix = nn.grad.conv2d_weight(  # type: ignore[attr-defined]
        side[0], (count * d, *weight[1:]), side[1], layer.stride, layer.padding, layer.dilation, groups=count
    )
    return _Whole(layer, matrix.view(count, *weight))


def _joined(parts: list[Tensor]) -> Tensor:
    """[n, T, p] of every forward in a row, without a copy where there was one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class GhostGradients:
    """Per-sample gradients of some layers as factors; made by `Recorder.gradients`, without any graph."""

    def __init__(self, layers: dict[str, Layer], parts: dict[str, _Gram | _Whole], norms: Tensor, kept: int) -> None:
        self.layers, self._parts, self._norms, self.kept = layers, parts, norms, kept

    def norm(self) -> Tensor:
        """n_i over all layers, [n]."""
        return self._norms

    @contextmanager
    def armed(self, signs: Sequence[float], steps: Tensor) -> Iterator[None]:
        """Within the block row r of every forward sees the weights W + signs_r * steps_i * G_i.

        signs: one per row, 0 for a row that is left as it is; see `moved_rows`. The other rows are the kept samples
        in turn, i = 0 .. kept - 1, once or several times. steps: [kept]; rho / n_i makes a step of length rho.
        A forward that the backward repeats gets them too: see `encoders.activation_checkpointing`.
        """
        moved = moved_rows(signs)
        taken = [sign for sign in signs if sign]
        assert self.kept == 0 or len(taken) % self.kept == 0, "every kept sample moves in as many rows"
        factors = on_device(torch.tensor(taken, dtype=steps.dtype), steps.device)
        if self.kept:
            factors = factors * steps.repeat(len(taken) // self.kept)
        if not taken:
            yield
            return
        layers, parts = list(self.layers.values()), list(self._parts.values())

        def make(index: int, plain: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            layer, part = layers[index], parts[index]

            def forward(x: Tensor) -> Tensor:
                output = plain(x)
                x = moved.take(folded(x, len(signs)))
                whole = folded(output, len(signs))
                added = part.times(x).reshape(len(x), *whole.shape[1:])
                added = added * factors.to(x.dtype).view(-1, *[1] * (whole.dim() - 1))
                return unfolded(added_to(whole, added, moved, wide=isinstance(layer, nn.Conv2d)), output)

            return forward

        with replaced_forwards(layers, make):
            yield
