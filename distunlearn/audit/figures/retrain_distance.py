"""Distances to the retrained encoder in one number: ToW, IAM and the average gap. Reported, never judged.

    ToW      = product over forget, retain, holdout of (1 - |acc(unlearned) - acc(retrained)|)
    ToW-MIA  = the same with the AUC of view agreement in place of the accuracy on forget
    IAM_i    = 1 - sum_a a F_a(s_i) / sum_a a,   F_a: normal distribution around s_out,i + a (s_orig,i - s_out,i)
    average gap = mean over attacks and utilities of |figure(unlearned) - figure(retrained)|, in points of 100

Sources: ToW, Zhao, Kurmanji, Barbulescu, Triantafillou and Triantafillou, "What makes unlearning hard and what to do
about it", NeurIPS 2024 (arXiv 2406.01257), here with a linear probe, for an encoder has no accuracy of its own. IAM:
"Towards Lifecycle Unlearning Commitment Management", USENIX Security 2025, with one shadow model (the retrained one)
and the spread over images at every a, as its code has it; the Gumbel form is for losses, the signal here (atanh of the
view agreement) is near a normal one. Average gap: the custom of the field, as in SalUn, Fan et al., ICLR 2024.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from distunlearn.audit.attacks.lira import alignment
from distunlearn.audit.figures.utility import probe_accuracies
from distunlearn.audit.signals.collect import Signals
from distunlearn.verify.figures import UTILITIES
from distunlearn.verify.statistics import Comparison, auc

ALPHAS = 100


def tow(signals: Mapping[str, Signals], agreement: Mapping[str, float]) -> dict[str, Any]:
    """ToW and ToW-MIA of the unlearned encoder in [0, 1] (1: as retrained), and the accuracies behind them.

    agreement: AUC of view agreement by encoder. NaN without labels of two classes.
    """
    accuracies = {name: probe_accuracies(signals[name]) for name in ("unlearned", "retrained")}
    kept = {
        role: 1 - abs(accuracies["unlearned"][role] - accuracies["retrained"][role])
        for role in ("forget", "retain", "holdout")
    }
    known = 1 - abs(agreement["unlearned"] - agreement["retrained"])
    useful = kept["retain"] * kept["holdout"]
    return {"tow": kept["forget"] * useful, "tow_mia": known * useful, "probe_accuracy": accuracies}


def iam_scores(original: np.ndarray, retrained: np.ndarray, unlearned: np.ndarray) -> np.ndarray:
    """IAM of n images, [n], from a signal that is high for known images: near 1 as retrained, near 0 as original.

    All n images share the spread of each interpolation, so they must be of one kind. Values above 1/2 for an image
    say that it looks less known than half way; an unchanged encoder has a mean below, a retrained one above 1/2.
    """
    weights = np.linspace(0, 1, ALPHAS + 1)[1:]
    below = np.zeros(len(unlearned))
    for weight in weights:
        middle = retrained + weight * (original - retrained)
        below += weight * stats.norm.cdf(unlearned, middle, max(float(middle.std()), 1e-12))
    return 1 - below / weights.sum()


def iam(signals: Mapping[str, Signals]) -> dict[str, float]:
    """Mean IAM of the forget images for the unlearned encoder, and the two ends of the scale.

    `unchanged` and `as_retrained` are the values of an unlearned encoder that equals the original or the retrained one.
    """
    values = {name: alignment(s)[s.of("forget")] for name, s in signals.items()}
    ends = {"unlearned": "unlearned", "unchanged": "original", "as_retrained": "retrained"}
    found = {}
    for key, name in ends.items():
        scores = iam_scores(values["original"], values["retrained"], values[name])
        found[key] = float(scores.mean()) if len(scores) else math.nan
    return found


def average_gap(
    comparisons: Mapping[str, Mapping[str, Comparison]],
    utility: Mapping[str, Mapping[str, float]],
    chosen: Sequence[str],
    name: str = "unlearned",
) -> dict[str, Any]:
    """{"value", "gaps": {figure: gap}, "attacks"}: gaps in points, |AUC| and accuracy times 100.

    comparisons: {attack: {encoder: Comparison}}. utility: {knn, linear_probe: {encoder: accuracy}}. chosen: attacks.
    """
    gaps = {attack: abs(auc(comparisons[attack][name]) - auc(comparisons[attack]["retrained"])) for attack in chosen}
    gaps |= {key: abs(utility[key][name] - utility[key]["retrained"]) for key in UTILITIES}
    points = {key: 100 * gap for key, gap in gaps.items()}
    return {"value": float(np.mean(list(points.values()))), "gaps": points, "attacks": list(chosen)}
