"""Ways to forget, one readable file each: settings, needs, search space, texts and loss (`base.Method`).

Their names are in `config/registry.py`; a module is imported when its method is asked for.
"""

from __future__ import annotations

from distunlearn.methods.base import Method, StepOutput, method_class, missing, refuse_missing

__all__ = ["Method", "StepOutput", "method_class", "missing", "refuse_missing"]
