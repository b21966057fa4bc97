"""Ways to reach per-sample gradients, one readable file each: settings, texts and term (`base.Evaluator`).

| name | what is compared | how it is differentiated |
|---|---|---|
| `head` | log norm and sketch of the last linear layer's gradient | closed form, exact |
| `sketch` | log norm and sketches of many layers' gradients | signed probes on forgotten images |
| `sliced` | gradients as numbers in one random direction per step | signed probes on all images |
| `ghost_norm` | log norm of the gradient of many layers' weights | signed steps along each own gradient |
| `input_gp` | nothing: a penalty on input gradients at interpolates | signed steps along each input gradient |
| `double_backward` | as `sketch` | a second backward pass: the reference, for whole weights only |
"""

from __future__ import annotations

from distunlearn.config.checks import SHARDED
from distunlearn.config.schema import RunConfig
from distunlearn.constraints.evaluators.base import Constrained, Evaluator, Features, evaluator_class, require_pull
from distunlearn.errors import ConfigError

__all__ = ["Constrained", "Evaluator", "Features", "evaluator_class", "make_evaluator", "require_pull"]


def make_evaluator(cfg: RunConfig) -> Evaluator:
    """The evaluator that `cfg` names.

    The graph of a pass is good for one backward alone where sharded weights are gathered for it and let go afterwards,
    and in compiled blocks, which may use up what they keep.

    Raises:
        ConfigError: it cannot be used with these settings.
    """
    evaluator = evaluator_class(cfg)
    for problem in evaluator.problems(cfg):
        raise ConfigError(f"{problem}.")
    lasting = cfg.backend not in SHARDED and not cfg.runtime.compile
    return evaluator(cfg.constraint, cfg.precision, lasting)
