"""Signals with a known answer: members differ from strangers by a stated shift, or not at all."""

from __future__ import annotations

import numpy as np

from distunlearn.audit.signals.collect import Signals

SIZES = {"retain": 120, "forget": 60, "third_party_audit": 50, "holdout": 140}


def make_signals(shift: float, seed: int = 0, *, skill: float = 4.0, sizes: dict[str, int] = SIZES) -> Signals:
    """`shift`: standard deviations by which retain and forget are better known. skill: how far classes lie apart."""
    base = np.random.default_rng(99)  # the images: the same for every encoder
    noise = np.random.default_rng(seed)
    roles = np.repeat(list(sizes), list(sizes.values()))
    n = len(roles)
    known = np.isin(roles, ["retain", "forget"]) * shift
    hardness = base.normal(size=n)
    labels = base.integers(0, 4, n)
    centres = base.normal(size=(4, 8))
    level = 0.7 + 0.05 * (known + 0.7 * hardness + 0.3 * noise.normal(size=n))
    cosines = np.clip(level[:, None] + 0.02 * noise.normal(size=(n, 10)), -1, 1)
    loss = np.exp(-0.5 * (known + 0.7 * hardness + 0.5 * noise.normal(size=n)))
    return Signals(
        ids=[f"img-{i}" for i in range(n)],
        roles=roles,
        labels=labels,
        embedding=(skill * centres[labels] + base.normal(size=(n, 8)) + 0.2 * noise.normal(size=(n, 8))).astype("f4"),
        embedding_cosines=cosines,
        output_cosines=cosines + 0.01 * noise.normal(size=(n, 10)),
        bank_loss=loss,
        confidence=np.exp(-loss),
        output=np.stack([cosines.mean(1), 0.1 * noise.normal(size=n)], 1),
        gradient_norm_head=loss * np.exp(0.1 * noise.normal(size=n)),
        gradient_norm_network=np.where(roles == "retain", np.nan, 3 * loss * np.exp(0.1 * noise.normal(size=n))),
        gradient_sketch=loss[:, None] * noise.normal(size=(n, 64)),
        layer_norms=np.log(loss)[:, None] + 0.1 * noise.normal(size=(n, 6)),
        network_sketch=loss[:, None] * noise.normal(size=(n, 64)),
        part_responses=np.zeros((n, 0), dtype=np.float32),
    )
