"""How per-sample gradients are reached, described and compared.

| module | what it holds |
|---|---|
| `head` | per-sample gradient of the last linear layer in closed form: norms and sketches |
| `probes` | per-sample low-rank changes of weights by activations: sketches and signed copies |
| `ghost` | exact per-sample gradient norms over many layers, and the step along each own gradient |
| `rows` | adding to some rows of a layer's output without keeping more than a backward pass needs |
| `patterns` | one pattern of active units for both signed copies of a sample |
| `evaluators` | the ways to reach per-sample gradients behind one interface |
| `distances` | two-sample distances by name, energy distance, exact gradient over shards, permutation test |
| `mmd` | maximum mean discrepancy with random Fourier features |
| `marginals` | sliced Wasserstein, quantile matching, moments |
| `samples` | what the distances share |
| `confidence` | lowering the confidence on third-party samples: hinge, entropy |
| `running` | running spread of features, and the switch that turns the term off at its target |
"""

from __future__ import annotations

from distunlearn.constraints.confidence import entropy_confidence, hinge_confidence
from distunlearn.constraints.distances import (
    DISTANCES,
    energy_distance,
    permutation_test,
    surrogate,
    value_and_cotangent,
)
from distunlearn.constraints.head import HeadGradients, gradient_features, head_gradients, sketch_matrices
from distunlearn.constraints.running import PhiSwitch, RunningSpread

__all__ = [
    "DISTANCES",
    "HeadGradients",
    "PhiSwitch",
    "RunningSpread",
    "energy_distance",
    "entropy_confidence",
    "gradient_features",
    "head_gradients",
    "hinge_confidence",
    "permutation_test",
    "sketch_matrices",
    "surrogate",
    "value_and_cotangent",
]
