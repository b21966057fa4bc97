"""Gates without a retrained encoder: what reference groups do to an interval, and that nobody can choose them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from synthetic import make_signals

from distunlearn.audit.summary import summarise, write_audit
from distunlearn.config.schema import AuditConfig, GatesConfig, RunConfig
from distunlearn.config.shape import plain as plain_settings
from distunlearn.verify.commitment import phase_seed
from distunlearn.verify.figures import JUDGED, Raw, Rules, judge, plain
from distunlearn.verify.reference_groups import Placed, draw_groups, reference
from distunlearn.verify.scores import raw_scores, read_scores
from distunlearn.verify.statistics import Comparison

RULES = Rules(7, 400, 0.9, 0.1, 0.1, 5.0, ("view_agreement",), "third_party", 0)
CFG = RunConfig(audit=AuditConfig(tier=0, bootstrap=400, gates=GatesConfig(view_agreement=0.2, attack=0.2)))
SIZES = {"retain": 300, "forget": 200, "third_party_audit": 20, "holdout": 400}
COST = {"pretrain_images": 10, "unlearn_images": 2, "retrain_images": None}
COVERED = {"requested": 200, "consumed_min": 1, "consumed_max": 1, "used_as_retain": 0}


def images(kind: str, forget: int = 200, holdout: int = 400, seed: int = 0) -> tuple[Placed, np.ndarray, np.ndarray]:
    """Places and hardness of two sides, and scores that follow both; nothing but `kind` sets the sides apart."""
    generator = np.random.default_rng(seed)
    places = generator.normal(size=(forget + holdout, 2))
    hardness = generator.uniform(size=forget + holdout)
    if kind == "hard":
        hardness[:forget] = generator.uniform(0.6, 1, forget)
    if kind == "alike":
        places[:forget] = places[0] + 0.5 * generator.normal(size=(forget, 2))
    scores = -4 * hardness + np.sin(3 * places[:, 0]) + 0.3 * generator.normal(size=forget + holdout)
    return (
        Placed((hardness[:forget], hardness[forget:]), (places[:forget], places[forget:])),
        scores[:forget],
        scores[forget:],
    )


def judged(kind: str, trace: float = 0.0, *, unchanged: bool = False, rules: Rules = RULES, **sizes: int) -> dict:
    placed, forget, holdout = images(kind, **sizes)
    before, after = (Comparison.of(forget + shift, holdout) for shift in (2.0, trace))
    return judge(raw(placed, before, after), rules, unchanged=unchanged)


def raw(placed: Placed, before: Comparison, after: Comparison) -> Raw:
    held = len(placed.hardness[1])
    right = {e: {"knn": np.ones(held), "linear_probe": np.ones(held)} for e in ("original", "unlearned")}
    compared = {"view_agreement": {"original": before, "unlearned": after}}
    return Raw(compared, right, len(placed.hardness[0]), held, None, placed)


def test_a_fair_sample_passes_where_nothing_sets_it_apart_and_fails_where_something_does():
    found = judged("fair")
    assert found["gates"]["verdict"] == "pass" and found["evidence"]["kind"] == "reference_groups"
    assert judged("fair", 2.0)["gates"]["view_agreement"]["verdict"] == "fail"
    over = judged("fair", -2.0)["gates"]["view_agreement"]
    assert over["verdict"] == "fail" and "below held-out images like them" in over["reason"]


@pytest.mark.parametrize("kind", ["hard", "alike"])
def test_what_an_unseen_group_of_the_kind_shows_too_is_neither_cleared_nor_condemned(kind):
    found = judged(kind)["attacks"]["view_agreement"]
    plain_groups = judged("fair")["attacks"]["view_agreement"]["reference"]
    if kind == "hard":
        assert found["unlearned"]["auc_high"] < 0.4, "such images look less known, whoever trained on them"
        assert found["reference"]["mean"] == pytest.approx(found["unlearned"]["auc"] - 0.5, abs=0.05)
    else:
        assert found["reference"]["widening"] > 2 > 1.5 > plain_groups["widening"]
    assert found["gap"]["verdict"] == "inconclusive"


@pytest.mark.parametrize("kind", ["hard", "alike"])
def test_a_request_that_is_no_fair_sample_gets_an_indication_at_best(kind):
    wide = dataclasses.replace(RULES, view_agreement=0.49)
    gate = judged(kind, rules=wide)["gates"]["view_agreement"]
    assert gate["verdict"] == "inconclusive" and "an indication and no pass" in gate["reason"]


def test_images_more_alike_than_any_held_out_ones_get_no_verdict():
    placed, forget, holdout = images("fair")
    placed = dataclasses.replace(placed, places=(placed.places[0] * 0.001, placed.places[1]))
    found = draw_groups(placed, 7)
    assert found is not None and not found.alike
    before, after = (Comparison.of(forget + shift, holdout) for shift in (2.0, 0.0))
    gate = judge(raw(placed, before, after), RULES)["gates"]["view_agreement"]
    assert gate["verdict"] == "inconclusive" and "as alike" in gate["reason"]


def test_never_a_pass_for_a_small_request_an_encoder_left_as_it_was_or_one_without_power():
    wide = dataclasses.replace(RULES, view_agreement=0.45)
    assert judged("fair", rules=wide)["gates"]["verdict"] == "pass"
    assert judged("fair", rules=wide, unchanged=True)["gates"]["verdict"] == "inconclusive"
    for sizes in ({"forget": 19}, {"forget": 9}, {"holdout": 39}):
        assert judged("fair", rules=wide, **sizes)["gates"]["verdict"] == "inconclusive"
    assert judged("fair", rules=dataclasses.replace(wide, tier=1))["gates"]["verdict"] == "inconclusive"


def test_groups_follow_from_the_nonce_and_are_what_they_say():
    placed, _, holdout = images("hard")
    seeds = [phase_seed(7, nonce, "audit") for nonce in (None, "a" * 64, "b" * 64)]
    drawn = [draw_groups(placed, seed) for seed in seeds]
    assert len({found.told()["drawn_sha256"] for found in drawn}) == 3
    again = draw_groups(placed, seeds[1])
    assert np.array_equal(again.members, drawn[1].members)
    assert (drawn[0].members.sum(1) == 100).all()
    asked, got = drawn[0].hardness
    assert abs(asked - got) < 0.03 < asked - 0.5, "as hard as the request, and harder than the others"
    group = drawn[0].members[:1].repeat(2, 0)
    one = reference(Comparison.of(np.zeros(200), holdout), dataclasses.replace(drawn[0], members=group), 200)
    assert one.mean == pytest.approx((roc_auc_score(group[0], holdout) - 0.5) * (1 - 100 / 400))


def test_the_scatter_of_groups_of_whole_clusters_is_that_of_so_many_images_drawn_at_once():
    """Oracle: AUCs of fresh clusters of the request's size against fresh others."""
    generator = np.random.default_rng(3)

    def clusters(count: int) -> tuple[np.ndarray, np.ndarray]:
        centres = generator.normal(size=(count, 2)) * 3
        places = (centres[:, None] + 0.05 * generator.normal(size=(count, 20, 2))).reshape(-1, 2)
        return places, np.repeat(generator.normal(size=count), 20) + generator.normal(size=20 * count)

    places, scores = clusters(40)
    one, _ = clusters(1)
    groups = draw_groups(Placed((np.full(20, 0.5), np.full(800, 0.5)), (one, places)), 0)
    found = reference(Comparison.of(np.zeros(20), scores), groups, 20).widening
    aucs = [roc_auc_score(np.arange(820) < 20, np.concatenate([clusters(1)[1], clusters(40)[1]])) for _ in range(300)]
    alone = np.sqrt(821 / (12 * 20 * 800))
    assert found == pytest.approx(np.std(aucs) / alone, rel=0.35) and found > 2


def test_verify_draws_the_groups_again_from_the_raw_scores(tmp_path):
    signals = {"original": make_signals(1.2, 1, sizes=SIZES), "unlearned": make_signals(0.0, 2, sizes=SIZES)}
    summary, scores = summarise(signals, CFG, cost=COST, coverage=COVERED)
    write_audit(tmp_path, summary, scores)
    rules = Rules.of(plain_settings(CFG))
    again = plain(judge(raw_scores(read_scores(tmp_path)), rules))
    assert summary["evidence"]["kind"] == "reference_groups" and summary["evidence"]["seed"] == CFG.seed
    assert all(again[part] == summary[part] for part in again)
    assert {name for name, gate in again["gates"].items() if name in JUDGED and gate["auc"] is not None} == set(JUDGED)
    path = tmp_path / "scores-original.json"
    content = json.loads(path.read_text())
    row = next(row for row in content["samples"].values() if row["role"] == "forget")
    row["place_0"] += 30.0  # one image is put far off
    path.write_text(json.dumps(content))
    assert plain(judge(raw_scores(read_scores(tmp_path)), rules))["evidence"] != summary["evidence"]
