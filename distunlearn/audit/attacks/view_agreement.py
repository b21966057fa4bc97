"""View agreement: the views of a known image lie closer together.

    score_i = mean over pairs a < b of cos(z(view_a), z(view_b))

with z the head's output, where the training objective itself pulled views together, and so the strongest place to
look; `encodermi_vector` looks at the backbone's embeddings, which is what an exported encoder gives away.

Source: the threshold form, EncoderMI-T, of Liu, Jia, Qu and Gong, "EncoderMI: Membership Inference against
Pre-trained Encoders in Contrastive Learning", CCS 2021 (arXiv 2108.11023). An AUC stands for every threshold, so no
shadow encoder is needed to choose one.
"""

from __future__ import annotations

from distunlearn.audit.attacks.base import Attacked, threshold_attack
from distunlearn.audit.signals.collect import Signals


def view_agreement(signals: Signals, seed: int) -> Attacked:
    """mean cosine between the head's outputs for an image's views (threshold form of EncoderMI)"""
    return threshold_attack(signals, signals.output_cosines.mean(1), members_are_high=True)
