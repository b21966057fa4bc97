"""LiRA with the alignment statistic: do the views agree more than in encoders that never saw the image?

    a_i = atanh(mean cosine between the head's outputs for the image's views)
    score_i = [a_i(theta) - mean over references of a_i] / s

s: standard deviation of a over the holdout (one reference), or of a around its image's mean (several). Sources: offline
LiRA with a fixed variance, Carlini et al., "Membership Inference Attacks From First Principles", IEEE S&P 2022, section
VI; the difference of alignments between an encoder with and one without the image is SSLMem, Wang, Kaleem, Dziedzic,
Backes, Papernot and Boenisch, "Memorization in Self-Supervised Learning Improves Downstream Generalization", ICLR
2024 (arXiv 2401.12233); Fisher's atanh in place of its range normalisation is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distunlearn.audit.attacks.base import Attacked, threshold_attack
from distunlearn.audit.signals.collect import Signals


def lira_alignment(signals: Signals, reference: Signals, seed: int) -> Attacked:
    """agreement of views beyond that in the retrained encoder (SSLMem, offline LiRA with one reference)"""
    return threshold_attack(signals, alignment_likelihood(signals, [reference]), members_are_high=True)


def alignment(signals: Signals) -> np.ndarray:
    """atanh of the mean cosine between views, [n]."""
    return np.arctanh(np.clip(signals.output_cosines.mean(1), -1 + 1e-9, 1 - 1e-9))


def alignment_likelihood(signals: Signals, references: Sequence[Signals]) -> np.ndarray:
    """score_i of the module's formula, [n]; one reference or several."""
    known = np.stack([alignment(reference) for reference in references])
    if len(references) > 1:
        spread = np.sqrt(known.var(0, ddof=1).mean())
    else:
        spread = known[0][signals.of("holdout")].std() if len(signals.of("holdout")) else 1.0
    return (alignment(signals) - known.mean(0)) / max(float(spread), 1e-9)
