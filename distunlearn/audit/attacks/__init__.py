"""Membership attacks, one file each: signals of one encoder in, scores of forget against holdout out.

An attack never sees which encoder it attacks, and none of them uses third-party or calibration images.

ATTACKS are judged by the gates. FURTHER and PAIRED ones are reported beside them and are judged only where
`audit.gates.also` names them. A paired attack also looks at a second encoder, the one that PAIRED names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from distunlearn.audit.attacks.alignment_gap import alignment_gap
from distunlearn.audit.attacks.bank_loss import bank_loss
from distunlearn.audit.attacks.base import Attacked
from distunlearn.audit.attacks.embedding_norm import embedding_norm
from distunlearn.audit.attacks.encodermi import encodermi_set, encodermi_threshold, encodermi_vector
from distunlearn.audit.attacks.gradient_norm import gradient_norm_head, gradient_norm_network
from distunlearn.audit.attacks.gradient_sketch import gradient_sketch
from distunlearn.audit.attacks.lira import lira_alignment
from distunlearn.audit.attacks.part_crop import part_crop
from distunlearn.audit.attacks.rmia import rmia
from distunlearn.audit.attacks.view_agreement import view_agreement
from distunlearn.audit.signals.collect import Signals

__all__ = ["ATTACKS", "FURTHER", "PAIRED", "Attacked", "run_attacks"]

ATTACKS: dict[str, Callable[[Signals, int], Attacked]] = {
    "view_agreement": view_agreement,
    "encodermi_vector": encodermi_vector,
    "bank_loss": bank_loss,
    "gradient_norm_network": gradient_norm_network,
    "gradient_norm_head": gradient_norm_head,
}
FURTHER: dict[str, Callable[[Signals, int], Attacked]] = {
    "encodermi_set": encodermi_set,
    "encodermi_threshold": encodermi_threshold,
    "embedding_norm": embedding_norm,
    "gradient_sketch": gradient_sketch,
    "part_crop": part_crop,
}
PAIRED: dict[str, tuple[Callable[[Signals, Signals, int], Attacked], str]] = {
    "rmia": (rmia, "retrained"),
    "lira_alignment": (lira_alignment, "retrained"),
    "alignment_gap": (alignment_gap, "original"),
}


def run_attacks(signals: Mapping[str, Signals], seed: int) -> dict[str, dict[str, Attacked]]:
    """Every attack on every encoder, {attack: {encoder: result}}; left out is what the signals do not allow.

    That is `part_crop` without crops, and paired attacks without the encoder they compare with.
    """
    found = {name: {e: attack(s, seed) for e, s in signals.items()} for name, attack in ATTACKS.items()}
    for name, attack in FURTHER.items():
        if name != "part_crop" or all(s.part_responses.shape[1] for s in signals.values()):
            found[name] = {e: attack(s, seed) for e, s in signals.items()}
    for name, (attack, reference) in PAIRED.items():
        if reference in signals:
            found[name] = {e: attack(s, signals[reference], seed) for e, s in signals.items()}
    return found
