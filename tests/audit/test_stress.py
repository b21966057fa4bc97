"""Stress tests: which images each request holds, and its figures against scikit-learn and cases with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from synthetic import make_signals

from distunlearn.audit.trainings.stress import COPIES, TESTS, largest_request, stress_names, thirds
from distunlearn.audit.trainings.stress_figures import accuracies, agreement, request_figures
from distunlearn.audit.trainings.sub_run import with_copies, with_roles
from distunlearn.config.checks import STRESS_TESTS
from distunlearn.config.load import load_config
from distunlearn.config.schema import RunConfig
from distunlearn.data.manifest.manifest import Manifest, Sample, Shard
from distunlearn.errors import ConfigError, DataError
from distunlearn.plan.plan import make_plan

CFG = RunConfig()


def encoders(unlearned: float) -> dict:
    """Signals of three encoders; `unlearned`: what the middle one still knows of the forget images."""
    known = {"original": 1.5, "unlearned": unlearned, "retrained": 0.0}
    return {name: make_signals(shift, seed=i) for i, (name, shift) in enumerate(known.items())}


def test_the_settings_know_every_test_by_name():
    assert tuple(TESTS) == STRESS_TESTS
    assert stress_names(["sequential", "worst_case"]) == ["worst_case", "sequential"] and stress_names(()) == []


@pytest.mark.parametrize("count", [6, 7, 8, 100])
def test_thirds_share_everything_once(count):
    groups = thirds([str(i) for i in range(count)])
    assert [i for group in groups for i in group] == [str(i) for i in range(count)]
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_the_largest_request_is_that_of_the_canaries():
    assert largest_request(["worst_case", "sequential"], 30) == 30
    assert largest_request(["canaries"], 30) == 10 * sum(COPIES)


def small_manifest() -> Manifest:
    samples = [Sample(f"i{n}", "members-000000.tar", 512 * n, 100, f"{n:064x}", "retain", n % 2) for n in range(4)]
    return Manifest("/nowhere", samples, {"members-000000.tar": Shard(4096, "0" * 64, 4)})


def test_copies_are_other_ids_of_the_same_bytes():
    found = with_copies(small_manifest(), {"i1": 3})
    assert [s.id for s in found.samples] == ["i0", "i1", "i1~2", "i1~3", "i2", "i3"]
    copies = [found.by_id[i] for i in ("i1", "i1~2", "i1~3")]
    assert len({(s.shard, s.offset, s.length, s.sha256, s.role, s.label) for s in copies}) == 1


def test_roles_change_for_the_named_alone():
    found = with_roles(small_manifest(), {"i2": "forget"})
    assert found.ids("forget") == ["i2"] and found.ids("retain") == ["i0", "i1", "i3"]


def test_figures_are_those_of_scikit_learn():
    signals = encoders(0.6)
    utility = accuracies(signals, CFG)
    found = request_figures(signals, utility, CFG)
    for encoder, s in signals.items():
        rows = np.concatenate([s.of("forget"), s.of("holdout")])
        truth = s.roles[rows] == "forget"
        expected = roc_auc_score(truth, s.output_cosines.mean(1)[rows])
        assert found["attacks"]["view_agreement"][encoder] == pytest.approx(expected, abs=1e-12)
        expected = roc_auc_score(truth, -s.bank_loss[rows])
        assert found["attacks"]["bank_loss"][encoder] == pytest.approx(expected, abs=1e-12)
    attacks = found["attacks"]
    gaps = [100 * abs(attacks[name]["gap"]) for name in CFG.audit.average]
    gaps += [100 * abs(utility[name]["unlearned"] - utility[name]["retrained"]) for name in ("knn", "linear_probe")]
    assert found["average_gap"] == pytest.approx(np.mean(gaps), abs=1e-9)
    assert found["images"] == {"forget": 60, "holdout": 140}


def test_what_is_left_is_found_and_what_is_not_is_not():
    left, gone = (request_figures(encoders(u), accuracies(encoders(u), CFG), CFG)["attacks"] for u in (1.5, 0.0))
    for name in ("view_agreement", "bank_loss", "gradient_norm_network"):
        assert left[name]["low"] > 0 and left[name]["power"]
        assert gone[name]["low"] < 0 < gone[name]["high"]
    nothing = {name: make_signals(0.0, seed=i) for i, name in enumerate(("original", "unlearned", "retrained"))}
    found = request_figures(nothing, accuracies(nothing, CFG), CFG)["attacks"]
    assert not any(figures["power"] for figures in found.values())


def test_a_part_of_the_images_is_judged_alone():
    s = encoders(0.6)["original"]
    forget = [s.ids[row] for row in s.of("forget")]
    chosen = set(forget[:10])
    rows = np.concatenate([s.of("forget")[:10], s.of("holdout")])
    expected = roc_auc_score(s.roles[rows] == "forget", s.output_cosines.mean(1)[rows])
    assert agreement(s, chosen) == pytest.approx(expected, abs=1e-12)
    assert agreement(s, chosen) != pytest.approx(agreement(s, set(forget)), abs=1e-3)


def test_without_images_of_a_side_there_is_no_figure():
    signals = {name: s.at(s.roles != "holdout") for name, s in encoders(0.0).items()}
    found = request_figures(signals, accuracies(signals, CFG), CFG)
    assert found["attacks"] == {} and math.isnan(found["average_gap"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["audit.stress=[worstcase]"], "names 'worstcase'.*did you mean worst_case"),
        (["audit.stress=[everything]"], "expected one of worst_case"),
        (["audit.tier=0", "audit.stress=[canaries]"], "set audit.tier=1"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config("digits", None, settings, world=1)


def test_refused_before_any_compute():
    few = load_config("digits", None, ["data.forget=5", "audit.stress=[sequential]"], world=1)
    with pytest.raises(DataError, match="shares 5 forget images"):
        make_plan(few)
    settings = ["data.forget=200", "unlearn.steps=6", "unlearn.forget_batch=40"]
    make_plan(load_config("digits", None, [*settings, "audit.stress=[sequential]"], world=1))
    with pytest.raises(DataError, match="468 forget images in its largest request.*cannot reach all 468"):
        make_plan(load_config("digits", None, [*settings, "audit.stress=[canaries]"], world=1))
