"""Probes: per-sample, low-rank directions in weight space, added to activations and never to weights.

At a probed layer with weight W, each row x of sample i becomes

    y = W x + sign * B C_i (A x)          A [k_in, p], B [d, k_out] random, C_i [k_out, k_in] the sample's core

which is the forward of a weight W + sign * B C_i A that only sample i sees. So for a loss l_i of sample i alone

    d l_i / d C_i at C = 0   =   B^T G_i A^T = S_i,   G_i = d l_i / d W       the sketch of its gradient
    [l_i(+e V) - l_i(-e V)] / 2 e   =   <V, S_i> + O(e^2)                     with a gradient as exact

and no optimizer, shard or reducer ever sees a changed weight. For a convolution, A is a convolution with the layer's
own kernel, stride, padding and dilation to k_in channels, C_i and B are 1 x 1; p = in_channels * kernel area.

Sources: Choe et al. (LoGra), arXiv 2405.13954, section 3.1, for the sketch as a bottleneck of zero weight; the layout
for convolutions is that of LogIX's LoRA modules. The signed use, which differentiates the sketch, is ours.

Shapes: n = samples, R = rows of one forward (a sample may have several: branches, copies), T = tokens or positions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distunlearn.common.device import on_device
from distunlearn.common.random import generator_of
from distunlearn.constraints.gradients.inplace_ops import (
    MovedRows,
    added_to,
    constant_conv2d,
    folded,
    moved_rows,
    product_added_to,
    reduced_rows,
    unfolded,
)
from distunlearn.constraints.gradients.layers import Layer
from distunlearn.encoders.blocks import replaced_forwards

DRAWING = 4  # threads that draw for a GPU


class ProbeSet:
    """The probes of one step on some layers of a model; nothing of it is a parameter or a buffer.

    Args:
        layers: by name, in one order on all ranks; see `followed_layers`.
        k_out, k_in: size of every core.
        seed, step: A and B of the i-th layer are a pure function of (seed, step, i), hence alike on all ranks. Their
            entries have variance 1 / k_in and 1 / k_out, so that E |B^T G A^T|^2 = |G|^2.
    """

    def __init__(
        self,
        layers: dict[str, Layer],
        k_out: int,
        k_in: int,
        seed: int,
        step: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layers = layers
        self._layers = list(layers.values())
        self.k_out, self.k_in = k_out, k_in
        drawn: list[tuple[np.random.Generator, tuple[int, ...], float]] = []
        for index, layer in enumerate(layers.values()):
            generator = generator_of("probes", seed, step, index)
            # Sizes from the layer's attributes: a sharded weight has another shape.
            if isinstance(layer, nn.Linear):
                width, shape = layer.out_features, (k_in, layer.in_features)
            else:
                width, shape = layer.out_channels, (k_in, layer.in_channels, *layer.kernel_size)  # type: ignore[assignment]
            drawn += [(generator, shape, k_in**0.5), (generator, (width, k_out), k_out**0.5)]
        moved = _at_once(drawn, torch.device(device), dtype)
        self.ins = moved[0::2]  # A, [k_in, p] or [k_in, C, kernel]
        self.outs = moved[1::2]  # B, [d, k_out]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers, k_out, k_in): what the cores of one sample look like."""
        return len(self.layers), self.k_out, self.k_in

    def leaves(self, count: int) -> list[Tensor]:
        """Zero cores of `count` samples, a leaf [count, k_out, k_in] per layer, whose gradients are the sketches."""
        template = self.ins[0]
        return [template.new_zeros(count, self.k_out, self.k_in).requires_grad_() for _ in self.layers]

    @contextmanager
    def armed(self, cores: Sequence[Tensor], rows: Tensor, signs: Sequence[float] | None = None) -> Iterator[None]:
        """Within the block every forward of the model adds the probes.

        Args:
            cores: [n, k_out, k_in] per layer, in the order of `layers`.
            rows: int64 [R], the sample that each row of the forward belongs to.
            signs: R factors of the rows (+1, -1; 0 for a row without probe, which costs nothing); None: 1. In every
                branch the rows with a sign come first.

        A forward that the backward repeats gets them too: see `encoders.activation_checkpointing`.
        """
        signs = [1.0] * len(rows) if signs is None else [float(sign) for sign in signs]
        assert len(signs) == len(rows), "one sign per row"
        moved = moved_rows(signs)
        if not moved.first:
            yield
            return
        factors = on_device(torch.tensor([sign for sign in signs if sign]), rows.device)
        whole = torch.stack(list(cores)).index_select(1, moved.take(rows))
        chosen = (whole * factors.to(whole)[:, None, None]).unbind(0)

        def make(index: int, plain: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            layer, inner, outer, core = self._layers[index], self.ins[index], self.outs[index], chosen[index]

            def forward(x: Tensor) -> Tensor:
                x, shape = folded(_narrowed(x), len(signs)), x
                kept, small = _reduced(layer, x, inner, moved)
                output = plain(unfolded(kept, shape))
                return unfolded(_added(layer, folded(output, len(signs)), small, outer, core, moved), output)

            return forward

        with replaced_forwards(self._layers, make):
            yield

    @contextmanager
    def listening(self, leaves: Sequence[Tensor], rows: Tensor, *, twice: bool = False) -> Iterator[None]:
        """As `armed` with cores of value 0 (`leaves`), for their gradients alone: nothing is added to activations.

        twice: the gradients may be differentiated again, which compiled code cannot be: a hook keeps it out.
        """
        count = len(rows)
        every = MovedRows(1, count, count)

        def make(index: int, plain: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            layer, inner, outer, leaf = self._layers[index], self.ins[index], self.outs[index], leaves[index]

            def forward(x: Tensor) -> Tensor:
                x, shape = folded(_narrowed(x), count), x
                kept, small = _reduced(layer, x, inner, every, once=not twice)
                if torch.compiler.is_compiling():  # its backward would make every gradient that can be made
                    output = _without_weights(layer, unfolded(kept, shape))
                    core = leaf.index_select(0, rows)
                    return unfolded(_added(layer, folded(output, count), small.detach(), outer, core, every), output)
                output = plain(unfolded(kept, shape))
                whole = folded(output, count)
                layout = _layout(layer, whole)
                return unfolded(_Listener.apply(whole, leaf, _flat(small, layout), outer, rows, layout), output)

            return forward

        with contextlib.ExitStack() as hooks, replaced_forwards(self._layers, make):
            for layer in self._layers if twice else ():
                hooks.enter_context(layer.register_forward_hook(lambda *seen: None))
            yield


def _reduced(layer: Layer, x: Tensor, inner: Tensor, moved: MovedRows, once: bool = True) -> tuple[Tensor, Tensor]:
    """x for the layer, and A x of the rows that move: [r, T, k_in], or [r, k_in, H, W] of a convolution.

    A x is taken before the layer runs, so that both read the x that autocast has narrowed once for both.
    """
    inner = inner.to(x.dtype)
    if isinstance(layer, nn.Conv2d):
        if x.device.type == "cpu":
            return x, constant_conv2d(layer, moved.take(x), inner)
        return x, moved.take(constant_conv2d(layer, x, inner))  # on a GPU a copy of rows costs more than they do
    if once:
        return reduced_rows(x, inner, moved)
    return x, F.linear(moved.take(x), inner).reshape(moved.branches * moved.first, -1, len(inner))


def _added(layer: Layer, output: Tensor, small: Tensor, outer: Tensor, core: Tensor, moved: MovedRows) -> Tensor:
    """The output with the probe in it. core: of every row that moves, signed."""
    outer, core = outer.to(small.dtype), core.to(small.dtype)
    layout = _layout(layer, output)
    small = _flat(small, layout)
    if layout == "first":
        added = (outer @ (core @ small)).view(len(small), *output.shape[1:])
        return added_to(output, added, moved)
    through = small @ core.transpose(1, 2)  # [r, T, k_out]
    if layout == "rows":
        return product_added_to(output, through, outer, moved)
    added = F.linear(through, outer)  # [r, T, d]
    return added_to(output, added.unflatten(1, output.shape[2:]).permute(0, 3, 1, 2), moved)


def _without_weights(layer: Layer, x: Tensor) -> Tensor:
    """What the layer gives, without a gradient for its weights."""
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)


def _narrowed(x: Tensor) -> Tensor:
    """x in the precision in which autocast lets a layer compute, if it is on."""
    device = x.device.type
    if x.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _flat(small: Tensor, layout: str) -> Tensor:
    """A x of a convolution, [r, k_in, H, W], as [r, k_in, T] in the layout "first", else as [r, T, k_in]."""
    if layout == "rows":
        return small
    return small.flatten(2) if layout == "first" else small.flatten(2).transpose(1, 2)


def _at_once(
    drawn: Sequence[tuple[np.random.Generator, tuple[int, ...], float]], device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Normal numbers of generators, each in a shape and divided by a number, as tensors on a device, in one copy.

    For a GPU several threads draw, for it waits meanwhile: a million numbers take 20 ms. They are the same numbers.
    """
    sizes = [math.prod(shape) for _, shape, _ in drawn]
    flat = np.empty(sum(sizes))
    parts = np.split(flat, np.cumsum(sizes)[:-1])

    def draw(index: int) -> None:
        generator, _, divisor = drawn[index]
        generator.standard_normal(out=parts[index])
        parts[index] /= divisor

    if device.type == "cuda":
        with ThreadPoolExecutor(DRAWING) as pool:
            list(pool.map(draw, range(len(drawn))))
    else:
        for index in range(len(drawn)):
            draw(index)
    tensors = on_device(flat, device, dtype).split(sizes)
    return [tensor.view(shape) for tensor, (_, shape, _) in zip(tensors, drawn, strict=True)]


def _layout(layer: Layer, output: Tensor) -> str:
    """Where the channels of an output are: "rows" [R, ..., d] of a Linear; [R, d, H, W] of a convolution with them
    "first" in memory, or "last".

    Products of a probe run over what lies together: to change the layout of an activation costs more than they do.
    """
    if isinstance(layer, nn.Linear):
        return "rows"
    usual = output.is_contiguous() or not output.is_contiguous(memory_format=torch.channels_last)
    return "first" if usual else "last"


class _Listener(torch.autograd.Function):
    """y -> y + B C (A x) at C = 0. Of its derivatives only those by y and C are not 0: no other is computed, and that
    by C only in the first backward. A later one through the same graph is of a loss that does not ask for it.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, leaf: Tensor, small: Tensor, outer: Tensor, rows: Tensor, layout: str) -> Tensor:
        """y: as `_layout` has it; leaf: C [n, k_out, k_in]; small: A x as `_reduced` gives it."""
        ctx.save_for_backward(small, outer, rows)
        ctx.leaf = leaf.shape, leaf.dtype
        ctx.layout, ctx.told = layout, False
        return y.detach()  # its memory, which no backward pass needs: see `inplace_ops.added_to`

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """S_i = sum over rows of sample i of (B^T delta) (A x)^T; of operators that can be differentiated again."""
        small, outer, rows = ctx.saved_tensors
        if ctx.told:
            return grad, *[None] * 5
        ctx.told = True
        shape, dtype = ctx.leaf
        outer = outer.to(grad.dtype)
        if ctx.layout == "first":
            own = (outer.T @ grad.flatten(2)).to(dtype) @ small.transpose(1, 2).to(dtype)  # [R, k_out, k_in]
        else:
            delta = grad.permute(0, 2, 3, 1) if ctx.layout == "last" else grad
            reduced = delta.reshape(len(grad), -1, len(outer)) @ outer  # [R, T, k_out]
            own = reduced.transpose(1, 2).to(dtype) @ small.to(dtype)
        return grad, own.new_zeros(shape).index_add(0, rows, own), None, None, None, None
