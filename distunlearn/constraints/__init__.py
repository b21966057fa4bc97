"""How per-sample gradients are reached, described and compared.

| room | what it holds |
|---|---|
| `gradients` | the last linear layer in closed form; sketches by low-rank probes; exact norms over many layers |
| `evaluators` | the ways to reach per-sample gradients behind one interface |
| `distances` | two-sample distances by name, exact gradient over shards, permutation test |
| `confidence` | lowering the confidence on third-party samples: hinge, entropy |
| `moving_averages` | running spread of features, and the switch that turns the term off at its target |
| `cross_batch_memory` | features of past steps, against which the gradient is taken too |
"""

from __future__ import annotations

from distunlearn.constraints.confidence import entropy_confidence, hinge_confidence
from distunlearn.constraints.distances.energy import (
    DISTANCES,
    energy_distance,
    permutation_test,
    surrogate,
    value_and_cotangent,
)
from distunlearn.constraints.gradients.last_layer import (
    HeadGradients,
    gradient_features,
    head_gradients,
    sketch_matrices,
)
from distunlearn.constraints.moving_averages import PhiSwitch, RunningSpread

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
