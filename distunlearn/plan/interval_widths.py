"""How wide the intervals of the gates will be, and so what a verdict can be: from the numbers of images alone.

The AUC of n forgotten against m held-out images has, near 0.5, the variance (n + m + 1) / (12 n m) (Mann and Whitney,
1947); the interval of one encoder's AUC is so within a tenth. The interval of the difference of two encoders' AUCs on
the same images is sqrt(2 (1 - r)) times as wide, where r says how alike their scores are: 0 times if they are the same,
1.41 times if they are independent. r is known only afterwards (10 to 90 % of finished runs: 0.0 to 0.9). It goes by the
method, for one that changes little keeps the scores of the original encoder, and by the kind of the encoder. What the
factor was in the 480 finished runs in benchmarks/results (10 %, half and 90 % of them) stands in `SPREAD`. So 84 % of
all widths are predicted within 20 %, of third_party 78 %. What many seeds of the same run would show foretells 95 % and
89 % (estimated from three), so the promise cannot be kept for all of them.

Without a retrained encoder the gate is on one encoder's AUC, and its interval is never narrower than that of this one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

from distunlearn.config.schema import RunConfig
from distunlearn.methods.base import method_class
from distunlearn.verify.gates import FEWEST, MIN_IMAGES

ATTACKED = ("view_agreement", "encodermi_vector", "bank_loss", "gradient_norm_network", "gradient_norm_head")
# (`Method.moves`, kind of encoder): factors of `ATTACKED` at 10, 50 and 90 % of the runs, in hundredths.
SPREAD = {
    ("little", "resnet"): ((56, 62, 69), (72, 94, 103), (58, 71, 81), (77, 85, 101), (66, 75, 85)),
    ("little", "vit"): ((44, 48, 53), (78, 90, 103), (45, 52, 60), (52, 61, 71), (50, 58, 64)),
    ("unevenly", "resnet"): ((61, 71, 96), (92, 108, 127), (65, 84, 116), (81, 103, 127), (72, 88, 130)),
    ("unevenly", "vit"): ((45, 49, 56), (85, 97, 110), (48, 53, 63), (52, 66, 76), (52, 60, 71)),
    ("much", "resnet"): ((71, 96, 113), (79, 106, 117), (73, 100, 122), (91, 111, 129), (75, 109, 131)),
    ("much", "vit"): ((74, 103, 128), (97, 109, 123), (77, 103, 124), (100, 126, 144), (102, 126, 145)),
    ("evenly", "resnet"):
        ((74, 90, 101), (91, 105, 120), (83, 96, 126), (96, 117, 136), (86, 117, 134)),
    ("evenly", "vit"):
        ((56, 80, 93), (85, 101, 107), (56, 86, 103), (61, 93, 120), (64, 99, 121)),
    ("far", "resnet"): ((104, 116, 122), (112, 121, 126), (105, 122, 131), (122, 139, 153), (130, 139, 147)),
    ("far", "vit"): ((78, 110, 127), (80, 105, 123), (75, 102, 134), (98, 129, 145), (101, 127, 144)),
    ("wholly", "resnet"): ((125, 132, 138), (114, 123, 130), (125, 137, 141), (133, 141, 156), (132, 142, 148)),
    ("wholly", "vit"): ((121, 128, 137), (110, 117, 126), (121, 134, 139), (128, 138, 145), (122, 131, 141)),
}  # fmt: skip


def spread(moves: str, encoder: str) -> dict[str, tuple[float, float, float]]:
    """{attack: factors}, see above. moves: of the method's class. encoder: its name."""
    found = SPREAD[moves, "vit" if "vit" in encoder else "resnet"]
    return {
        attack: (low / 100, half / 100, high / 100) for attack, (low, half, high) in zip(ATTACKED, found, strict=True)
    }


GROUPS_WIDEN = (1.0, 1.0, 1.3)  # without a retrained encoder, of a fair request: by what reference groups did in a run


def expected_widths(cfg: RunConfig, counts: Mapping[str, int]) -> dict[str, Any]:
    """{"gates": {attack: figures}, "verdict": what it can be, in words}; {} without images of a side.

    Figures of an attack: `half_width` of the interval of AUC(unlearned) - AUC(retrained), at tier 0 of
    AUC(unlearned) - 1/2, from `low` to `high`, that of `one_encoder`'s AUC, and `passes_within`: the largest difference
    that still passes at that width, None if none does.

    Args:
        counts: images by role.
    """
    forget, holdout = counts["forget"], counts["holdout"]
    if not forget or not holdout:
        return {}
    gates = cfg.audit.gates
    plain = NormalDist().inv_cdf((1 + gates.confidence) / 2) * math.sqrt(
        (forget + holdout + 1) / (12 * forget * holdout)
    )
    found: dict[str, dict[str, float | None]] = {}
    widened = spread(method_class(cfg).moves, cfg.encoder.name)
    for attack, factors in (widened if cfg.audit.tier else dict.fromkeys(ATTACKED, GROUPS_WIDEN)).items():
        margin = gates.view_agreement if attack == "view_agreement" else gates.attack
        low, half, high = (round(plain * factor, 4) for factor in factors)
        room = round(margin - half, 4) if half < margin else None
        found[attack] = {
            "half_width": half, "low": low, "high": high, "one_encoder": round(plain, 4), "margin": margin,
            "passes_within": room,
        }  # fmt: skip
    return {"gates": found, "verdict": _words(forget, holdout, found, "retraining" if cfg.audit.tier else "chance")}


def _words(forget: int, holdout: int, gates: Mapping[str, Mapping[str, Any]], yardstick: str) -> str:
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
            "margin; add held-out images"
        )
    name = min(gates, key=lambda attack: gates[attack]["passes_within"])
    room = gates[name]["passes_within"]
    return f"pass or fail can come out: with {counted} {name} passes within {room:.3f} of {yardstick}"
