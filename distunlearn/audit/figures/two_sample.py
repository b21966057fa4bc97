"""Can two sets of images be told apart by how the encoder treats them? A classifier two-sample test.

Source: Lopez-Paz and Oquab, "Revisiting Classifier Two-Sample Tests", ICLR 2017, with the AUC of out-of-fold scores
as statistic. Features: outputs (view agreement, bank closeness, confidence, loss) and gradients (log norms, sketch
of the head gradient, by sign and by size). The classifier is ridge regression on the labels: the folds do not
depend on the labels and all permutations are fitted in one call, so that the permutation p-value is exact.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold
from sklearn.preprocessing import StandardScaler

from distunlearn.audit.signals.collect import Signals
from distunlearn.common.random import STREAMS
from distunlearn.verify.statistics import Comparison, auc, auc_bootstrap, draw_images, percentile_interval

FOLDS = 5
PERMUTATIONS = 499
TINY = 1e-12


def describe(signals: Signals) -> np.ndarray:
    """Outputs and gradients of every image as features, [n, 7 + 128]."""
    scale = np.abs(signals.gradient_sketch).mean(0, keepdims=True) + TINY
    sketch = signals.gradient_sketch / scale
    columns = [
        signals.embedding_cosines.mean(1),
        signals.output_cosines.mean(1),
        signals.output[:, 0],
        signals.output[:, 1],
        np.log(signals.confidence + TINY),
        np.log(signals.gradient_norm_head + TINY),
        np.log(np.nan_to_num(signals.gradient_norm_network) + TINY),  # NaN for retain only, which is never compared
    ]
    return np.concatenate([np.stack(columns, axis=1), np.arcsinh(sketch), np.arcsinh(np.abs(sketch))], axis=1)


def two_sample(
    first: np.ndarray, second: np.ndarray, seed: int, draws: int, confidence: float = 0.95
) -> dict[str, float | None]:
    """Tell `first` [n, k] from `second` [m, k]: {"auc", "auc_low", "auc_high", "p"}.

    An AUC above 0.5 means that the classifier tells them apart; below 0.5 it is at a loss (out-of-fold scores
    lean that way when there is nothing to find). The p-value is one-sided: (1 + permutations with at least
    this AUC) / (1 + permutations) (Phipson and Smyth 2010). All None with fewer than 2 FOLDS images in all
    or an empty side.
    """
    n, m = len(first), len(second)
    if min(n, m) < 2 or n + m < 2 * FOLDS:
        return dict.fromkeys(("auc", "auc_low", "auc_high", "p"))
    features = StandardScaler().fit_transform(np.concatenate([first, second]))
    labels = np.concatenate([np.ones(n), -np.ones(m)])
    generator = np.random.default_rng([seed, STREAMS["two-sample"]])
    permuted = generator.permuted(np.tile(labels, (PERMUTATIONS, 1)), axis=1)
    targets = np.concatenate([labels[None], permuted]).T  # column 0: the labels as they are
    scores = _out_of_fold(features, targets, seed)
    observed = Comparison.of(scores[:n, 0], scores[n:, 0])
    statistic = auc(observed)
    null = _areas(scores[:, 1:], targets[:, 1:] > 0)
    sampled = auc_bootstrap(observed, draw_images(n, m, draws, seed))
    low, high = percentile_interval(sampled, confidence)
    p = (1 + int((null >= statistic - TINY).sum())) / (1 + PERMUTATIONS)
    return {"auc": statistic, "auc_low": low, "auc_high": high, "p": p}


def _out_of_fold(features: np.ndarray, targets: np.ndarray, seed: int) -> np.ndarray:
    """Ridge scores of every row by a fit that left its fold out, for all label columns, [n, columns]."""
    scores = np.zeros_like(targets)
    folds = KFold(FOLDS, shuffle=True, random_state=seed % 2**32)
    for kept, left in folds.split(features):
        model = Ridge(alpha=features.shape[1])  # as strong as a unit prior on every standardised feature's share
        scores[left] = model.fit(features[kept], targets[kept]).predict(features[left])
    return scores


def _areas(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """The AUC of every column, [columns]; ties count half."""
    n = positive.sum(0)
    above = (rankdata(scores, axis=0) * positive).sum(0) - n * (n + 1) / 2
    return above / (n * (len(scores) - n))
