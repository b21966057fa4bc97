"""Privacy of the images that stay: does forgetting expose the retained ones? Reported, never judged.

Unlearning some images can make others easier to recognise (Hayes, Shumailov, Triantafillou, Khalifa and Papernot,
arXiv 2403.01218). Two figures for every encoder, from the signals that the audit has anyway:

* `attacks`: AUC of telling retained images from the holdout, by the statistics that need no fitting, and its change
  from the original to the unlearned encoder, paired over images. Above 0: they are easier to recognise than before.
* `three_classes`: an attacker who is to say of every image whether it is retained, forgotten or unseen, after TC-UMIA
  (arXiv 2605.01129): multinomial logistic regression on those statistics, all classes weighted alike, out of fold.
  Balanced accuracy, 1/3 is chance, and the share of each class that it gets right. An encoder that forgot as if it were
  retrained leaves "forgotten" at the level of a guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from distunlearn.audit.attacks.lira import alignment
from distunlearn.audit.signals.collect import Signals
from distunlearn.config.schema import RunConfig
from distunlearn.verify.statistics import Comparison, auc, auc_bootstrap, draw_images, percentile_interval

CONFIDENCE = 0.95
FOLDS = 5
CLASSES = ("retain", "forget", "holdout")


def retained_figures(signals: Mapping[str, Signals], cfg: RunConfig) -> dict[str, Any]:
    """{"attacks": {name: {encoder: AUC, "change", "low", "high"}}, "three_classes": {encoder: figures}}.

    change: AUC(unlearned) - AUC(original) with its 95 % interval over images; NaN without images of both kinds.
    """
    first = signals["original"]
    retained, holdout = first.of("retain"), first.of("holdout")
    enough = len(retained) > 0 and len(holdout) > 0
    draws = draw_images(len(retained), len(holdout), cfg.audit.bootstrap, cfg.seed) if enough else None
    known = {encoder: _statistics(s) for encoder, s in signals.items()}
    attacks: dict[str, Any] = {}
    for number, name in enumerate(("view_agreement", "bank_loss", "gradient_norm_head")):
        found = {e: Comparison.of(s[retained, number], s[holdout, number]) for e, s in known.items()}
        change, ends = math.nan, (math.nan, math.nan)
        if draws is not None:
            sampled = {encoder: auc_bootstrap(found[encoder], draws) for encoder in ("original", "unlearned")}
            change = auc(found["unlearned"]) - auc(found["original"])
            ends = percentile_interval(sampled["unlearned"] - sampled["original"], CONFIDENCE)
        aucs = {encoder: auc(comparison) for encoder, comparison in found.items()}
        attacks[name] = {**aucs, "change": change, "low": ends[0], "high": ends[1]}
    return {"attacks": attacks, "three_classes": {e: three_classes(s, cfg.seed) for e, s in signals.items()}}


def three_classes(signals: Signals, seed: int) -> dict[str, float]:
    """{"balanced_accuracy", "retain", "forget", "holdout"}: shares in [0, 1]; NaN if a class has less than 5 images."""
    kept = np.concatenate([signals.of(role) for role in CLASSES])
    truth = np.concatenate([np.full(len(signals.of(role)), number) for number, role in enumerate(CLASSES)])
    if np.bincount(truth, minlength=len(CLASSES)).min() < FOLDS:
        return dict.fromkeys(("balanced_accuracy", *CLASSES), math.nan)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed % 2**32)
    regression = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000))
    said = cross_val_predict(regression, _statistics(signals)[kept], truth, cv=folds)
    right = {role: float((said[truth == number] == number).mean()) for number, role in enumerate(CLASSES)}
    return {"balanced_accuracy": float(np.mean(list(right.values()))), **right}


def _statistics(signals: Signals) -> np.ndarray:
    """[n, 4], higher: known. View agreement, minus bank loss, minus log of the head's gradient norm, and confidence."""
    norm = np.log(np.maximum(signals.gradient_norm_head, 1e-30))
    return np.stack([alignment(signals), -signals.bank_loss, -norm, signals.confidence], axis=1)
