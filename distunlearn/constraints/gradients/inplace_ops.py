"""What is added to some rows of a layer's output, keeping for the backward pass only what that pass needs.

torch's own `index_add` keeps its source, a product both factors and `conv2d` its input, whether or not a gradient needs
them: for added terms whose weights are constant that is a copy of every activation for nothing. And each makes a new
tensor of the size of an activation where the old one's memory is free to be written to. A compiler sees to both by
itself: compiled code gets the plain operators.

Shapes: R = V * total rows of one forward, V branches after one another; T = tokens or positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

HALF = (torch.float16, torch.bfloat16)


def folded(x: Tensor, rows: int) -> Tensor:
    """[rows * m, ...] as [rows, m, ...], where every sample has m rows of its own; [rows, ...] as it is."""
    if x.shape[0] == rows:
        return x
    assert x.shape[0] % rows == 0, "as many rows for every sample"
    return x.unflatten(0, (rows, -1))


def unfolded(x: Tensor, like: Tensor) -> Tensor:
    """Inverse of `folded`: x in the shape of `like`."""
    return x if x.shape == like.shape else x.view(like.shape)


class MovedRows(NamedTuple):
    """The first `first` of the `total` rows of every branch."""

    branches: int
    first: int
    total: int

    def take(self, x: Tensor) -> Tensor:
        """These rows of [R, ...], one branch after the other, [V * first, ...]; all of them without a copy."""
        return x if self.first == self.total else self._of(x).flatten(0, 1)

    def tokens(self, x: Tensor) -> Tensor:
        """Their tokens, a view of contiguous [R, ..., d]: [V, first * T, d], or [1, R * T, d] if all rows move."""
        d = x.shape[-1]
        if self.first == self.total:
            return x.view(1, -1, d)
        return self._of(x).view(self.branches, -1, d)

    def _of(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.branches, self.total))[:, : self.first]

    def plus(self, x: Tensor, added: Tensor) -> Tensor:
        """x with [V * first, ...] added to these rows, as another tensor."""
        if self.first == self.total:
            return x + added
        moved = self._of(x) + added.unflatten(0, (self.branches, self.first))
        return torch.cat([moved, x.unflatten(0, (self.branches, self.total))[:, self.first :]], dim=1).flatten(0, 1)

    def with_tokens(self, x: Tensor, block: Tensor) -> Tensor:
        """Contiguous [R, ..., d] with `block`, which `tokens` would give, in the place of these rows."""
        if self.first == self.total:
            return block.view(x.shape)
        rest = x.unflatten(0, (self.branches, self.total))[:, self.first :]
        return torch.cat([block.view(self.branches, self.first, *x.shape[1:]), rest], dim=1).flatten(0, 1)

    def add_to(self, x: Tensor, added: Tensor) -> None:
        """Add [V * first, ...] to these rows of x, in place."""
        self._of(x).add_(added.unflatten(0, (self.branches, self.first)))


def moved_rows(signs: Sequence[float]) -> MovedRows:
    """The rows whose sign is not 0; in every branch they come first."""
    moves = [sign != 0 for sign in signs]
    first = moves.index(False) if False in moves else len(moves)
    total = next((row for row in range(first, len(moves)) if moves[row]), len(moves)) if first else len(moves)
    found = MovedRows(len(moves) // total if total else 1, first, total)
    assert moves == ([True] * first + [False] * (total - first)) * found.branches, "rows that move come first"
    return found


def added_to(output: Tensor, added: Tensor, moved: MovedRows, *, wide: bool = True) -> Tensor:
    """`output` [R, ...] plus `added` [V * first, ...] at the rows that move.

    The sum takes the place of `output`, which therefore must be needed by no backward pass: that of a linear layer or
    a convolution needs only what went in.

    wide: half precision is widened to float32 first. Rounding the sum to bf16 loses a part of a step of a finite
        difference, and rounds both copies differently, which few channels do not average out.
    """
    if wide and output.dtype in HALF:
        output = output.float()
    if torch.compiler.is_compiling():
        return moved.plus(output, added.to(output.dtype))
    return _AddRows.apply(output, added.to(output.dtype), moved)


def product_added_to(output: Tensor, left: Tensor, right: Tensor, moved: MovedRows) -> Tensor:
    """`output` [R, ..., d] of a linear layer plus left [V * first, T, k] @ right [d, k]^T at the rows that move.

    As `added_to`, in the place of `output` and in its type; `right` is constant. The product is added as it is
    computed, with one rounding: what would have the size of `output` is never written.
    """
    if torch.compiler.is_compiling():
        block = moved.tokens(output.contiguous())
        left = left.to(output.dtype).reshape(len(block), -1, right.shape[1])
        whole = torch.baddbmm(block, left, _each(right.to(output.dtype).T, block))
        return moved.with_tokens(output, whole)
    return _AddProduct.apply(output, left, right.to(output.dtype), moved)


def reduced_rows(x: Tensor, inner: Tensor, moved: MovedRows) -> tuple[Tensor, Tensor]:
    """x [R, ..., p] as it is, and x @ inner [k, p]^T of the rows that move, [V * first, T, k]; `inner` is constant.

    The layer must take the x that this returns, and nothing else may: the gradient by the small product is added to
    the one that comes back for it, in its place. Not differentiable twice.
    """
    if torch.compiler.is_compiling():
        return x, F.linear(moved.take(x), inner.to(x.dtype)).reshape(moved.branches * moved.first, -1, len(inner))
    return _Reduce.apply(x, inner.to(x.dtype), moved)


def constant_conv2d(layer: nn.Conv2d, x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """x through a convolution like `layer` with a constant weight [d, C / groups, *kernel] and no bias."""
    if torch.compiler.is_compiling():
        return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, groups)
    return _ConstantConv2d.apply(x, weight, layer.stride, layer.padding, layer.dilation, groups)


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, added: Tensor, moved: MovedRows) -> Tensor:
        ctx.moved = moved
        found = output.detach()  # its memory; writing there as into `output` is what autograd would forbid
        moved.add_to(found, added)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.moved.take(grad), None


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, left: Tensor, right: Tensor, moved: MovedRows) -> Tensor:
        ctx.save_for_backward(right)
        ctx.moved, ctx.left = moved, (left.dtype, left.shape)
        found = output.detach() if output.is_contiguous() else output.contiguous()
        block = moved.tokens(found)
        block.baddbmm_(left.to(right.dtype).reshape(len(block), -1, right.shape[1]), _each(right.T, block))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (right,) = ctx.saved_tensors
        dtype, shape = ctx.left
        block = ctx.moved.tokens(grad.contiguous())
        return grad, torch.bmm(block, _each(right, block)).view(shape).to(dtype), None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inner: Tensor, moved: MovedRows) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(inner)
        ctx.set_materialize_grads(False)  # zeros would be multiplied and added
        ctx.moved, ctx.shape = moved, x.shape
        block = moved.tokens(x.contiguous())
        small = torch.bmm(block, _each(inner.T, block))
        return x.detach(), small.view(moved.branches * moved.first, -1, len(inner))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_small: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad_small is None:
            return grad, None, None
        (inner,) = ctx.saved_tensors
        grad = inner.new_zeros(ctx.shape) if grad is None else grad.contiguous()
        block = ctx.moved.tokens(grad)
        block.baddbmm_(grad_small.reshape(len(block), -1, len(inner)), _each(inner, block))
        return grad, None, None


def _each(matrix: Tensor, block: Tensor) -> Tensor:
    """The same matrix for every part of a batched product, without a copy."""
    return matrix.expand(len(block), *matrix.shape)


class _ConstantConv2d(torch.autograd.Function):
    """Its backward can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
        """geometry: stride, padding, dilation, groups."""
        ctx.save_for_backward(weight)
        ctx.set_materialize_grads(False)  # no gradient stays none: zeros would be convolved
        ctx.x, ctx.geometry = (x.shape, x.dtype), geometry
        return F.conv2d(x, weight, None, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        (weight,) = ctx.saved_tensors
        shape, dtype = ctx.x
        kernel = weight.to(grad.dtype)  # autocast may have narrowed
        found = nn.grad.conv2d_input(shape, kernel, grad, *ctx.geometry)  # type: ignore[attr-defined]
        return found.to(dtype), *[None] * 5
