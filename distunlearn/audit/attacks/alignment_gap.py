"""Alignment gap: whose views agree less than before the forgetting?

    score_i = a_i(original) - a_i(attacked),     a_i: mean cosine between the head's outputs for the image's views

Whoever holds the encoder before and after asks which images were removed. It is the per-image form of the forgetting
score and the diagonal of the alignment gap matrix of Wang et al., "Alignment Calibration: Machine Unlearning for
Contrastive Learning under Auditing" (TMLR 2025, arXiv 2406.03603), whose definitions were at hand in outline only; two
versions against one, Chen et al., "When Machine Unlearning Jeopardizes Privacy", CCS 2021. A retrained encoder shows
it too, so the gap to it is what counts; for the original itself every score is 0 and the AUC 0.5.
"""

from __future__ import annotations

from distunlearn.audit.attacks.base import Attacked, threshold_attack
from distunlearn.audit.signals.collect import Signals


def alignment_gap(signals: Signals, reference: Signals, seed: int) -> Attacked:
    """how much less an image's views agree than in the original encoder"""
    values = reference.output_cosines.mean(1) - signals.output_cosines.mean(1)
    return threshold_attack(signals, values, members_are_high=True)
