"""The audit as a whole on signals with a known answer: names, verdicts, controls, raw scores."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from parts import ATTACKS
from sklearn.metrics import roc_auc_score
from synthetic import make_signals

from distunlearn.audit.summary import summarise, write_audit
from distunlearn.config.schema import AuditConfig, GatesConfig, RunConfig
from distunlearn.verify.figures import ENCODERS

CFG = RunConfig(
    audit=AuditConfig(bootstrap=400, gates=GatesConfig(view_agreement=0.1, attack=0.12, utility_points=8.0))
)
COST = {"pretrain_images": 10, "unlearn_images": 2, "retrain_images": 8, "unlearn_seconds": 1.0, "retrain_seconds": 4.0}
COVERED = {"requested": 60, "consumed_min": 1, "consumed_max": 2, "used_as_retain": 0}
STRONG, NONE = 1.2, 0.0
RATES = {f"{side}tpr_at_{rate}_fpr" for side in ("", "low_") for rate in ("1pct", "0p1pct")}


def audited(unlearned, retrained=None, original=None, cfg=CFG):
    signals = {
        "original": original or make_signals(STRONG, seed=1),
        "unlearned": unlearned,
        "retrained": retrained or forgetting(make_signals(NONE, seed=3)),
    }
    return summarise(signals, cfg, cost=COST, coverage=COVERED)


def forgetting(signals):
    """Only the forgotten images unknown, the retained ones still known: the shape of a perfect unlearner."""
    known = make_signals(STRONG, seed=4)
    rows = signals.of("retain")
    cosines = signals.embedding_cosines.copy()
    cosines[rows] = known.embedding_cosines[rows]
    return replace(signals, embedding_cosines=cosines)


def test_a_perfect_unlearner_passes_every_gate():
    summary, _ = audited(forgetting(make_signals(NONE, seed=2)))
    assert summary["gates"]["verdict"] == "pass", summary["gates"]
    for attack in ATTACKS:
        assert summary["attacks"][attack]["original"]["auc"] > 0.65
        assert abs(summary["attacks"][attack]["unlearned"]["auc"] - 0.5) < 0.1


def test_an_encoder_that_changed_nothing_fails():
    original = make_signals(STRONG, seed=1)
    summary, _ = audited(original, original=original)
    assert summary["gates"]["verdict"] == "fail"
    assert all(summary["attacks"][attack]["gap"]["verdict"] == "fail" for attack in ATTACKS)


def test_an_encoder_that_forgot_too_much_fails_from_the_other_side():
    over = make_signals(NONE, seed=2)
    rows = over.of("forget")
    cosines = over.output_cosines.copy()
    cosines[rows] -= 0.1
    summary, _ = audited(replace(forgetting(over), output_cosines=cosines))
    gap = summary["attacks"]["view_agreement"]["gap"]
    assert gap["verdict"] == "fail" and gap["high"] < -0.1


def test_an_encoder_that_sees_nothing_fails_on_utility():
    blind = forgetting(make_signals(NONE, seed=2, skill=0.0))
    summary, _ = audited(blind)
    assert summary["gates"]["knn"]["verdict"] == "fail" and summary["gates"]["linear_probe"]["verdict"] == "fail"
    assert summary["gates"]["verdict"] == "fail"


def test_attacks_without_power_make_the_verdict_inconclusive():
    weak = make_signals(NONE, seed=1)
    summary, _ = audited(make_signals(NONE, seed=2), make_signals(NONE, seed=3), weak)
    assert summary["gates"]["verdict"] == "inconclusive"
    assert not summary["controls"]["power"]["view_agreement"]["beats_chance"]
    assert "beat chance" in summary["attacks"]["view_agreement"]["gap"]["reason"]


def test_one_single_image_is_inconclusive():
    sizes = {"retain": 120, "forget": 1, "third_party_audit": 50, "holdout": 140}
    made = [make_signals(shift, seed=seed, sizes=sizes) for shift, seed in ((STRONG, 1), (NONE, 2), (NONE, 3))]
    summary, _ = summarise(dict(zip(ENCODERS, made, strict=True)), CFG, cost=COST, coverage=COVERED)
    assert summary["gates"]["verdict"] == "inconclusive"
    assert all(summary["attacks"][attack]["gap"]["verdict"] == "inconclusive" for attack in ATTACKS)
    json.dumps(summary, allow_nan=False)


def test_images_without_labels_leave_utility_unjudged():
    def unlabelled(signals):
        return replace(signals, labels=np.full(len(signals.ids), -1))

    summary, _ = audited(
        unlabelled(forgetting(make_signals(NONE, seed=2))),
        unlabelled(forgetting(make_signals(NONE, seed=3))),
        unlabelled(make_signals(STRONG, seed=1)),
    )
    assert summary["utility"]["knn"]["original"] is None
    assert summary["gates"]["knn"]["verdict"] == "inconclusive" == summary["gates"]["verdict"]


def test_two_sample_and_controls_find_what_differs_and_only_that():
    summary, _ = audited(forgetting(make_signals(NONE, seed=2)))
    assert summary["two_sample"]["original"]["p"] < 0.01
    assert summary["two_sample"]["original"]["auc"] > 0.7
    assert summary["two_sample"]["unlearned"]["p"] > 0.01
    for encoder in ENCODERS:
        assert summary["controls"]["third_party_against_holdout"][encoder]["p"] > 0.01


def test_names_that_others_read():
    summary, _ = audited(make_signals(NONE, seed=2))
    assert set(summary) >= {"attacks", "utility", "cost", "coverage", "gates"}
    for attack in summary["attacks"].values():
        for encoder in ENCODERS:
            assert set(attack[encoder]) == {"auc", "auc_low", "auc_high", "ks_p", *RATES}
            assert attack[encoder]["auc_low"] <= attack[encoder]["auc"] <= attack[encoder]["auc_high"]
        assert set(attack["gap"]) >= {"auc", "low", "high", "verdict"}
    for name in ("knn", "linear_probe"):
        assert set(summary["utility"][name]) >= set(ENCODERS)
    assert summary["cost"] == COST and summary["coverage"] == COVERED
    assert {"verdict", "view_agreement", "knn", "linear_probe"} <= set(summary["gates"])


def test_every_auc_can_be_computed_again_from_the_raw_scores(tmp_path):
    summary, scores = audited(make_signals(0.4, seed=2))
    write_audit(tmp_path, summary, scores)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    signs = {"gradient_norm_network": -1, "gradient_norm_head": -1}
    for encoder in ENCODERS:
        rows = list(json.loads((tmp_path / f"scores-{encoder}.json").read_text())["samples"].values())
        judged = [row for row in rows if row["role"] in ("forget", "holdout")]
        truth = [row["role"] == "forget" for row in judged]
        for attack in set(ATTACKS) - {"encodermi_vector"}:
            values = [signs.get(attack, 1) * row[attack] for row in judged]
            assert summary["attacks"][attack][encoder]["auc"] == pytest.approx(roc_auc_score(truth, values), abs=1e-12)
        folds = []
        for fold in (0, 1):
            name = f"encodermi_vector_fold{fold}"
            part = [(row["role"] == "forget", row[name]) for row in judged if name in row]
            folds.append(roc_auc_score(*zip(*part, strict=True)))
        assert summary["attacks"]["encodermi_vector"][encoder]["auc"] == pytest.approx(np.mean(folds), abs=1e-12)
        holdout = [row for row in rows if row["role"] == "holdout"]
        assert all(("encodermi_vector_fold0" in row) != ("encodermi_vector_fold1" in row) for row in holdout)
        accuracy = np.mean([row["knn_correct"] for row in holdout])
        assert summary["utility"]["knn"][encoder] == pytest.approx(accuracy)


def test_gaps_are_paired():
    """The same signals for two encoders: the paired interval is a point; unpaired it would be wide."""
    same = make_signals(NONE, seed=2)
    summary, _ = audited(same, same)
    gap = summary["attacks"]["bank_loss"]["gap"]
    assert gap["auc"] == gap["low"] == gap["high"] == 0.0


def test_the_audit_is_blind_to_names():
    """Swapping unlearned and retrained turns the sign of the gap and nothing else."""
    first, second = make_signals(0.3, seed=2), make_signals(NONE, seed=3)
    one, _ = audited(first, second)
    two, _ = audited(second, first)
    for attack in ATTACKS:
        assert one["attacks"][attack]["unlearned"] == two["attacks"][attack]["retrained"]
        assert one["attacks"][attack]["gap"]["auc"] == pytest.approx(-two["attacks"][attack]["gap"]["auc"])
        assert one["attacks"][attack]["gap"]["low"] == pytest.approx(-two["attacks"][attack]["gap"]["high"])


def reversed_signs(signals):
    """Members stand out as much as before, but on the other side of the strangers."""
    base = make_signals(NONE, seed=7)
    return replace(
        signals, output_cosines=2 * base.output_cosines.mean() - signals.output_cosines,
        gradient_norm_head=1 / signals.gradient_norm_head,
    )  # fmt: skip


def test_an_attack_that_works_with_its_sign_reversed_has_power():
    original = reversed_signs(make_signals(STRONG, seed=1))
    alike = forgetting(make_signals(NONE, seed=2))
    summary, _ = audited(alike, original=original)
    for attack in ("view_agreement", "gradient_norm_head"):
        found = summary["attacks"][attack]
        assert found["original"]["auc_high"] < 0.5
        assert found["power"]["beats_chance"] and found["gap"]["verdict"] == "pass", attack
    weak, _ = audited(alike, original=make_signals(NONE, seed=1))  # control
    assert not weak["attacks"]["view_agreement"]["power"]["beats_chance"]


def test_the_declared_confidence_moves_the_gap_and_nothing_else():
    """Intervals of more confidence hold those of less; the figures of a single encoder keep theirs."""
    unlearned, found = make_signals(0.3, seed=2), {}
    for confidence in (0.5, 0.9, 0.99):
        gates = replace(CFG.audit.gates, confidence=confidence)
        found[confidence], _ = audited(unlearned, cfg=replace(CFG, audit=replace(CFG.audit, gates=gates)))
    for attack in ATTACKS:
        narrow, usual, wide = (found[c]["attacks"][attack] for c in (0.5, 0.9, 0.99))
        assert wide["gap"]["low"] < usual["gap"]["low"] < narrow["gap"]["low"]
        assert narrow["gap"]["high"] < usual["gap"]["high"] < wide["gap"]["high"]
        assert narrow["gap"]["auc"] == usual["gap"]["auc"] == wide["gap"]["auc"]
        for encoder in ENCODERS:
            assert narrow[encoder] == usual[encoder] == wide[encoder]
    for name in ("knn", "linear_probe"):
        low = [found[c]["gates"][name]["low"] for c in (0.99, 0.9, 0.5)]
        assert low == sorted(low)


def test_a_gap_is_judged_only_with_enough_images_on_both_sides():
    sizes = {"retain": 120, "forget": 60, "third_party_audit": 50, "holdout": 12}
    made = [make_signals(shift, seed=seed, sizes=sizes) for shift, seed in ((STRONG, 1), (NONE, 2), (NONE, 3))]
    summary, _ = summarise(dict(zip(ENCODERS, made, strict=True)), CFG, cost=COST, coverage=COVERED)
    assert "12 images are too few" in summary["attacks"]["view_agreement"]["gap"]["reason"]
