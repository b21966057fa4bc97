"""Gradient norm: an image that was fitted asks for little change.

    score_i = -| d l_i / d theta |

with l_i the bank loss averaged over pairs of views, theta all weights of the network (white box) or the last linear
layer of the head. Source: gradient-norm signals of white-box attacks, Nasr, Shokri and Houmansadr,
"Comprehensive Privacy Analysis of Deep Learning", IEEE S&P 2019, section III.
"""

from __future__ import annotations

from distunlearn.audit.attacks.base import Attacked, threshold_attack
from distunlearn.audit.signals.collect import Signals


def gradient_norm_network(signals: Signals, seed: int) -> Attacked:
    """norm of the loss gradient over all weights of the network"""
    return threshold_attack(signals, signals.gradient_norm_network, members_are_high=False)


def gradient_norm_head(signals: Signals, seed: int) -> Attacked:
    """norm of the loss gradient of the head's last layer"""
    return threshold_attack(signals, signals.gradient_norm_head, members_are_high=False)
