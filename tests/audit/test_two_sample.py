"""The two-sample classifier: exact under the null, powerful under an alternative, and what it must not see."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from distunlearn.audit.figures.two_sample import _areas, two_sample


def drawn(n: int, k: int, shift: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, k)) + shift


def test_p_values_are_uniform_when_there_is_nothing_to_find():
    values = [two_sample(drawn(30, 4, 0, 2 * s), drawn(40, 4, 0, 2 * s + 1), s, 100)["p"] for s in range(60)]
    assert stats.kstest(values, "uniform").pvalue > 0.01


def test_a_shift_is_found():
    found = two_sample(drawn(60, 4, 0.6, 1), drawn(80, 4, 0.0, 2), 0, 400)
    assert found["p"] <= 0.01 and found["auc_low"] > 0.5 and found["auc_low"] < found["auc"] < found["auc_high"]


def test_fitted_rows_would_be_told_apart_even_under_the_null():
    """Negative control: with more features than images, scores of fitted rows separate anything; ours must not."""
    found = two_sample(drawn(30, 100, 0, 1), drawn(30, 100, 0, 2), 0, 100)
    assert found["auc"] < 0.7


@pytest.mark.parametrize(("n", "m"), [(0, 30), (1, 30), (3, 3)])
def test_too_few_images_are_not_evaluated(n, m):
    found = two_sample(drawn(n, 2, 0, 1), drawn(m, 2, 0, 2), 0, 100)
    assert found == {"auc": None, "auc_low": None, "auc_high": None, "p": None}


def test_areas_of_columns_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    scores = np.round(generator.normal(size=(30, 5)), 1)  # with ties
    positive = np.stack([generator.permutation(np.arange(30) < 12) for _ in range(5)], axis=1)
    expected = [roc_auc_score(positive[:, k], scores[:, k]) for k in range(5)]
    np.testing.assert_allclose(_areas(scores, positive), expected, rtol=1e-12)
