"""PartCrop: a known image answers sharply when the encoder is asked where one of its parts lies.

    s_k = softmax over the L places of p_k . h_l,      p_k: embedding of a small crop, h_l: last feature map at place l
    features = sorted_k KL(uniform | s_k), sorted_k KL(gaussian | s_k)                                  [2 N]

Places are the patch tokens of a ViT or the positions of a ResNet's last feature map. Source: PartCrop (CCS 2024, arXiv
2404.02462), which trains an MLP on half of the members; here a logistic regression on the retained images against half
of the holdout, crosswise. Off unless `audit.part_crops` says how many crops (the paper: 128), for every crop is a pass.
"""

from __future__ import annotations

from distunlearn.audit.attacks.base import Attacked, crosswise_attack, fitted_log_odds
from distunlearn.audit.signals.collect import Signals


def part_crop(signals: Signals, seed: int) -> Attacked:
    """classifier on how sharply small crops of an image find their place in it, fitted crosswise"""
    return crosswise_attack(signals, fitted_log_odds(signals.part_responses, 0.01), seed)
