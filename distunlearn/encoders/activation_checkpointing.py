"""Activation checkpointing: a block keeps its input alone and runs forward once more when its backward needs the rest.

Chen et al., arXiv 1604.06174; torch's non-reentrant form. What a forward is, depends here on more than its input: on
hooks (records) and other forwards of layers (probes, common patterns of active units), on the mode of the batch norms
and on the attention kernels allowed, all of them set for one forward and long gone when the backward runs. So every
forward remembers them, and its repetition gets exactly those; running statistics, which the first forward has updated,
are not updated again.

On several processes a repeated forward repeats its collectives (batch statistics); all ranks run the same backward, so
they meet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
# Kernels of attention that may run: (is it allowed, allow it or not); the flags hold for CPUs too.
ATTENTION = tuple(
    (getattr(torch.backends.cuda, f"{kind}_sdp_enabled"), getattr(torch.backends.cuda, f"enable_{kind}_sdp"))
    for kind in ("flash", "mem_efficient", "math", "cudnn")
)

_depth = 0  # of forwards that are being repeated


def recomputing() -> bool:
    """True while a forward is repeated: a hook that keeps what it sees has seen it already."""
    return _depth > 0


def checkpointed(part: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
    """A forward for `part` that keeps only its inputs; `plain` is the present one. Without gradients it is `plain`."""

    def marked(*args: Any, **kwargs: Any) -> Any:
        return tree_map_only(torch.Tensor, _Last.apply, plain(*args, **kwargs))

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        # Without early stop a repetition runs to its end, so that hooks that come in pairs stay paired.
        with set_checkpoint_early_stop(False):
            return checkpoint(marked, *args, use_reentrant=False, context_fn=lambda: _contexts(part), **kwargs)

    return forward


class _Last(torch.autograd.Function):
    """The last operator of a block, which does nothing but ask for a kept tensor, and so lets the block repeat its
    forward before the backward of any layer has begun. ZeRO-3 would else gather the weights of the last layer for its
    backward, see them used in the repetition and free them too early.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.new_empty(0))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        _ = ctx.saved_tensors
        return grad


def _contexts(part: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Called at the forward: (around it, around its repetition)."""
    return nullcontext(), _AsThen(part)


class _AsThen(AbstractContextManager[None]):
    """Within it the modules of `part` have the hooks and modes they had when it was made, and running statistics to
    throw away. It may be entered again: a graph that is kept repeats its forward for every backward.
    """

    def __init__(self, part: nn.Module) -> None:
        self._then = [(m, _hooks(m, copy=True), m.training, m.__dict__.get("forward")) for m in part.modules()]
        self._attention = [enabled() for enabled, _ in ATTENTION]
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        global _depth
        _depth += 1
        for (enabled, switch), then in zip(ATTENTION, self._attention, strict=True):
            self._undo.append(functools.partial(switch, enabled()))
            switch(then)
        for module, hooks, training, forward in self._then:
            self._undo.append(functools.partial(_set_forward, module, module.__dict__.get("forward")))
            _set_forward(module, forward)
            now = _hooks(module) | {"training": module.training}
            if training and isinstance(module, _BatchNorm):
                now["_buffers"] = module._buffers
                module._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
            self._undo.append(functools.partial(module.__dict__.update, now))
            module.__dict__.update(hooks, training=training)

    def __exit__(self, *error: object) -> None:
        global _depth
        _depth -= 1
        while self._undo:
            self._undo.pop()()


def _set_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    """None: that of its class."""
    module.__dict__.pop("forward", None)
    if forward is not None:
        module.forward = forward


def _hooks(module: nn.Module, copy: bool = False) -> dict[str, Any]:
    own = {name: module.__dict__[name] for name in HOOKS}
    return {name: hooks.copy() for name, hooks in own.items()} if copy else own
