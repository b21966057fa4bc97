"""Does the whole encoder keep its level? How held-out images, which no training has met, look to each encoder.

Retraining moves single images; it does not make the encoder see all images differently. A method that lowers the view
agreement of everybody hides the forgotten images in a crowd, and pays with what the encoder is for. Of each signal:

    (mean over holdout in the encoder - mean over holdout in the retrained one) / standard deviation there

Reported, never judged. Within `KEPT` the level is called kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from distunlearn.audit.attacks.lira import alignment
from distunlearn.audit.signals.collect import Signals

KEPT = 0.3  # standard deviations
CONFIDENCE = 0.95
TINY = 1e-30


def level(signals: Mapping[str, Signals]) -> dict[str, Any] | None:
    """{"signals": {name: {"original", "unlearned", "low", "high"}}, "farthest": name, "kept": bool}; None without a
    retrained encoder or with fewer than 2 held-out images.

    low, high: 95 % interval of "unlearned" over images, which are paired. farthest: the signal that is farthest off.
    """
    if "retrained" not in signals or len(signals["retrained"].of("holdout")) < 2:
        return None
    seen = {encoder: _columns(found.at(found.of("holdout"))) for encoder, found in signals.items()}
    found = {}
    for name, reference in seen["retrained"].items():
        spread = max(float(reference.std(ddof=1)), TINY)
        moved = {encoder: (seen[encoder][name] - reference) / spread for encoder in ("original", "unlearned")}
        now = moved["unlearned"]
        reach = stats.norm.ppf((1 + CONFIDENCE) / 2) * now.std(ddof=1) / math.sqrt(len(now))
        found[name] = {encoder: float(values.mean()) for encoder, values in moved.items()}
        found[name] |= {"low": float(now.mean() - reach), "high": float(now.mean() + reach)}
    farthest = max(found, key=lambda name: abs(found[name]["unlearned"]))
    return {"signals": found, "farthest": farthest, "kept": abs(found[farthest]["unlearned"]) <= KEPT}


def _columns(signals: Signals) -> dict[str, np.ndarray]:
    """Per signal [n], of the images themselves; norms by their logarithm."""
    return {
        "view_agreement": alignment(signals),
        "embedding_agreement": np.arctanh(np.clip(signals.embedding_cosines.mean(1), -1 + 1e-9, 1 - 1e-9)),
        "bank_loss": signals.bank_loss,
        "gradient_norm_head": np.log(signals.gradient_norm_head + TINY),
        "gradient_norm_network": np.log(signals.gradient_norm_network + TINY),
        "embedding_norm": np.log(np.linalg.norm(signals.embedding, axis=1) + TINY),
    }
