"""Figures of one request of a stress test: the attacks of the gates, accuracies, and the average gap to retrained."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from distunlearn.audit.attacks import attack
from distunlearn.audit.figures.retrain_distance import average_gap
from distunlearn.audit.figures.utility import correct_predictions
from distunlearn.audit.signals.collect import Signals
from distunlearn.config.schema import RunConfig
from distunlearn.verify.figures import JUDGED, UTILITIES
from distunlearn.verify.statistics import Comparison, auc, auc_bootstrap, draw_images, percentile_interval

CONFIDENCE = 0.95


def request_figures(
    signals: Mapping[str, Signals], utility: Mapping[str, Mapping[str, float]], cfg: RunConfig
) -> dict[str, Any]:
    """Attack, measure and compare.

    Args:
        signals: of the encoders original, unlearned and retrained, of the same images.
        utility: from `accuracies`.

    Returns:
        {"images": {"forget", "holdout"}, "attacks": {name: {encoder: AUC, "gap", "low", "high", "power"}}, "utility",
        "average_gap"}. gap: AUC(unlearned) - AUC(retrained), with its 95 % interval, paired over images. power: whether
        the 95 % interval of the AUC on the original encoder leaves 0.5 out. average_gap: points, over the attacks of
        `audit.average` that are gates by themselves, kNN and linear probe.
    """
    first = signals["original"]
    images = {role: len(first.of(role)) for role in ("forget", "holdout")}
    if not all(images.values()):
        return {"images": images, "attacks": {}, "utility": utility, "average_gap": math.nan}
    draws = draw_images(images["forget"], images["holdout"], cfg.audit.bootstrap, cfg.seed)
    compared: dict[str, dict[str, Comparison]] = {}
    attacks = {}
    for name in JUDGED:
        compared[name] = {encoder: attack(name)(s, cfg.seed).comparison for encoder, s in signals.items()}
        sampled = {encoder: auc_bootstrap(comparison, draws) for encoder, comparison in compared[name].items()}
        aucs = {encoder: auc(comparison) for encoder, comparison in compared[name].items()}
        low, high = percentile_interval(sampled["unlearned"] - sampled["retrained"], CONFIDENCE)
        power = percentile_interval(sampled["original"], CONFIDENCE)
        attacks[name] = {
            **aucs, "gap": aucs["unlearned"] - aucs["retrained"], "low": low, "high": high,
            "power": bool(power[0] > 0.5 or power[1] < 0.5),
        }  # fmt: skip
    chosen = [name for name in cfg.audit.average if name in compared]
    gap = average_gap(compared, utility, chosen)["value"]
    return {"images": images, "attacks": attacks, "utility": utility, "average_gap": gap}


def accuracies(signals: Mapping[str, Signals], cfg: RunConfig) -> dict[str, dict[str, float]]:
    """{knn, linear_probe: {encoder: accuracy}} on the labelled holdout; NaN without labels of two classes."""
    result: dict[str, dict[str, float]] = {name: {} for name in UTILITIES}
    for encoder, s in signals.items():
        for name, right in correct_predictions(s, cfg.audit.neighbours).items():
            known = right[np.isfinite(right)]
            result[name][encoder] = float(known.mean()) if len(known) else math.nan
    return result


def of_request(signals: Signals, chosen: Collection[str]) -> np.ndarray:
    """Rows to attack one request by: of the forget images the chosen ones alone, of other roles all. bool [n]."""
    return np.array([role != "forget" or i in chosen for i, role in zip(signals.ids, signals.roles, strict=True)])


def agreement(signals: Signals, chosen: Collection[str]) -> float:
    """AUC of view agreement of some forget images against the holdout."""
    return auc(attack("view_agreement")(signals.at(of_request(signals, chosen)), 0).comparison)
