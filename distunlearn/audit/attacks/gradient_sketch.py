"""Gradient sketch: a classifier on what the whole network would change for an image (white box).

Features: the log length of the loss gradient of every layer, and a random projection of the whole gradient, by sign and
by size (`audit/network_sketch.py`). Fitted on the retained images against half of the holdout, crosswise.
Sources: layer-wise gradients as features of a white-box attack, Nasr, Shokri and Houmansadr, IEEE S&P 2019, sec. III;
that gradients beat outputs on contrastive encoders, "Rethinking Membership Inference Attacks for CLIP", AAAI 2026.
The sketch in place of the gradient is ours (Choe et al., LoGra, arXiv 2405.13954).
"""

from __future__ import annotations

import numpy as np

from distunlearn.audit.attacks.base import Attacked, crosswise_attack, fitted_log_odds
from distunlearn.audit.signals.collect import Signals

STRENGTH = 0.01  # many features, few images


def gradient_sketch(signals: Signals, seed: int) -> Attacked:
    """classifier on the length of every layer's gradient and a sketch of the whole gradient, fitted crosswise"""
    scale = np.abs(signals.network_sketch).mean(0, keepdims=True) + 1e-12
    sketch = np.arcsinh(signals.network_sketch / scale)
    features = np.concatenate([signals.layer_norms, sketch, np.abs(sketch)], axis=1)
    return crosswise_attack(signals, fitted_log_odds(features, STRENGTH), seed)
