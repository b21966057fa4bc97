"""Adding to rows and convolving with constants: torch's own operators are the oracle, and what is kept is looked at."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from distunlearn.constraints.rows import added_to, constant_conv2d, moved_rows, product_added_to

CPU = torch.device("cpu")


def kept(run) -> int:
    """Numbers that autograd keeps of what `run` computes."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        run()
    return sum(sizes)


def test_rows_without_sign_are_left_out():
    assert moved_rows([1.0, 0.0, -1.0, 0.0], CPU).tolist() == [0, 2]
    assert moved_rows([1.0, -1.0], CPU) is None
    assert moved_rows([0.0, 0.0], CPU).tolist() == []


def test_adding_to_rows():
    output = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    added = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    moved = torch.tensor([3, 1])
    assert torch.equal(added_to(output, added, moved), output.index_add(0, moved, added))
    assert gradcheck(lambda x, y: added_to(x, y, moved), (output, added))
    assert kept(lambda: added_to(output, added, moved)) == len(moved)
    assert kept(lambda: output.index_add(0, moved, added)) > len(moved)  # why it is not torch's own
    half = added_to(output.bfloat16(), added.bfloat16() / 1e4, moved)
    assert half.dtype == torch.float32 and (half[moved] != output.bfloat16().float()[moved]).all()


def test_adding_a_product():
    output = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    left = torch.randn(4, 5, 2, dtype=torch.float64, requires_grad=True)
    right = torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(product_added_to(output, left, right), output + left @ right.T, rtol=1e-14, atol=1e-14)
    before = output.detach().clone()
    assert gradcheck(lambda x, y: product_added_to(x, y, right), (output, left))
    assert torch.equal(output, before), "the layer's own output stays as it is"
    assert kept(lambda: product_added_to(output, left, right)) == right.numel()
    turned = output.transpose(0, 1)
    torch.testing.assert_close(
        product_added_to(turned, left.transpose(0, 1), right), (output + left @ right.T).transpose(0, 1)
    )
    half = product_added_to(output.bfloat16(), left.bfloat16() / 1e4, right.bfloat16())
    assert half.dtype == torch.float32 and (half != output.bfloat16().float()).all()
    half.sum().backward()
    assert output.grad.dtype == torch.float64 and torch.equal(output.grad, torch.ones_like(output))


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
