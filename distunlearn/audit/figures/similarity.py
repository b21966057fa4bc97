"""Do two encoders represent the same images alike? Linear CKA of their embeddings.

    CKA(X, Y) = |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F),    X [n, E], Y [n, E'] with centred columns

Source: Kornblith, Norouzi, Lee and Hinton, "Similarity of Neural Network Representations Revisited", ICML 2019, with
linear kernels. 1: alike up to rotation and scale; 0: nothing in common. With few images (n not much above E) it
lies well above 0 for unrelated encoders too, so compare values of one row only.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from distunlearn.audit.signals.collect import Signals


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """CKA in [0, 1] of [n, E] against [n, E'], in float64; NaN where one side does not vary or n < 2."""
    if len(x) < 2:
        return float("nan")
    x, y = (part.astype(np.float64) - part.astype(np.float64).mean(0) for part in (x, y))
    own = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(y.T @ x) ** 2 / own) if own > 0 else float("nan")


def similarities(signals: Mapping[str, Signals]) -> dict[str, dict[str, dict[str, float]]]:
    """{"forget" or "holdout": {"to_original" or "to_retrained": {encoder: CKA}}} of all other encoders."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for role in ("forget", "holdout"):
        shown = {name: s.embedding[s.of(role)] for name, s in signals.items()}
        found[role] = {
            f"to_{to}": {name: linear_cka(x, shown[to]) for name, x in shown.items() if name != to}
            for to in ("original", "retrained") if to in shown
        }  # fmt: skip
    return found
