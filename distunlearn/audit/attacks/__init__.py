"""Membership attacks, one file each: signals of one encoder in, scores of forget against holdout out.

An attack never sees which encoder it attacks, and none of them uses third-party or calibration images.

The table is `ATTACKS` of `config/registry.py`: which of them the gates always judge, which only where
`audit.gates.also` names them, and which also look at a second encoder.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping

from distunlearn.audit.attacks.base import Attacked
from distunlearn.audit.signals.collect import Signals
from distunlearn.common.progress import progress_of
from distunlearn.config.registry import ATTACKS, own_attacks

__all__ = ["Attacked", "attack", "run_attacks"]


def attack(name: str) -> Callable[..., Attacked]:
    """The attack called `name`: a function of signals (a paired one: of two encoders' signals) and a seed."""
    module, _, function = ATTACKS[name].place.partition(":")
    return getattr(importlib.import_module(module), function)


def run_attacks(signals: Mapping[str, Signals], seed: int, also: Iterable[str] = ()) -> dict[str, dict[str, Attacked]]:
    """Every attack on every encoder, {attack: {encoder: result}}; left out is what the signals do not allow.

    That is `part_crop` without crops, and paired attacks without the encoder they compare with.
    also: `audit.gates.also`, for attacks that are not of this package.
    """
    found = {}
    with progress_of("attacks") as show:
        for number, (name, entry) in enumerate(ATTACKS.items(), start=1):
            run = attack(name)
            if entry.reference is not None and entry.reference in signals:
                found[name] = {e: run(s, signals[entry.reference], seed) for e, s in signals.items()}
            elif entry.reference is None and (
                name != "part_crop" or all(s.part_responses.shape[1] for s in signals.values())
            ):
                found[name] = {e: run(s, seed) for e, s in signals.items()}
            show(number, len(ATTACKS))
    own = own_attacks(also)
    return found | {name: {e: run(s, seed) for e, s in signals.items()} for name, run in own.items()}
