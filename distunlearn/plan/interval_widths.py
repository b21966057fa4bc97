"""How wide the intervals of the gates will be, and so what a verdict can be: from the numbers of images alone.

The AUC of n forgotten against m held-out images has, near 0.5, the variance (n + m + 1) / (12 n m) (Mann and Whitney,
1947). The interval of the difference of two encoders' AUCs on the same images is narrower or wider than that of one by
a factor that says how alike their scores are: 0 if they are the same, 1.41 if they are independent. What it was in the
147 finished runs of the method third_party in benchmarks/results (10 %, half and 90 % of them) stands in `SPREAD`;
methods that change less than it give narrower intervals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

from distunlearn.config.schema import RunConfig
from distunlearn.verify.gates import FEWEST, MIN_IMAGES

SPREAD = {
    "view_agreement": (0.72, 0.99, 1.21), "encodermi_vector": (0.89, 1.07, 1.22), "bank_loss": (0.74, 1.02, 1.23),
    "gradient_norm_network": (0.93, 1.19, 1.42), "gradient_norm_head": (0.90, 1.19, 1.40),
}  # fmt: skip


def expected_widths(cfg: RunConfig, counts: Mapping[str, int]) -> dict[str, Any]:
    """{"gates": {attack: figures}, "verdict": what it can be, in words}; {} without a retrained encoder (tier 0).

    Figures of an attack: `half_width` of the interval of AUC(unlearned) - AUC(retrained), from `low` to `high`, and
    `passes_within`: the largest difference that still passes at that width, None if no difference does.

    Args:
        counts: images by role.
    """
    forget, holdout = counts["forget"], counts["holdout"]
    if not cfg.audit.tier or not forget or not holdout:
        return {}
    gates = cfg.audit.gates
    plain = NormalDist().inv_cdf((1 + gates.confidence) / 2) * math.sqrt(
        (forget + holdout + 1) / (12 * forget * holdout)
    )
    found: dict[str, dict[str, float | None]] = {}
    for attack, spread in SPREAD.items():
        margin = gates.view_agreement if attack == "view_agreement" else gates.attack
        low, half, high = (round(plain * factor, 4) for factor in spread)
        room = round(margin - half, 4) if half < margin else None
        found[attack] = {"half_width": half, "low": low, "high": high, "margin": margin, "passes_within": room}
    return {"gates": found, "verdict": _words(forget, holdout, found)}


def _words(forget: int, holdout: int, gates: Mapping[str, Mapping[str, Any]]) -> str:
    fewest = min(forget, holdout)
    counted = f"{forget} forgotten and {holdout} held-out images"
    if fewest <= FEWEST:
        return f"inconclusive, whatever comes out: {counted} give no interval; direction and size will be told"
    if fewest < MIN_IMAGES:
        return (
            f"never a pass, which needs {MIN_IMAGES} images on either side; a fail where the trace is large ({counted})"
        )
    tight = [name for name, gate in gates.items() if gate["passes_within"] is None]
    if tight:
        return (
            f"a pass is not to be expected: with {counted} the interval of {', '.join(tight)} is wider than the "
            "margin; add held-out images, or raise audit.gates.* before the run"
        )
    name = min(gates, key=lambda attack: gates[attack]["passes_within"])
    room = gates[name]["passes_within"]
    return f"pass or fail can come out: with {counted} {name} passes within {room:.3f} of retraining"
