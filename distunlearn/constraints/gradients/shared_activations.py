"""One pattern of active units for both signed copies of a sample.

Through a ReLU a loss has kinks. If +e and -e fall on different sides of one, the difference of the two losses'
gradients, divided by 2 e, contains a jump divided by e, which the derivative at e = 0 does not have: in small
networks the error can be many times the gradient, whatever e. So both copies use the pattern of their midpoint,

    relu(x_+) -> x_+ * [(x_+ + x_-) / 2 > 0],     relu(x_-) -> x_- * [(x_+ + x_-) / 2 > 0]

and a max-pooling takes from both the element that is largest at the midpoint. The midpoint is the unmoved sample up
to O(e^2), so the difference is that of a smooth function, and its limit that of double backward, which knows no kinks
either. The technique is ours. It reaches nn.ReLU and nn.MaxPool2d as modules.

Shapes: R = V * total rows of one forward, V branches after one another; in each first `count` rows with +, then the
same samples with -, then rows without a copy. A module may see m rows of each, one sample after the other (windows of
an image); one that sees something else (a table that all images share) keeps its own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional as F

from distunlearn.encoders.blocks import replaced_forwards

Copies = Callable[[Tensor], "tuple[Tensor, Tensor] | None"]


@contextmanager
def shared_pattern(model: nn.Module, count: int, total: int) -> Iterator[None]:
    """Within the block, forwards of `model` use common patterns; see the module's text.

    count: samples with two copies. total: rows of one branch, copies included.
    """
    rows = [total]  # of the forward

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows[0] = args[0].shape[0]

    def copies(x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Views of the rows with + and of those with -, [V, count, m, ...]."""
        if x.shape[0] % rows[0]:
            return None
        assert rows[0] % total == 0, "whole branches of one forward"
        by_branch = x.unflatten(0, (rows[0] // total, total, -1))
        return by_branch[:, :count], by_branch[:, count : 2 * count]

    held = [module for module in model.modules() if type(module) in HOLDING]
    with (
        model.register_forward_pre_hook(note),
        replaced_forwards(held, lambda index, plain: HOLDING[type(held[index])](held[index], copies)),
    ):
        yield


def _relu(module: nn.ReLU, copies: Copies) -> Callable[[Tensor], Tensor]:
    def compute(x: Tensor) -> Tensor:
        active = x.detach() > 0
        before, both = copies(x.detach()), copies(active)
        if before is None or both is None:
            return F.relu(x)
        common = before[0] + before[1] > 0
        for own in both:
            own.copy_(common)
        return x * active  # on a CPU seven times faster than where or masked_fill

    return compute


def _max_pool(module: nn.MaxPool2d, copies: Copies) -> Callable[[Tensor], Tensor]:
    def compute(x: Tensor) -> Tensor:
        still = x.detach().clone()
        both = copies(still)
        if both is not None:
            middle = (both[0] + both[1]) / 2
            for own in both:
                own.copy_(middle)
        _, where = F.max_pool2d(
            still, module.kernel_size, module.stride, module.padding, module.dilation,
            ceil_mode=module.ceil_mode, return_indices=True,
        )  # fmt: skip
        return x.flatten(2).gather(2, where.flatten(2)).view(where.shape)

    return compute


HOLDING: dict[type[nn.Module], Callable[..., Callable[[Tensor], Tensor]]] = {nn.ReLU: _relu, nn.MaxPool2d: _max_pool}
