"""Training objectives: SimCLR, MoCo v2, MoCo v3, BYOL and supervised, one file each, and what they share."""

from __future__ import annotations

import difflib

from distunlearn.config.schema import ObjectiveConfig
from distunlearn.errors import ConfigError
from distunlearn.objectives.base import Branches, Objective
from distunlearn.objectives.byol import BYOL
from distunlearn.objectives.memory_bank import Bank
from distunlearn.objectives.moco import MoCo
from distunlearn.objectives.mocov3 import MoCoV3
from distunlearn.objectives.queue import KeyQueue
from distunlearn.objectives.simclr import SimCLR
from distunlearn.objectives.supervised import Supervised

__all__ = ["OBJECTIVES", "Bank", "Branches", "KeyQueue", "Objective", "make_objective"]

OBJECTIVES: dict[str, type[Objective]] = {
    "simclr": SimCLR,
    "moco": MoCo,
    "mocov3": MoCoV3,
    "byol": BYOL,
    "supervised": Supervised,
}


def make_objective(cfg: ObjectiveConfig) -> Objective:
    """The objective of a run. Raises ConfigError for a name that is not in OBJECTIVES."""
    if cfg.name not in OBJECTIVES:
        near = difflib.get_close_matches(str(cfg.name), OBJECTIVES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "choose one of them"
        raise ConfigError(f"objective.name is '{cfg.name}' where one of {', '.join(OBJECTIVES)} is expected; {hint}")
    return OBJECTIVES[cfg.name](cfg.temperature, max(1, round(cfg.similarity_mib * 2**20)))
