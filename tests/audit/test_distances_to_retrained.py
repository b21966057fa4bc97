"""CKA, ToW, IAM, average gap and relearning against other formulas and cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from synthetic import make_signals

from distunlearn.audit.figures.retrain_distance import average_gap, iam, iam_scores, tow
from distunlearn.audit.figures.similarity import linear_cka, similarities
from distunlearn.audit.relearn import Relearned, _rows, relearning_figures
from distunlearn.config.schema import RunConfig
from distunlearn.verify.statistics import Comparison

STRONG, NONE = 1.2, 0.0


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def test_cka_is_the_normalised_hsic_of_linear_kernels():
    x, y = drawn(20, 5), drawn(20, 7, seed=1)
    centre = np.eye(20) - 1 / 20
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    expected = np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-12)


def test_cka_does_not_see_rotation_scale_and_shift():
    x = drawn(30, 6)
    rotation, _ = np.linalg.qr(drawn(6, 6, seed=2))
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, drawn(30, 6, seed=3)) < 0.5
    assert np.isnan(linear_cka(x, np.ones((30, 6)))) and np.isnan(linear_cka(x[:1], x[:1]))


def test_similarities_name_both_ends():
    found = similarities({n: make_signals(NONE, seed=i) for i, n in enumerate(("original", "unlearned", "retrained"))})
    assert set(found) == {"forget", "holdout"}
    assert set(found["forget"]["to_original"]) == {"unlearned", "retrained"}
    assert set(similarities({"original": make_signals(NONE), "unlearned": make_signals(NONE)})["forget"]) == {
        "to_original"
    }


def test_tow_by_hand():
    signals = {"unlearned": make_signals(NONE, seed=2, skill=1.0), "retrained": make_signals(NONE, seed=3, skill=1.0)}
    accuracy, roles = {}, ("retain", "forget", "holdout")
    for name, s in signals.items():
        train = s.of("retain")
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        probe.fit(s.embedding[train], s.labels[train])
        accuracy[name] = {r: probe.score(s.embedding[s.of(r)], s.labels[s.of(r)]) for r in roles}
    kept = {r: 1 - abs(accuracy["unlearned"][r] - accuracy["retrained"][r]) for r in roles}
    found = tow(signals, {"unlearned": 0.7, "retrained": 0.5})
    assert found["tow"] == pytest.approx(kept["retain"] * kept["forget"] * kept["holdout"])
    assert found["tow_mia"] == pytest.approx(0.8 * kept["retain"] * kept["holdout"])
    assert (
        tow({"unlearned": signals["retrained"], "retrained": signals["retrained"]}, dict.fromkeys(signals, 0.5))["tow"]
        == 1.0
    )


def test_iam_is_the_weighted_sum_of_the_formula():
    original, retrained, unlearned = drawn(9) + 2, drawn(9, seed=1), drawn(9, seed=2) + 1
    expected = []
    for i in range(9):
        top = bottom = 0.0
        for step in range(1, 101):
            a = step / 100
            spread = np.std([retrained[j] + a * (original[j] - retrained[j]) for j in range(9)])
            middle = retrained[i] + a * (original[i] - retrained[i])
            top += a * 0.5 * (1 + np.tanh(np.arctanh(2 * stats.norm.cdf((unlearned[i] - middle) / spread) - 1)))
            bottom += a
        expected.append(1 - top / bottom)
    np.testing.assert_allclose(iam_scores(original, retrained, unlearned), expected, rtol=1e-9)


def test_iam_orders_unchanged_half_way_and_retrained():
    known, unknown = make_signals(STRONG, seed=1), make_signals(NONE, seed=3)
    half = make_signals(STRONG / 2, seed=5)
    found = iam({"original": known, "unlearned": half, "retrained": unknown})
    assert found["unchanged"] < 0.5 < found["as_retrained"]
    assert found["unchanged"] < found["unlearned"] < found["as_retrained"]


def test_average_gap_by_hand():
    one = Comparison.of(np.array([2.0, 3.0]), np.array([1.0, 0.0]))  # AUC 1
    two = Comparison.of(np.array([0.5, 3.0]), np.array([1.0, 0.0]))  # AUC 0.75
    utility = {"knn": {"unlearned": 0.9, "retrained": 0.8}, "linear_probe": {"unlearned": 0.5, "retrained": 0.5}}
    found = average_gap({"a": {"unlearned": one, "retrained": two}}, utility, ["a"])
    assert found["gaps"] == pytest.approx({"a": 25, "knn": 10, "linear_probe": 0})
    assert found["value"] == pytest.approx(35 / 3)


def test_relearning_finds_the_step_at_which_the_level_is_reached():
    steps = (0, 1, 2, 4)
    flat = np.full((4, 30), 0.5) + 0.01 * drawn(4, 30)
    rising = np.array([0.3, 0.6, 0.85, 0.95])[:, None] + 0.01 * drawn(4, 30, seed=1)
    found = relearning_figures(
        {
            "original": Relearned((0,), np.full((1, 30), 0.8), np.full((1, 30), 0.5)),
            "unlearned": Relearned(steps, rising, flat),
            "retrained": Relearned(steps, flat + 0.001, flat),
        },
        RunConfig(),
    )
    assert found["unlearned"]["steps_to_relearn"] == 2 and found["retrained"]["steps_to_relearn"] is None
    assert found["unlearned"]["auc_at_step"][0] == 0.0 and found["unlearned"]["auc_at_step"][-1] == 1.0
    assert found["unlearned"]["auc"] == 1.0 and found["gap"]["low"] > 0.2


def test_relearning_shows_every_candidate_equally_often():
    counts = np.zeros(2 * 70, dtype=int)
    for step in range(3 * 3):  # 70 candidates of each kind in batches of 32: three steps a round
        rows = _rows(step, 70, seed=1)
        assert (np.sort(rows[:32]) < 70).all() and np.array_equal(rows[32:], rows[:32] + 70)
        counts[rows] += 1
    assert counts.min() >= 3 and counts.max() <= 6
