"""AUC and bootstrap against scikit-learn, scipy and brute force."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from distunlearn.verify import statistics
from distunlearn.verify.statistics import (
    Comparison,
    Part,
    auc,
    auc_bootstrap,
    draw_images,
    ks_p_value,
    percentile_interval,
    tpr_at_fpr,
)


def scores(n: int, m: int, shift: float = 0.5, digits: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return np.round(generator.normal(shift, 1, n), digits), np.round(generator.normal(0, 1, m), digits)


def sklearn_auc(positives, negatives, weights=None) -> float:
    truth = np.concatenate([np.ones(len(positives)), np.zeros(len(negatives))])
    return roc_auc_score(truth, np.concatenate([positives, negatives]), sample_weight=weights)


@pytest.mark.parametrize("digits", [8, 1, 0])  # without ties, with some, with nothing but ties
def test_auc_is_that_of_sklearn(digits):
    positives, negatives = scores(37, 53, digits=digits)
    assert auc(Comparison.of(positives, negatives)) == pytest.approx(sklearn_auc(positives, negatives), abs=1e-12)


def test_auc_of_parts_is_their_mean():
    positives, negatives = scores(20, 30)
    half = np.arange(30) % 2 == 0
    parts = Comparison(
        (
            Part(positives, negatives[half], np.flatnonzero(half)),
            Part(5 * positives + 3, 5 * negatives[~half] + 3, np.flatnonzero(~half)),  # another scale changes nothing
        )
    )
    expected = (sklearn_auc(positives, negatives[half]) + sklearn_auc(positives, negatives[~half])) / 2
    assert auc(parts) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("digits", [8, 1])
def test_every_bootstrap_draw_is_the_weighted_auc_of_sklearn(digits, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK_BYTES", 8 * 50 * 7)  # several blocks of draws
    positives, negatives = scores(20, 30, digits=digits)
    draws = draw_images(20, 30, 40, seed=3)
    assert (draws.positives.sum(1) == 20).all() and (draws.negatives.sum(1) == 30).all()
    rows = np.flatnonzero(np.arange(30) % 3 > 0)
    comparison = Comparison((Part(positives, negatives[rows], rows),))
    for found, first, second in zip(auc_bootstrap(comparison, draws), draws.positives, draws.negatives, strict=True):
        weights = np.concatenate([first, second[rows]])
        assert found == pytest.approx(sklearn_auc(positives, negatives[rows], weights), abs=1e-12)


def test_bootstrap_spread_is_the_known_standard_error():
    """Under the null the variance of an AUC is (n + m + 1) / 12nm (Mann and Whitney)."""
    positives, negatives = scores(200, 300, shift=0.0, seed=5)
    sampled = auc_bootstrap(Comparison.of(positives, negatives), draw_images(200, 300, 4000, seed=1))
    assert sampled.std() == pytest.approx(((200 + 300 + 1) / (12 * 200 * 300)) ** 0.5, rel=0.1)


def test_interval_covers_the_truth_as_often_as_it_says():
    truth = stats.norm.cdf(0.5 / 2**0.5)
    covered = 0
    for seed in range(200):
        positives, negatives = scores(60, 80, seed=seed)
        sampled = auc_bootstrap(Comparison.of(positives, negatives), draw_images(60, 80, 400, seed))
        low, high = percentile_interval(sampled, 0.9)
        covered += low <= truth <= high
    assert 0.84 <= covered / 200 <= 0.96  # 0.9 with the sampling error of 200 trials


def test_draws_are_reproducible_and_depend_on_the_seed():
    one, same, other = (draw_images(9, 11, 20, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.positives, same.positives) and np.array_equal(one.negatives, same.negatives)
    assert not np.array_equal(one.positives, other.positives)


def test_tpr_at_low_fpr_is_read_off_the_roc_curve():
    positives, negatives = scores(300, 1000, shift=1.0)
    false, true, _ = roc_curve(
        np.r_[np.ones(300), np.zeros(1000)], np.r_[positives, negatives], drop_intermediate=False
    )
    assert tpr_at_fpr(Comparison.of(positives, negatives), 0.01) == pytest.approx(true[false <= 0.01].max(), abs=1e-12)


def test_tpr_is_not_evaluated_with_too_few_strangers():
    positives, negatives = scores(300, 999)
    assert tpr_at_fpr(Comparison.of(positives, negatives), 0.01) is None
    assert tpr_at_fpr(Comparison.of(positives, negatives[:0]), 0.5) is None


def test_tpr_with_ties_accuses_no_more_strangers_than_allowed():
    negatives = np.r_[np.zeros(980), np.ones(20)]
    assert tpr_at_fpr(Comparison.of(np.ones(10), negatives), 0.01) == 0.0  # the tie of 20 strangers is not split


def test_ks_is_scipys_and_bonferroni_over_parts():
    positives, negatives = scores(50, 70)
    single = stats.ks_2samp(positives, negatives).pvalue
    assert ks_p_value(Comparison.of(positives, negatives)) == pytest.approx(single)
    part = Part(positives, negatives, np.arange(70))
    assert ks_p_value(Comparison((part, part))) == pytest.approx(min(1, 2 * single))
    assert ks_p_value(Comparison.of(positives[:0], negatives)) is None


def test_a_single_positive_is_handled():
    positives, negatives = scores(1, 50)
    comparison = Comparison.of(positives, negatives)
    assert 0 <= auc(comparison) <= 1
    assert np.isfinite(auc_bootstrap(comparison, draw_images(1, 50, 100, 0))).all()
