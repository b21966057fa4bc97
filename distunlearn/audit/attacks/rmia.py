"""RMIA with one reference encoder: is the image's confidence raised more than that of strangers?

    LR(x, z) = [P(x | theta) / P(x)] / [P(z | theta) / P(z)]          score(x) = share of z with LR(x, z) > GAMMA
    P(x) = [(1 + A) P(x | reference) + (1 - A)] / 2

with P the confidence of the bank softmax, z the strangers (half of the holdout, crosswise) and the retrained encoder as
reference, which has seen neither forget nor holdout. Source: Zarifzadeh, Liu and Shokri, "Low-Cost High-Power
Membership Inference Attacks", ICML 2024 (arXiv 2312.03262), offline form; A is tuned there, here it is 0.3.
Against the reference itself the score says nothing but the form of P(x).
"""

from __future__ import annotations

import numpy as np

from distunlearn.audit.attacks.base import Attacked, crosswise_attack
from distunlearn.audit.signals.collect import Signals

GAMMA = 1.0
A = 0.3


def rmia(signals: Signals, reference: Signals, seed: int) -> Attacked:
    """confidence relative to the retrained encoder's, compared with that of strangers, crosswise"""
    prior = ((1 + A) * reference.confidence + (1 - A)) / 2
    ratio = signals.confidence / prior

    def score(members: np.ndarray, strangers: np.ndarray) -> np.ndarray:
        beaten = np.sort(GAMMA * ratio[strangers])
        return np.searchsorted(beaten, ratio, side="left") / max(1, len(strangers))

    return crosswise_attack(signals, score, seed)
