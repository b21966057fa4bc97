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
