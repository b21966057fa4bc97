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

from distunlearn.config.schema import RunConfig
from distunlearn.constraints.evaluators.base import Constrained, Evaluator, Look, Match, Views, evaluator_class
from distunlearn.errors import ConfigError

__all__ = ["Constrained", "Evaluator", "Match", "evaluator_class", "make_evaluator"]


def make_evaluator(cfg: RunConfig, look: Look, views: Views) -> Evaluator:
    """The evaluator that `cfg` names.

    look, views: see `base.Look` and `base.Views`.

    Raises:
        ConfigError: it cannot be used with these settings.
    """
    evaluator = evaluator_class(cfg)
    for problem in evaluator.problems(cfg):
        raise ConfigError(f"{problem}.")
    return evaluator(cfg, look, views)
