"""torch.compile, block by block, for the forwards that it can follow.

Compiled code does not look at hooks that came after it was made. So a block runs compiled only while its modules have
the hooks they had when it was sealed (those of the backend), and as plain Python while anything else listens. Passes of
the constraint that add to activations replace forwards of layers instead (`blocks.replaced_forwards`), which compiled
code is asked about before it runs: they are compiled with the block, and their tensors are its inputs. Blocks of one
kind share their compiled code.
"""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from distunlearn.errors import ConfigError

COMPILER = "inductor"  # the compiler's backend, as torch.compile names it
CODES = 128  # of one function: blocks of different shapes, in every pass and mode of a step; torch would stop at 8


def compiled(part: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
    """A forward for `part` that runs compiled where it may; made when the backend has placed its hooks."""
    # The compiler looks at `.grad` of the block's inputs, in passing.
    warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)

    # One graph for every shape: a forward that is repeated must find the graph it used, not a newer, more general one.
    fast = torch.compile(plain, backend=COMPILER, dynamic=False)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, CODES)
    modules = list(part.modules())
    sealed = _hooks(modules)

    def forward(*args: Any, **kwargs: Any) -> Any:
        run = fast if _hooks(modules) == sealed else plain
        return run(*args, **kwargs)

    return forward


def require_compiler() -> None:
    """Raise before anything is computed where torch.compile would fail in the first step.

    Raises:
        ConfigError: the compiler that torch generates code for is missing (C++ on a CPU, triton on a GPU).
    """
    if COMPILER != "inductor":
        return
    if torch.cuda.is_available():
        missing = None if importlib.util.find_spec("triton") else "triton cannot be imported"
    else:
        missing = _without_cxx()
    if missing:
        raise ConfigError(
            f"runtime.compile=true needs a compiler, but {missing}; install it, or set runtime.compile=false."
        )


def _without_cxx() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = get_cpp_compiler()
    except InvalidCxxCompiler:
        return "no C++ compiler is found (g++ or clang++, or the one that CXX names)"
    return None if shutil.which(compiler) else f"{compiler} is not found"


def _hooks(modules: list[nn.Module]) -> list[int]:
    """Which hooks the modules have: every hook has a number of its own."""
    return [key for module in modules for key in (*module._forward_hooks, *module._forward_pre_hooks)]
