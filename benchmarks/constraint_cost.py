"""Floating point operations and peak memory of a function, counted tensor by tensor, with or without computing.

`without_values` runs a function on torch's fake tensors, which have shapes but no numbers, so that an encoder of
production size is counted on any machine. The very same code runs: only a tensor that is read as a Python number
gives 1.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["LiveBytes", "flops", "peak_bytes", "without_values"]

ATEN = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def _convolution_backward(
    grad: Any,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    outputs: Any,
    groups: int,
    mask: Any,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """Each of the two gradients takes as many operations as the forward."""
    assert not transposed, "no encoder here has a transposed convolution"
    return 2 * math.prod(grad) * math.prod(weight[1:]) * (bool(mask[0]) + bool(mask[1]))


def _added_product(into: Any, left: Any, right: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(left) * right[-1]


# torch's own table lacks the fused attention of CPUs and products that are added in place, and takes no notice of
# groups in the gradient of a weight.
CORRECTED = {
    ATEN.addmm_: _added_product,
    ATEN.baddbmm_: _added_product,
    ATEN.convolution_backward: _convolution_backward,
    ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def flops(run: Callable[[], Any]) -> int:
    """Floating point operations of matrix products, convolutions and attention; one multiply-add is two."""
    with FlopCounterMode(display=False, custom_mapping=CORRECTED) as counter:
        run()
    return counter.get_total_flops()


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operators made within the block and that still live: now, and at the peak.

    Counted when an operator returns: what a kernel needs only inside itself is left out, and so are weights, which
    were there before. The gradients of weights are in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in given:
                self._enter(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_bytes(run: Callable[[], Any]) -> int:
    """Peak of `LiveBytes` while `run` runs."""
    with LiveBytes() as live:
        run()
    return live.peak


class _Numbers(TorchDispatchMode):
    """Reads every tensor as the number 1."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is ATEN._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Within the block tensors are made without values; see the module's text."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Numbers():
        yield
