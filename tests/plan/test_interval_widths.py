"""What `plan` says of the gates' intervals, against the intervals of finished audits and of a simulation."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distunlearn.config.load import load_config
from distunlearn.plan.interval_widths import SPREAD, expected_widths

CFG = load_config("digits", None, [])
CELLS = Path(__file__).parents[2] / "benchmarks/results"


def finished(method: str):
    """(images by role, gaps by attack) of the committed runs of a method."""
    for path in sorted(CELLS.glob("forgetting-*/*.json")):
        cell = json.loads(path.read_text())
        if "summary" in cell and cell["cell"]["method"] == method:
            yield cell["summary"]["images"], {name: a["gap"] for name, a in cell["summary"]["attacks"].items()}


@pytest.mark.parametrize("attack", SPREAD)
def test_widths_are_those_of_finished_runs(attack):
    """Half of the runs lie within 20 % of what was expected, 70 to 90 % between low and high; the median within 5 %."""
    ratios, inside = [], []
    for images, gaps in finished("third_party"):
        expected = expected_widths(CFG, images)["gates"][attack]
        half = (gaps[attack]["high"] - gaps[attack]["low"]) / 2
        ratios.append(half / expected["half_width"])
        inside.append(expected["low"] <= half <= expected["high"])
    assert len(ratios) >= 100 and abs(statistics.median(ratios) - 1) < 0.05
    assert sum(abs(ratio - 1) <= 0.2 for ratio in ratios) > 0.6 * len(ratios)
    assert 0.7 < sum(inside) / len(inside) < 0.9


def test_the_formula_is_that_of_independent_scores():
    """Bootstrap intervals of two independent AUCs of noise are 1.41 times as wide as `SPREAD` of 1 would say."""
    rng = np.random.default_rng(0)
    forget, holdout, halves = 40, 90, []
    plain = expected_widths(CFG, {"forget": forget, "holdout": holdout})["gates"]["view_agreement"]
    for _ in range(30):
        first, second = rng.normal(size=(2, forget + holdout))
        sampled = []
        for _ in range(200):
            at, of = rng.integers(0, forget, forget), forget + rng.integers(0, holdout, holdout)
            wins = [(scores[at][:, None] > scores[of][None]).mean() for scores in (first, second)]
            sampled.append(wins[0] - wins[1])
        low, high = np.quantile(sampled, [0.05, 0.95])
        halves.append((high - low) / 2)
    factor = statistics.mean(halves) / (plain["half_width"] / SPREAD["view_agreement"][1])
    assert 1.3 < factor < 1.5


@pytest.mark.parametrize(
    ("forget", "holdout", "words"),
    [
        (3, 600, "inconclusive, whatever comes out"),
        (12, 600, "never a pass"),
        (30, 600, "a pass is not to be expected"),
        (400, 4000, "pass or fail can come out"),
    ],
)
def test_what_a_verdict_can_be_is_said_before_the_run(forget, holdout, words):
    found = expected_widths(CFG, {"forget": forget, "holdout": holdout})
    assert words in found["verdict"] and str(forget) in found["verdict"]


def test_without_a_retrained_encoder_nothing_is_promised():
    cfg = replace(CFG, audit=replace(CFG.audit, tier=0))
    assert expected_widths(cfg, {"forget": 200, "holdout": 600}) == {}
