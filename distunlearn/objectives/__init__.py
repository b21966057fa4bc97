"""Training objectives: SimCLR, MoCo v2, MoCo v3, BYOL and supervised, one file each with its settings.

Their names are in `config/registry.py`; a module is imported when its objective is asked for.
"""

from __future__ import annotations

from distunlearn.config.registry import OBJECTIVE, find
from distunlearn.config.schema import ObjectiveConfig
from distunlearn.objectives.base import Branches, Objective
from distunlearn.objectives.memory_bank import Bank
from distunlearn.objectives.queue import KeyQueue

__all__ = ["Bank", "Branches", "KeyQueue", "Objective", "make_objective"]


def make_objective(settings: ObjectiveConfig) -> Objective:
    """The objective of a run. Raises ConfigError for a name that is not known."""
    return find(OBJECTIVE, settings.name)(settings)
