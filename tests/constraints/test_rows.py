"""Adding to rows and convolving with constants: torch's own operators are the oracle, and what is kept is looked at."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from distunlearn.constraints.gradients.inplace_ops import (
    MovedRows,
    added_to,
    constant_conv2d,
    moved_rows,
    product_added_to,
    reduced_rows,
)


def kept(run) -> int:
    """Numbers that autograd keeps of what `run` computes."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        run()
    return sum(sizes)


def test_rows_without_sign_are_left_out():
    assert moved_rows([1.0, -1.0, 0.0, 1.0, -1.0, 0.0]) == MovedRows(branches=2, first=2, total=3)
    assert moved_rows([1.0, -1.0]) == MovedRows(1, 2, 2)
    assert moved_rows([1.0, 0.0, 0.0]) == MovedRows(1, 1, 3)
    assert moved_rows([0.0, 0.0]).first == moved_rows([]).first == 0
    x = torch.arange(12).view(6, 2)
    assert torch.equal(MovedRows(2, 2, 3).take(x), x[[0, 1, 3, 4]])
    assert MovedRows(1, 6, 6).take(x) is x
    with pytest.raises(AssertionError, match="come first"):
        moved_rows([1.0, 0.0, 1.0, 1.0])


SOME = MovedRows(2, 1, 2)  # rows 0 and 2 of four
EVERY = MovedRows(1, 4, 4)


def index(moved: MovedRows) -> torch.Tensor:
    return torch.arange(4) if moved == EVERY else torch.tensor([0, 2])


@pytest.mark.parametrize("moved", [SOME, EVERY])
def test_adding_to_rows(moved):
    rows = index(moved)
    output = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    added = torch.randn(len(rows), 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(added_to(output.clone(), added, moved), output.index_add(0, rows, added))
    assert gradcheck(lambda x, y: added_to(x.clone(), y, moved), (output, added))
    assert kept(lambda: added_to(output.clone(), added, moved)) == 0
    assert kept(lambda: output.index_add(0, rows, added)) > len(rows)  # why it is not torch's own
    half = added_to(output.bfloat16(), added.bfloat16() / 1e4, moved)
    assert half.dtype == torch.float32 and (half[rows] != output.bfloat16().float()[rows]).all()
    half = added_to(output.bfloat16(), added.bfloat16(), moved, wide=False)
    torch.testing.assert_close(half, output.index_add(0, rows, added).bfloat16(), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("tokens", [(), (5,), (2, 3)])
@pytest.mark.parametrize("moved", [SOME, EVERY])
def test_adding_a_product(moved, tokens):
    rows = index(moved)
    output = torch.randn(4, *tokens, 3, dtype=torch.float64, requires_grad=True)
    left = torch.randn(len(rows), *tokens, 2, dtype=torch.float64, requires_grad=True)
    right = torch.randn(3, 2, dtype=torch.float64)
    expected = output.index_add(0, rows, left @ right.T)
    flat = left.view(len(rows), -1, 2)
    torch.testing.assert_close(product_added_to(output.clone(), flat, right, moved), expected, rtol=1e-14, atol=1e-14)
    assert gradcheck(lambda x, y: product_added_to(x.clone(), y.view_as(flat), right, moved), (output, left))
    assert kept(lambda: product_added_to(output.clone(), flat, right, moved)) == right.numel()
    narrow = output.bfloat16()
    half = product_added_to(narrow.clone(), flat.bfloat16(), right.bfloat16(), moved)
    torch.testing.assert_close(half.double(), expected, rtol=2**-6, atol=2**-5)
    assert half.dtype == torch.bfloat16 and (half != narrow).any()
    half.sum().backward()
    assert output.grad.dtype == torch.float64 and torch.equal(output.grad, torch.ones_like(output))


@pytest.mark.parametrize("tokens", [(), (5,), (2, 3)])
@pytest.mark.parametrize("moved", [SOME, EVERY])
def test_reducing_beside_a_layer(moved, tokens):
    """What the layer and the small product give, and the gradients of both together, are those of plain operators."""
    x = torch.randn(4, *tokens, 3, dtype=torch.float64, requires_grad=True)
    inner = torch.randn(2, 3, dtype=torch.float64)
    layer = nn.Linear(3, 6).double()

    def found(reduce) -> list[torch.Tensor]:
        taken, small = reduce(x * 1)
        value = layer(taken).square().sum() + small.sin().sum()
        return [taken, small, *torch.autograd.grad(value, [x, layer.weight])]

    own = found(lambda x: reduced_rows(x, inner, moved))
    theirs = found(lambda x: (x, (x[index(moved)] @ inner.T).view(len(index(moved)), -1, 2)))
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    assert kept(lambda: reduced_rows(x * 1, inner, moved)) == inner.numel()
    for part in (0, 1):  # one of both gradients alone
        torch.testing.assert_close(
            torch.autograd.grad(reduced_rows(x * 1, inner, moved)[part].sin().sum(), x),
            torch.autograd.grad((x, x[index(moved)] @ inner.T)[part].sin().sum(), x),
        )


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3)])
def test_the_sum_takes_the_place_of_a_layers_output(layer):
    """Its backward does not need it, and what follows may write there too: values and gradients are torch's own."""
    layer = layer.double()
    x = torch.randn((4, 6) if isinstance(layer, nn.Linear) else (4, 6, 5, 5), dtype=torch.float64, requires_grad=True)
    added = torch.randn_like(layer(x))

    def found(add) -> list[torch.Tensor]:
        taken = F.relu(add(layer(x)), inplace=True)
        return [taken, *torch.autograd.grad(taken.square().sum(), [x, layer.weight, layer.bias])]

    for own, theirs in zip(found(lambda y: added_to(y, added, EVERY)), found(lambda y: y + added), strict=True):
        assert torch.equal(own, theirs)
    y = layer(x)
    assert added_to(y, added, EVERY).data_ptr() == y.data_ptr()


@pytest.mark.parametrize("groups", [1, 2])
def test_constant_convolution(groups):
    layer = nn.Conv2d(4, 6, (3, 2), stride=2, padding=(2, 1), dilation=(1, 2)).double()
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4 // groups, 3, 2, dtype=torch.float64)
    expected = F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, groups)
    assert torch.equal(constant_conv2d(layer, x, weight, groups), expected)
    assert gradcheck(lambda x: constant_conv2d(layer, x, weight, groups), (x,))
    assert gradgradcheck(lambda x: constant_conv2d(layer, x, weight, groups), (x,))
    assert kept(lambda: constant_conv2d(layer, x, weight, groups)) == weight.numel()
    with torch.autocast("cpu", torch.bfloat16):
        narrow = x.detach().float().requires_grad_()
        (constant_conv2d(layer, narrow, weight.float(), groups).float() ** 2).sum().backward()
    wide = torch.autograd.grad((expected**2).sum(), x)[0]
    assert narrow.grad.dtype == torch.float32 and (narrow.grad - wide).norm() <= 0.02 * wide.norm()
