"""Figures by person against brute force: every draw of persons written out image by image, AUCs by scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from synthetic import make_signals

from distunlearn.audit.summary import summarise, write_audit
from distunlearn.config.load import load_config
from distunlearn.config.shape import plain as plain_settings
from distunlearn.verify.figures import ENCODERS, Raw, Rules, judge, plain
from distunlearn.verify.ledger import coverage_by_person
from distunlearn.verify.run import difference
from distunlearn.verify.scores import raw_scores, read_scores, units_of
from distunlearn.verify.statistics import Comparison, draw_images, draw_persons

DRAWS, SEED = 200, 3


def rules(**changes) -> Rules:
    values = dict(seed=SEED, bootstrap=DRAWS, confidence=0.9, view_agreement=0.06, attack=0.08, utility_points=2.5,
                  gates=("view_agreement",), method="third_party")  # fmt: skip
    return Rules(**{**values, **changes})


def scores(persons: int, holdout: int, rng, shift: float = 0.0):
    """({encoder: (forget, holdout)}, who is on the images): images of a person are alike, and of uneven number."""
    sides = []
    for count in (persons, holdout):
        sizes = rng.integers(2, 9, count)
        sides.append(np.repeat(rng.permutation(1000)[:count], sizes))
    taste = [rng.normal(size=1000) for _ in range(2)]
    found = {}
    for encoder, more in (("original", 2.0), ("unlearned", shift), ("retrained", 0.0)):
        both = [taste[k][side] + 0.4 * rng.normal(size=len(side)) for k, side in enumerate(sides)]
        found[encoder] = np.round(both[0] + more, 1), np.round(both[1], 1)  # with ties
    return found, sides


def raw_of(found, sides) -> Raw:
    comparisons = {"view_agreement": {name: Comparison.of(*both) for name, both in found.items()}}
    right = {name: np.ones(len(sides[1])) for name in ("knn", "linear_probe")}
    return Raw(comparisons, dict.fromkeys(found, right), len(sides[0]), len(sides[1]), (sides[0], sides[1]))


def auc(forget, holdout) -> float:
    return roc_auc_score(np.r_[np.ones(len(forget)), np.zeros(len(holdout))], np.r_[forget, holdout])


def written_out(found, sides):
    """Differences of AUC of the very draws of persons, each a list of images."""
    names = [np.unique(side) for side in sides]
    drawn = draw_images(len(names[0]), len(names[1]), DRAWS, SEED)
    differences = []
    for row in range(DRAWS):
        rows = []
        for side, own, counts in zip(sides, names, (drawn.positives[row], drawn.negatives[row]), strict=True):
            rows.append([i for person, times in zip(own, counts, strict=True) for _ in range(times)
                         for i in np.flatnonzero(side == person)])  # fmt: skip
        aucs = [auc(found[e][0][rows[0]], found[e][1][rows[1]]) for e in ("unlearned", "retrained")]
        differences.append(aucs[0] - aucs[1])
    return np.percentile(differences, [5, 95])


@pytest.mark.parametrize(("persons", "holdout", "are_units"), [(3, 37, False), (24, 30, True), (24, 19, False)])
def test_intervals_gates_and_persons_equal_brute_force(persons, holdout, are_units):
    found, sides = scores(persons, holdout, np.random.default_rng(persons + holdout))
    result = judge(raw_of(found, sides), rules())
    told, gap = result["persons"], result["attacks"]["view_agreement"]["gap"]
    assert (told["forget"], told["holdout"], told["are_units"]) == (persons, holdout, are_units)
    ends = written_out(found, sides)
    assert np.allclose([told["attacks"]["view_agreement"][end] for end in ("low", "high")], ends, atol=1e-12)
    by_images = judge(raw_of(found, sides).__class__(**{**vars(raw_of(found, sides)), "persons": None}), rules())
    image_gap = by_images["attacks"]["view_agreement"]["gap"]
    assert np.allclose([gap["low"], gap["high"]], ends if are_units else [image_gap["low"], image_gap["high"]])
    assert by_images["persons"] is None
    each = {row["person"]: row for row in told["attacks"]["view_agreement"]["each"]}
    assert set(each) == set(sides[0].tolist())
    for person, row in each.items():
        own = sides[0] == person
        assert row["images"] == own.sum()
        for encoder in ("unlearned", "retrained"):
            assert np.isclose(row[encoder], auc(found[encoder][0][own], found[encoder][1]))


def test_images_of_few_persons_are_no_evidence_of_many():
    """The control: persons of one taste each make intervals of images too narrow; those of persons are wider."""
    rng = np.random.default_rng(0)
    found, sides = scores(24, 30, rng)
    raw = raw_of(found, sides)
    by_person, by_image = judge(raw, rules()), judge(Raw(**{**vars(raw), "persons": None}), rules())
    widths = [r["attacks"]["view_agreement"]["unlearned"] for r in (by_person, by_image)]
    wide, narrow = (figures["auc_high"] - figures["auc_low"] for figures in widths)
    assert wide > 1.4 * narrow


def test_the_interval_over_persons_holds_what_is_true_as_often_as_it_says():
    """Over 150 samples of persons from one population, the difference that is true there lies in 84 to 96 of 100."""
    inside = 0
    for seed in range(150):
        found, sides = scores(25, 30, np.random.default_rng(1000 + seed))
        gap = judge(raw_of(found, sides), rules())["persons"]["attacks"]["view_agreement"]
        inside += gap["low"] <= 0 <= gap["high"]
    assert 0.84 <= inside / 150 <= 0.96


def test_an_image_of_nobody_is_a_person_of_its_own():
    assert len(set(units_of(np.array([4, -1, 4, -1, -1])).tolist())) == 4
    same = draw_persons(np.arange(5), np.arange(7), 50, 1)
    plain = draw_images(5, 7, 50, 1)
    assert (same.positives == plain.positives).all() and (same.negatives == plain.negatives).all()


@pytest.mark.parametrize("asked", [4, 20])
def test_files_of_an_audit_give_the_figures_by_person_again(asked, tmp_path):
    """From the signals to `audit/`, and from its raw scores back; the control is a number that was changed."""
    signals = {e: make_signals(shift, seed) for seed, (e, shift) in enumerate(zip(ENCODERS, (2, 0.5, 0), strict=True))}
    first = signals["original"]
    persons = np.full(len(first.ids), -1, dtype=np.int32)
    persons[first.of("forget")] = np.arange(len(first.of("forget"))) % asked
    persons[first.of("holdout")[20:]] = 100 + np.arange(len(first.of("holdout")) - 20) // 4  # 20 are nobody's
    cfg = load_config("digits", None, ["audit.bootstrap=100", "audit.relearn_steps=0"])
    covered = coverage_by_person(
        {i: 3 + k % 2 for k, i in enumerate(first.ids)}, dict(zip(first.ids, persons.tolist(), strict=True))
    )
    assert covered[0] == {"person": 0, "images": 60 // asked, "consumed_min": covered[0]["consumed_min"]}
    summary, scores = summarise(signals, cfg, cost={}, coverage={}, persons=persons, person_coverage=covered)
    told = summary["persons"]
    assert (told["forget"], told["holdout"], told["are_units"]) == (asked, 20 + 30, asked == 20)
    write_audit(tmp_path, summary, scores)
    files, own = read_scores(tmp_path), Rules.of(plain_settings(cfg))
    again = plain(judge(raw_scores(files), own))
    assert difference(again["persons"], summary["persons"], "persons") is None
    assert difference(again["gates"], summary["gates"], "gates") is None
    row = next(row for row in files["original"]["samples"].values() if row["role"] == "forget")
    row["person"] += 1
    assert difference(plain(judge(raw_scores(files), own))["persons"], summary["persons"], "persons") is not None
