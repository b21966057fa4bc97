"""Bank loss: a known image has a small loss.

The per-sample loss of the encoder's own objective against a bank of retain keys (`objectives/bank.py`; cross-
entropy for supervised encoders), averaged over pairs of views. Source: the loss-threshold attack of Yeom,
Giacomelli, Fredrikson and Jha, "Privacy Risk in Machine Learning", CSF 2018, with the loss made a property of one
image by a bank that is the same for all.
"""

from __future__ import annotations

from distunlearn.audit.attacks.base import Attacked, threshold_attack
from distunlearn.audit.signals.collect import Signals


def bank_loss(signals: Signals, seed: int) -> Attacked:
    """training loss of the image against a bank of retain keys, sign turned"""
    return threshold_attack(signals, -signals.bank_loss, members_are_high=True)
