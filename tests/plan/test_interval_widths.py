"""What `plan` says of the gates' intervals, against the intervals of finished audits and of a simulation."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distunlearn.config.load import load_config
from distunlearn.methods.base import method_class
from distunlearn.plan.interval_widths import ATTACKED, SPREAD, expected_widths, spread

CFG = load_config("digits", None, [])
CELLS = Path(__file__).parents[2] / "benchmarks/results"


@pytest.fixture(scope="module")
def finished():
    """(`Method.moves`, kind of encoder, attack, figures of it, what was expected) of every committed run and attack."""
    found = []
    for path in sorted(CELLS.glob("forgetting-*/*.json")):
        content = json.loads(path.read_text())
        if content.get("summary", {}).get("attacks", {}).get(ATTACKED[0], {}).get("gap", {}).get("low") is None:
            continue  # of a sweep, or without a retrained encoder
        cell, summary = content["cell"], content["summary"]
        method = load_config("digits", None, [f"method.name={cell['method']}"]).method
        encoder = replace(CFG.encoder, name="vit_tiny_patch16_224" if cell["encoder"] == "vit" else "resnet18")
        expected = expected_widths(replace(CFG, method=method, encoder=encoder), summary["images"])["gates"]
        moves = method_class(replace(CFG, method=method)).moves
        found += [(moves, cell["encoder"], a, summary["attacks"][a], expected[a]) for a in ATTACKED]
    return found


def width(figures) -> float:
    return (figures["gap"]["high"] - figures["gap"]["low"]) / 2


def within(runs) -> float:
    """Share of widths that are within 20 % of what was expected."""
    return statistics.mean(abs(width(found) / expected["half_width"] - 1) <= 0.2 for *_, found, expected in runs)


def test_widths_are_those_of_finished_runs(finished):
    """By how much the promise of 20 % is missed: 16 % of all widths, 22 % of third_party's."""
    assert len(finished) == 480 * len(ATTACKED)
    assert within(finished) > 0.83 and within([run for run in finished if run[0] == "much"]) > 0.76
    inside = statistics.mean(expected["low"] <= width(found) <= expected["high"] for *_, found, expected in finished)
    assert 0.75 < inside < 0.85
    for kind, encoder in SPREAD:
        for attack in ATTACKED:
            runs = [run for run in finished if run[:3] == (kind, encoder, attack)]
            assert (
                abs(statistics.median(width(found) / expected["half_width"] for *_, found, expected in runs) - 1) < 0.05
            )


def test_seeds_of_the_same_run_differ_by_more_than_the_promise():
    """What no table can foretell: a run's width against the others of its own grid, settings and attack.

    The logarithms' spread about the mean of three, times sqrt(3 / 2), is that about what many seeds would show.
    """
    same = defaultdict(list)
    for path in sorted(CELLS.glob("forgetting-*/*.json")):
        content = json.loads(path.read_text())
        attacks = content.get("summary", {}).get("attacks", {})
        if attacks.get(ATTACKED[0], {}).get("gap", {}).get("low") is not None:
            cell = {name: value for name, value in content["cell"].items() if name != "seed"}
            for attack in ATTACKED:
                same[path.parent, json.dumps(cell), cell["method"], attack].append(width(attacks[attack]))
    logs = np.log(np.array(list(same.values())))
    assert logs.shape == (480 * len(ATTACKED) // 3, 3)
    apart = np.sqrt(1.5) * (logs - logs.mean(1, keepdims=True))
    near, third_party = np.abs(np.exp(apart) - 1) <= 0.2, [method == "third_party" for _, _, method, _ in same]
    assert 0.94 < near.mean() < 0.96 and 0.88 < near[third_party].mean() < 0.91


def test_a_bootstrap_is_not_why_widths_differ():
    """With the draws of an audit the width of the same scores repeats within 2.5 % (one standard deviation)."""
    rng = np.random.default_rng(0)
    low, high = np.quantile(rng.normal(size=(300, CFG.audit.bootstrap)), [0.05, 0.95], axis=1)
    assert (high - low).std() / (high - low).mean() < 0.025


def test_why_the_promise_is_missed(finished):
    """One encoder's interval is as wide as the formula says; what two share is known afterwards only, and differs."""
    single, alike = [], []
    for *_, attack, found, expected in finished:
        sides = [(found[e]["auc_high"] - found[e]["auc_low"]) / 2 / 1.96 for e in ("unlearned", "retrained")]
        alike.append((sides[0] ** 2 + sides[1] ** 2 - (width(found) / 1.645) ** 2) / (2 * sides[0] * sides[1]))
        if attack != "encodermi_vector":  # which is fitted crosswise, a mean over parts
            single.append(sides[1] / (expected["one_encoder"] / 1.645))
    assert statistics.mean(abs(ratio - 1) < 0.1 for ratio in single) > 0.9
    low, high = np.quantile(alike, [0.1, 0.9])
    assert low < 0.1 and high > 0.8


def test_the_formula_is_that_of_independent_scores():
    """Bootstrap intervals of two independent AUCs of noise are 1.41 times as wide as a factor of 1 would say."""
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
    factor = statistics.mean(halves) / (plain["half_width"] / spread("much", CFG.encoder.name)["view_agreement"][1])
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


def test_without_a_retrained_encoder_the_width_is_that_of_one_encoder(finished):
    """And so it was in finished runs, whose intervals of one encoder are of 95 %: within a tenth near 0.5."""
    cfg = replace(CFG, audit=replace(CFG.audit, tier=0))
    found = expected_widths(cfg, {"forget": 200, "holdout": 600})
    assert {gate["half_width"] for gate in found["gates"].values()} == {0.0388} and "of chance" in found["verdict"]
    assert expected_widths(cfg, {"forget": 200, "holdout": 0}) == {}
    near = [
        (attack["unlearned"]["auc_high"] - attack["unlearned"]["auc_low"]) / 2 * 1.645 / 1.96 / expected["one_encoder"]
        for *_, name, attack, expected in finished
        if abs(attack["unlearned"]["auc"] - 0.5) < 0.05 and name == "bank_loss"
    ]
    assert len(near) > 100 and statistics.median(near) == pytest.approx(1, abs=0.1)
