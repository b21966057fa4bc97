"""Embedding norm: known images have embeddings of another length.

    score_i = ln N(r_i; mu_in, s_in) - ln N(r_i; mu_out, s_out),     r_i = ln |h(x_i)|_2

one query, no views and no labels. Source: LpLA, the likelihood of an embedding's Lp norm (AsiaCCS 2025, arXiv
2506.05743), of which the idea was at hand and no code; the Gaussian of the log norm with p = 2 is our own choice.
in: the retained images, out: half of the holdout, crosswise.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from distunlearn.audit.attacks.base import Attacked, crosswise_attack
from distunlearn.audit.signals.collect import Signals

TINY = 1e-12


def embedding_norm(signals: Signals, seed: int) -> Attacked:
    """likelihood ratio of the length of the image's embedding, fitted on retain and half of the holdout, crosswise"""
    lengths = np.log(np.linalg.norm(signals.embedding.astype(np.float64), axis=1) + TINY)

    def score(members: np.ndarray, strangers: np.ndarray) -> np.ndarray:
        if len(members) < 2 or len(strangers) < 2:
            return np.zeros(len(lengths))
        known, unknown = (
            stats.norm.logpdf(lengths, lengths[rows].mean(), max(lengths[rows].std(), 1e-9))
            for rows in (members, strangers)
        )
        return known - unknown

    return crosswise_attack(signals, score, seed)
