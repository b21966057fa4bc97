"""One pattern of active units for both signed copies of a sample.

Through a ReLU a loss has kinks. If +e and -e fall on different sides of one, the difference of the two losses'
gradients, divided by 2 e, contains a jump divided by e, which the derivative at e = 0 does not have: in small
networks the error can be many times the gradient, whatever e. So both copies use the pattern of their midpoint,

    relu(x_+) -> x_+ * [(x_+ + x_-) / 2 > 0],     relu(x_-) -> x_- * [(x_+ + x_-) / 2 > 0]

and a max-pooling takes from both the element that is largest at the midpoint. The midpoint is the unmoved sample up
to O(e^2), so the difference is that of a smooth function, and its limit that of double backward, which knows no kinks
either. The technique is ours. It reaches nn.ReLU and nn.MaxPool2d as modules.

Shapes: R = rows of one forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["partners", "shared_pattern"]


def partners(count: int, total: int, branches: int, device: torch.device) -> Tensor:
    """int64 [R]: the row of a sample's other signed copy, for rows that have none their own.

    Args:
        count: samples with two copies: rows 0 .. count - 1 with +, count .. 2 * count - 1 with -.
        total: rows of one branch, copies included; branches follow one another, R = branches * total.
    """
    own = torch.arange(total, device=device)
    other = torch.cat([own[count : 2 * count], own[:count], own[2 * count :]])
    return torch.cat([branch * total + other for branch in range(branches)])


@contextmanager
def shared_pattern(model: nn.Module, partner: Tensor) -> Iterator[None]:
    """Within the block, forwards of `model` use common patterns; see the module's text. partner: int64 [R]."""
    handles = []
    for module in model.modules():
        if type(module) is nn.ReLU:
            handles += _hold_relu(module, partner)
        elif type(module) is nn.MaxPool2d:
            handles.append(module.register_forward_hook(_pool(partner)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _middle(x: Tensor, partner: Tensor) -> Tensor:
    """The midpoint of both copies, alike to the last digit for either."""
    assert x.shape[0] == len(partner), "one partner per row of the forward"
    still = x.detach()
    return (still + still[partner]) / 2


def _hold_relu(module: nn.ReLU, partner: Tensor) -> list:
    kept: list[Tensor] = []

    def before(module: nn.ReLU, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept.append(args[0])
        return (args[0].detach().clone() if module.inplace else args[0].detach(),)  # its own result is not used

    def after(module: nn.ReLU, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = kept.pop()
        return x * (_middle(x, partner) > 0)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _pool(partner: Tensor):
    def after(module: nn.MaxPool2d, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        _, where = F.max_pool2d(
            _middle(x, partner), module.kernel_size, module.stride, module.padding, module.dilation,
            ceil_mode=module.ceil_mode, return_indices=True,
        )  # fmt: skip
        return x.flatten(2).gather(2, where.flatten(2)).view(output.shape)

    return after
