"""Is the encoder still useful? kNN and linear probe on frozen embeddings, both scikit-learn's.

Fitted on the labelled retain images, tested on the labelled holdout, embeddings of the images as they are.
kNN: cosine distance, majority of `neighbours` (Wu et al., "Unsupervised Feature Learning via Non-Parametric
Instance Discrimination", CVPR 2018, without its weights). Linear probe: multinomial logistic regression.
"""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from distunlearn.audit.signals.collect import Signals
from distunlearn.verify.figures import UTILITIES

PROBED = ("retain", "forget", "holdout")


def correct_predictions(signals: Signals, neighbours: int) -> dict[str, np.ndarray]:
    """Per utility 1.0 or 0.0 for every labelled holdout image, NaN for all others, [n].

    All NaN where the retain images carry fewer than two classes, for then there is nothing to tell apart.
    """
    train = _labelled(signals, "retain")
    test = _labelled(signals, "holdout")
    nothing = np.full(len(signals.ids), np.nan)
    if len(np.unique(signals.labels[train])) < 2 or not len(test):
        return {name: nothing for name in UTILITIES}
    classifiers = {"knn": KNeighborsClassifier(min(neighbours, len(train)), metric="cosine"), "linear_probe": _probe()}
    result = {}
    for name, classifier in classifiers.items():
        classifier.fit(signals.embedding[train], signals.labels[train])
        right = nothing.copy()
        right[test] = classifier.predict(signals.embedding[test]) == signals.labels[test]
        result[name] = right
    return result


def probe_accuracies(signals: Signals) -> dict[str, float]:
    """Accuracy of the linear probe on retain (which it was fitted on), forget and holdout; NaN where not labelled."""
    train = _labelled(signals, "retain")
    if len(np.unique(signals.labels[train])) < 2:
        return dict.fromkeys(PROBED, float("nan"))
    probe = _probe().fit(signals.embedding[train], signals.labels[train])
    found = {}
    for role in PROBED:
        rows = _labelled(signals, role)
        right = probe.predict(signals.embedding[rows]) == signals.labels[rows] if len(rows) else np.zeros(0)
        found[role] = float(right.mean()) if len(rows) else float("nan")
    return found


def _probe():
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def _labelled(signals: Signals, role: str) -> np.ndarray:
    rows = signals.of(role)
    return rows[signals.labels[rows] >= 0]
