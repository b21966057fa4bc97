"""Privacy of the images that stay, against scikit-learn and cases with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from synthetic import make_signals

from distunlearn.audit.figures.retained import retained_figures, three_classes
from distunlearn.config.schema import RunConfig

CFG = RunConfig()


def shown(original: float, unlearned: float) -> dict:
    return {"original": make_signals(original, seed=0), "unlearned": make_signals(unlearned, seed=1)}


def test_aucs_and_their_change_are_those_of_scikit_learn():
    signals = shown(0.4, 1.2)
    found = retained_figures(signals, CFG)["attacks"]["bank_loss"]
    for name, s in signals.items():
        rows = np.concatenate([s.of("retain"), s.of("holdout")])
        assert found[name] == pytest.approx(roc_auc_score(s.roles[rows] == "retain", -s.bank_loss[rows]), abs=1e-12)
    assert found["change"] == pytest.approx(found["unlearned"] - found["original"], abs=1e-12)


def test_more_exposed_and_unchanged_are_told_apart():
    exposed = retained_figures(shown(0.4, 1.6), CFG)["attacks"]
    same = retained_figures(shown(0.8, 0.8), CFG)["attacks"]
    for name in ("view_agreement", "bank_loss", "gradient_norm_head"):
        assert exposed[name]["low"] > 0, name
        assert same[name]["low"] < 0 < same[name]["high"], name


def test_three_classes_at_chance_where_nothing_is_known():
    sizes = {"retain": 1200, "forget": 600, "third_party_audit": 1, "holdout": 1200}
    found = three_classes(make_signals(0.0, sizes=sizes), 0)
    assert abs(found["balanced_accuracy"] - 1 / 3) < 0.05
    members = three_classes(make_signals(3.0, sizes=sizes), 0)
    # Retained and forgotten images are alike here: strangers are found, the two kinds of members are a coin toss.
    assert members["holdout"] > 0.9 and abs((members["retain"] + members["forget"]) / 2 - 0.5) < 0.08


def test_three_classes_need_images_of_each():
    sizes = {"retain": 30, "forget": 4, "third_party_audit": 1, "holdout": 30}
    assert all(math.isnan(value) for value in three_classes(make_signals(1.0, sizes=sizes), 0).values())


def test_without_holdout_nothing_is_said():
    signals = {name: s.at(s.roles != "holdout") for name, s in shown(0.5, 0.5).items()}
    found = retained_figures(signals, CFG)["attacks"]["view_agreement"]
    assert all(math.isnan(found[key]) for key in ("original", "change", "low", "high"))
