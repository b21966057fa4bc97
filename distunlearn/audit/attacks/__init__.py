"""Membership attacks, one file each: signals of one encoder in, scores of forget against holdout out.

An attack never sees which encoder it attacks, and none of them uses third-party or calibration images.
"""

from __future__ import annotations

from collections.abc import Callable

from distunlearn.audit.attacks.bank_loss import bank_loss
from distunlearn.audit.attacks.base import Attacked
from distunlearn.audit.attacks.encodermi import encodermi_vector
from distunlearn.audit.attacks.gradient_norm import gradient_norm_head, gradient_norm_network
from distunlearn.audit.attacks.view_agreement import view_agreement
from distunlearn.audit.signals import Signals

__all__ = ["ATTACKS", "Attacked"]

ATTACKS: dict[str, Callable[[Signals, int], Attacked]] = {
    "view_agreement": view_agreement,
    "encodermi_vector": encodermi_vector,
    "bank_loss": bank_loss,
    "gradient_norm_network": gradient_norm_network,
    "gradient_norm_head": gradient_norm_head,
}
