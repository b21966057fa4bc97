"""What is added to some rows of a layer's output, keeping for the backward pass only what that pass needs.

torch's own `index_add` keeps its source and `conv2d` its input, whether or not a gradient needs them: for added terms
whose weights are constant that is a copy of every activation for nothing.

Shapes: R = rows of one forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["added_to", "constant_conv2d", "moved_rows", "product_added_to"]


def moved_rows(signs: Sequence[float], device: torch.device | str) -> Tensor | None:
    """int64: the rows whose sign is not 0; None if that is all of them. A plain sequence is read without the device."""
    rows = [row for row, sign in enumerate(signs) if sign]
    return None if len(rows) == len(signs) else torch.tensor(rows, dtype=torch.int64, device=device)


def added_to(output: Tensor, added: Tensor, moved: Tensor | None) -> Tensor:
    """`output` [R, ...] plus `added` at the rows `moved` (None: at all); half precision is widened to float32.

    Rounding the sum to bf16 would lose most of a step of a finite difference, and round both copies differently.
    Out of place: the layer's own output may be needed as it is by its backward, or be a view.
    """
    if output.dtype in (torch.float16, torch.bfloat16):
        output = output.float()
    added = added.to(output.dtype)
    return output + added if moved is None else _AddRows.apply(output, added, moved)


def product_added_to(output: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`output` [R, ..., d] plus left [R, T, k] @ right [d, k]^T with a constant `right`; half precision is widened.

    The product is added as it is computed: what would have the size of `output` is never written.
    """
    return _AddProduct.apply(output, left, right)


def constant_conv2d(layer: nn.Conv2d, x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """x through a convolution like `layer` with a constant weight [d, C / groups, *kernel] and no bias."""
    return _ConstantConv2d.apply(x, weight, layer.stride, layer.padding, layer.dilation, groups)


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, added: Tensor, moved: Tensor) -> Tensor:
        ctx.save_for_backward(moved)
        return output.index_add(0, moved, added)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (moved,) = ctx.saved_tensors
        return grad, grad.index_select(0, moved), None


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, left: Tensor, right: Tensor) -> Tensor:
        half = output.dtype in (torch.float16, torch.bfloat16)
        right = right.float() if half else right.to(output.dtype)
        ctx.save_for_backward(right)
        ctx.kinds = output.dtype, left.dtype, left.shape
        found = output.to(right.dtype, copy=True, memory_format=torch.contiguous_format)
        found.view(-1, len(right)).addmm_(left.reshape(-1, right.shape[1]).to(right.dtype), right.T)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (right,) = ctx.saved_tensors
        dtype, kind, shape = ctx.kinds
        grad_left = (grad.reshape(-1, len(right)) @ right).view(shape)
        return grad.to(dtype), grad_left.to(kind), None


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
        found = nn.grad.conv2d_input(shape, weight.to(grad.dtype), grad, *ctx.geometry)  # autocast may have narrowed
        return found.to(dtype), *[None] * 5
