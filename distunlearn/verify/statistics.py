"""AUC, its bootstrap, and the few other figures of a membership attack; exact for ties, in float64.

An attack is scored on positives (forget) and negatives (holdout). AUC is the probability that a positive
scores above a negative, ties counted half (Mann and Whitney, Ann. Math. Stat. 18, 1947). The bootstrap (Efron and
Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 13 and 16) resamples *images*, not scores: one draw
of images is used for every attack and every encoder, so that differences between encoders are paired.

Shapes: n = positives, m = negatives, B = bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import stats

BOOTSTRAP = 0xA0D17  # stream of the draws, see `common/random.py`
DOSE_UTILITY = 0xD05F  # the same of the bounds of a dose's cost
MIN_FALSE_POSITIVES = 10  # a rate estimated from fewer negatives than this above the threshold says nothing
CHUNK_BYTES = 64 << 20  # of one block of bootstrap weights


@dataclass(frozen=True, eq=False)
class Part:
    """Scores of one attack fit: higher means "member".

    positives: [n], one score per forget image. negatives: [k], scores of the holdout images at the rows
    `rows` (int64 [k], ascending) of all m.
    """

    positives: np.ndarray
    negatives: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True, eq=False)
class Comparison:
    """What an attack says of forget against holdout; several parts where it is fitted crosswise.

    The AUC is the mean over the parts: scores of different fits need not share a scale.
    """

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, positives: np.ndarray, negatives: np.ndarray) -> Comparison:
        """One part over all holdout images."""
        return cls((Part(_wide(positives), _wide(negatives), np.arange(len(negatives))),))

    def reversed(self) -> Comparison:
        """The same scores with their signs turned: the attacker who accuses whoever scores low."""
        return Comparison(tuple(Part(-part.positives, -part.negatives, part.rows) for part in self.parts))


@dataclass(frozen=True, eq=False)
class Draws:
    """How often each image occurs in each bootstrap draw: uint16 [B, n] of forget, [B, m] of holdout."""

    positives: np.ndarray
    negatives: np.ndarray

    def __len__(self) -> int:
        return self.positives.shape[0]


def draw_images(n: int, m: int, draws: int, seed: int) -> Draws:
    """B draws with replacement of n forget and of m holdout images, a pure function of the arguments.

    n, m >= 1. The rows sum to n and to m.
    """
    generator = np.random.default_rng([seed, BOOTSTRAP])
    sides = [generator.multinomial(size, np.full(size, 1 / size), size=draws).astype(np.uint16) for size in (n, m)]
    return Draws(*sides)


def draw_persons(positives: np.ndarray, negatives: np.ndarray, draws: int, seed: int) -> Draws:
    """The same for whole persons (a cluster bootstrap): an image occurs as often as the person on it is drawn.

    positives, negatives: int64 [n], [m], who is on each image.
    """
    units = [np.unique(side, return_inverse=True)[1] for side in (positives, negatives)]
    drawn = draw_images(int(units[0].max()) + 1, int(units[1].max()) + 1, draws, seed)
    return Draws(drawn.positives[:, units[0]], drawn.negatives[:, units[1]])


def auc(comparison: Comparison) -> float:
    """AUC in [0, 1]; mean over the parts. NaN where a side is empty."""
    return float(np.mean([_auc(part.positives, part.negatives) for part in comparison.parts]))


def _auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    n, m = len(positives), len(negatives)
    if n == 0 or m == 0:
        return float("nan")
    ranks = stats.rankdata(np.concatenate([positives, negatives]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def auc_bootstrap(comparison: Comparison, draws: Draws) -> np.ndarray:
    """AUC of every draw, float64 [B]: the mean over the parts, each weighted by how often its images were drawn."""
    values = np.zeros(len(draws))
    for part in comparison.parts:
        values += _weighted_auc(part, draws)
    return values / len(comparison.parts)


def _weighted_auc(part: Part, draws: Draws) -> np.ndarray:
    """sum over pairs of w_f w_h ([s_f > s_h] + [s_f = s_h] / 2) / (sum w_f sum w_h), for all draws.

    One sort serves all draws: along the sorted distinct scores a positive beats the running sum of negatives.
    """
    scores = np.concatenate([part.positives, part.negatives])
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(scores[order]) > 0]))
    n = len(part.positives)
    result = np.empty(len(draws))
    for rows in _chunks(len(draws), len(scores)):
        weights = np.zeros((rows.stop - rows.start, len(scores)))
        weights[:, :n] = draws.positives[rows]
        first = np.add.reduceat(weights[:, order], starts, axis=1)
        weights[:, :n] = 0
        weights[:, n:] = draws.negatives[rows][:, part.rows]
        second = np.add.reduceat(weights[:, order], starts, axis=1)
        below = np.cumsum(second, axis=1) - second / 2
        total = first.sum(1) * second.sum(1)
        with np.errstate(invalid="ignore"):  # a draw without any image of a side (tiny sets) has no AUC
            result[rows] = (first * below).sum(1) / total
    return result


def _chunks(total: int, width: int) -> Iterator[slice]:
    size = max(1, CHUNK_BYTES // (8 * max(1, width)))
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def percentile_interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """Central interval that holds the share `confidence` of the bootstrap values (NaN draws left out)."""
    tail = 100 * (1 - confidence) / 2
    kept = values[np.isfinite(values)]
    if not kept.size:
        return float("nan"), float("nan")
    low, high = np.percentile(kept, [tail, 100 - tail])
    return float(low), float(high)


def tpr_at_fpr(comparison: Comparison, rate: float) -> float | None:
    """Largest true-positive rate of a threshold with at most `rate` false positives; mean over the parts.

    None where `rate` stands for fewer than 10 holdout images: the figure would be noise.
    """
    found = []
    for part in comparison.parts:
        m = len(part.negatives)
        if m * rate < MIN_FALSE_POSITIVES or not len(part.positives):
            return None
        allowed = int(np.floor(rate * m + 1e-9))
        threshold = np.sort(part.negatives)[::-1][allowed]  # only scores above it accuse: at most `allowed` strangers
        found.append(float((part.positives > threshold).mean()))
    return float(np.mean(found))


def ks_p_value(comparison: Comparison) -> float | None:
    """Two-sided Kolmogorov-Smirnov p-value of "both sides have one distribution".

    Over k parts, which share their positives: Bonferroni's min(1, k min p). None for an empty side.
    """
    found = []
    for part in comparison.parts:
        if not len(part.positives) or not len(part.negatives):
            return None
        found.append(float(stats.ks_2samp(part.positives, part.negatives).pvalue))
    return min(1.0, len(found) * min(found))


def _wide(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)
