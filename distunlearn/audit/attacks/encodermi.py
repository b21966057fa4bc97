"""EncoderMI: how alike are the embeddings of an image's views? Its three forms.

    M(x) = { cos(h(view_a), h(view_b)) : a < b }          h: the backbone's embedding, which an exported encoder gives

* vector form (V): a classifier on the sorted similarities;
* set form (S): a classifier that does not depend on their order, rho(mean over s in M of phi(s)) (Zaheer et al.,
  "Deep Sets", NeurIPS 2017). phi is a fixed layer of radial bumps at quantiles of all similarities and only rho is
  fitted, by logistic regression, so that the same signals give the same score to the last digit;
* threshold form (T): the mean of M. An AUC stands for every threshold.

Source: Liu, Jia, Qu and Gong, "EncoderMI: Membership Inference against Pre-trained Encoders in Contrastive Learning",
CCS 2021 (arXiv 2108.11023), section 4.2. Where the paper trains shadow encoders, this attacker knows more: the retained
images themselves are his members, and one half of the holdout his non-members (see `base.crosswise_attack`).
"""

from __future__ import annotations

import numpy as np

from distunlearn.audit.attacks.base import Attacked, crosswise_attack, fitted_log_odds, threshold_attack
from distunlearn.audit.signals.collect import Signals

BUMPS = 16
STRENGTH = 1e-3  # sorted similarities are many copies of few values: 0.1 fits the noise of a few hundred images


def encodermi_vector(signals: Signals, seed: int) -> Attacked:
    """classifier on sorted cosines between embeddings of views, fitted on retain and half of the holdout, crosswise"""
    features = np.sort(signals.embedding_cosines, axis=1)
    return crosswise_attack(signals, fitted_log_odds(features, STRENGTH), seed)


def encodermi_set(signals: Signals, seed: int) -> Attacked:
    """classifier on the set of cosines between embeddings of views, whatever their order, fitted crosswise"""
    return crosswise_attack(signals, fitted_log_odds(pooled_bumps(signals.embedding_cosines)), seed)


def encodermi_threshold(signals: Signals, seed: int) -> Attacked:
    """mean cosine between the backbone's embeddings for an image's views"""
    return threshold_attack(signals, signals.embedding_cosines.mean(1), members_are_high=True)


def pooled_bumps(cosines: np.ndarray) -> np.ndarray:
    """mean over an image's similarities of exp(-((s - c_k) / w)^2 / 2), [n, P] -> [n, BUMPS].

    c_k: quantiles of all similarities (of members and strangers alike); w: their mean distance, at least 1e-6.
    """
    centres = np.quantile(cosines, (np.arange(BUMPS) + 0.5) / BUMPS)
    width = max(float(centres[-1] - centres[0]) / (BUMPS - 1), 1e-6)
    pooled = [np.exp(-0.5 * ((cosines - centre) / width) ** 2).mean(1) for centre in centres]
    return np.stack(pooled, axis=1)
