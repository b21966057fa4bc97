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
    "Method": "distunlearn.methods.base", "MethodConfig": "distunlearn.config.schema",
    "Objective": "distunlearn.objectives.base", "ObjectiveConfig": "distunlearn.config.schema",
    "Run": "distunlearn.api", "StepOutput": "distunlearn.methods.base", "load_config": "distunlearn.api",
    "open_run": "distunlearn.api", "unlearn": "distunlearn.api",
    "webdataset": "distunlearn.data.loading.webdataset_pipeline",
}  # fmt: skip
__all__ = ["__version__", *sorted(_FROM)]

# Read when torch loads its OpenMP library: idle threads sleep. By default they spin, and where another process wants
# the same cores training was 10 times slower for it. Where torch came first: see `common/openmp.py`.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name: str) -> Any:
    """Names of `_FROM`; and settings of the built-in methods, objectives and evaluators, by the name of their class."""
    if name == "api":
        return importlib.import_module("distunlearn.api")
    place = _FROM.get(name)
    if place is not None:
        found = getattr(importlib.import_module(place), name)
    elif name[:1].isupper() and name in _settings():
        module, _, kind = _settings()[name].partition(":")
        found = getattr(importlib.import_module(module), kind).Config
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def _settings() -> dict[str, str]:
    from distunlearn.config.registry import KINDS

    return {place.partition(":")[2]: place for kind in KINDS for place in kind.table.values()}


def __dir__() -> list[str]:
    return sorted({*globals(), *_FROM})
