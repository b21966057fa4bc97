"""Machine unlearning for contrastive image encoders, on one process or many, with the evidence.

Command line: `distunlearn --help`. From Python: `import distunlearn as du; du.unlearn(...)`, see `distunlearn.api`.
Importing the package is cheap: torch and the rest are imported with the first name that needs them.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

__version__ = "0.1.0.dev0"

_FROM = {
    "Run": "distunlearn.api", "load_config": "distunlearn.api", "open_run": "distunlearn.api",
    "unlearn": "distunlearn.api",
}  # fmt: skip
__all__ = ["__version__", *sorted(_FROM)]

# Read when torch loads its OpenMP library: idle threads sleep. By default they spin, and where another process wants
# the same cores training was 10 times slower for it. Where torch came first: see `common/openmp.py`.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name: str) -> Any:
    if name == "api":
        return importlib.import_module("distunlearn.api")
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_FROM[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_FROM})
