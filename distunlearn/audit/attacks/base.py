"""What an attack returns, and the attack that needs no fitting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from distunlearn.audit.signals import Signals
from distunlearn.audit.statistics import Comparison

__all__ = ["Attacked", "threshold_attack"]


@dataclass(frozen=True, eq=False)
class Attacked:
    """An attack on one encoder.

    comparison: forget against holdout, higher means "member". shown: [n] over all rows of the signals, the
    value to save and to draw (NaN where there is none); its direction may be the other one. extra: further
    columns to save, so that every figure can be recomputed from the files.
    """

    comparison: Comparison
    shown: np.ndarray
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)


def threshold_attack(signals: Signals, values: np.ndarray, *, members_are_high: bool) -> Attacked:
    """Accuse whoever is beyond a threshold; the AUC stands for all thresholds. values: [n]."""
    sign = 1.0 if members_are_high else -1.0
    forget, holdout = signals.of("forget"), signals.of("holdout")
    return Attacked(Comparison.of(sign * values[forget], sign * values[holdout]), values)
