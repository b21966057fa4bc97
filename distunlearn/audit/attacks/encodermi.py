"""EncoderMI, vector form: a classifier on the sorted similarities between the embeddings of an image's views.

Source: EncoderMI-V of Liu, Jia, Qu and Gong, CCS 2021 (arXiv 2108.11023), section 4.2. Where the paper trains
shadow encoders, this attacker knows more: the retained images themselves are his members, and one half of the holdout
his non-members. He is scored on forget against the other half, then the halves change places, so that no scored image
was ever fitted. The AUC is the mean of the two.
"""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from distunlearn.audit.attacks.base import Attacked
from distunlearn.audit.signals import Signals
from distunlearn.audit.statistics import Comparison, Part

__all__ = ["encodermi_vector"]


def encodermi_vector(signals: Signals, seed: int) -> Attacked:
    """classifier on sorted cosines between embeddings of views, fitted on retain and half of the holdout, crosswise"""
    features = np.sort(signals.embedding_cosines, axis=1)
    retain, forget, holdout = (signals.of(role) for role in ("retain", "forget", "holdout"))
    half = np.random.default_rng([seed, 0xE4]).permutation(len(holdout)) % 2
    parts, columns = [], {}
    for fold in (0, 1):
        fitted, scored = holdout[half == fold], np.flatnonzero(half != fold)
        log_odds = _fit_and_score(features, retain, fitted)
        parts.append(Part(log_odds[forget], log_odds[holdout[scored]], scored))
        column = np.full(len(features), np.nan)
        for rows in (forget, holdout[scored], signals.of("third_party_audit")):
            column[rows] = log_odds[rows]
        columns[f"encodermi_vector_fold{fold}"] = column
    both = np.stack(list(columns.values()))
    known = np.isfinite(both)
    shown = np.where(known, both, 0).sum(0) / np.maximum(known.sum(0), 1)  # a holdout image has one score, forget two
    return Attacked(Comparison(tuple(parts)), np.where(known.any(0), shown, np.nan), columns)


def _fit_and_score(features: np.ndarray, members: np.ndarray, strangers: np.ndarray) -> np.ndarray:
    """Log odds [n] of being a member, both classes weighted alike; all 0, which is chance, with too few to fit."""
    if len(members) < 2 or len(strangers) < 2:
        return np.zeros(len(features))
    rows = np.concatenate([members, strangers])
    known = np.concatenate([np.ones(len(members)), np.zeros(len(strangers))])
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000))
    return classifier.fit(features[rows], known).decision_function(features)
