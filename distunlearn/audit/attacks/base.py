"""What an attack returns, the attack that needs no fitting, and the one that is fitted crosswise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from distunlearn.audit.signals.collect import Signals
from distunlearn.common.random import STREAMS
from distunlearn.verify.statistics import Comparison, Part

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]  # rows of members, rows of strangers -> scores of all rows


@dataclass(frozen=True, eq=False)
class Attacked:
    """An attack on one encoder.

    comparison: forget against holdout, higher means "member". shown: [n] over all rows of the signals, the
    value to save and to draw (NaN where there is none); its direction may be the other one.
    """

    comparison: Comparison
    shown: np.ndarray


def threshold_attack(signals: Signals, values: np.ndarray, *, members_are_high: bool) -> Attacked:
    """Accuse whoever is beyond a threshold; the AUC stands for all thresholds. values: [n]."""
    sign = 1.0 if members_are_high else -1.0
    forget, holdout = signals.of("forget"), signals.of("holdout")
    return Attacked(Comparison.of(sign * values[forget], sign * values[holdout]), values)


def crosswise_attack(signals: Signals, score: Score, seed: int) -> Attacked:
    """An attacker who knows the retained images as members and one half of the holdout as strangers.

    He is scored on forget against the other half, then the halves change places, so that no scored image was ever
    fitted. The AUC is the mean of the two. The halves are the same for every attack and encoder of a seed.

    Args:
        score: (rows of known members, rows of known strangers) -> [n], higher: member.
    """
    retain, forget, holdout = (signals.of(role) for role in ("retain", "forget", "holdout"))
    half = np.random.default_rng([seed, STREAMS["attack halves"]]).permutation(len(holdout)) % 2
    parts, columns = [], []
    for fold in (0, 1):
        fitted, scored = holdout[half == fold], np.flatnonzero(half != fold)
        values = score(retain, fitted)
        parts.append(Part(values[forget], values[holdout[scored]], scored))
        column = np.full(len(signals.ids), np.nan)
        for rows in (forget, holdout[scored], signals.of("third_party_audit")):
            column[rows] = values[rows]
        columns.append(column)
    both = np.stack(columns)
    known = np.isfinite(both)
    shown = np.where(known, both, 0).sum(0) / np.maximum(known.sum(0), 1)  # a holdout image has one score, forget two
    return Attacked(Comparison(tuple(parts)), np.where(known.any(0), shown, np.nan))


def fitted_log_odds(features: np.ndarray, strength: float = 0.1) -> Score:
    """Logistic regression on standardised features [n, k]: log odds of being a member, both classes weighted alike.

    All 0, which is chance, with too few images to fit. strength: scikit-learn's C, small is strongly regularised.
    """

    def score(members: np.ndarray, strangers: np.ndarray) -> np.ndarray:
        if len(members) < 2 or len(strangers) < 2:
            return np.zeros(len(features))
        rows = np.concatenate([members, strangers])
        known = np.concatenate([np.ones(len(members)), np.zeros(len(strangers))])
        regression = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)
        return make_pipeline(StandardScaler(), regression).fit(features[rows], known).decision_function(features)

    return score
