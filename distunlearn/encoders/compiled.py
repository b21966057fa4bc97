"""torch.compile, block by block, for the forwards that it can follow.

Compiled code does not look at hooks that came after it was made. So a block runs compiled only while its modules have
the hooks they had when it was sealed (those of the backend), and as plain Python while anything else listens or adds:
the passes of the constraint that go through hooks. Blocks of one kind share their compiled code.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["COMPILER", "compiled"]

COMPILER = "inductor"  # the compiler's backend, as torch.compile names it


def compiled(part: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
    """A forward for `part` that runs compiled where it may; made when the backend has placed its hooks."""
    # The compiler looks at `.grad` of the block's inputs, in passing.
    warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
    fast = torch.compile(plain, backend=COMPILER)
    modules = list(part.modules())
    sealed = _hooks(modules)

    def forward(*args: Any, **kwargs: Any) -> Any:
        run = fast if _hooks(modules) == sealed else plain
        return run(*args, **kwargs)

    return forward


def _hooks(modules: list[nn.Module]) -> list[int]:
    """Which hooks the modules have: every hook has a number of its own."""
    return [key for module in modules for key in (*module._forward_hooks, *module._forward_pre_hooks)]
