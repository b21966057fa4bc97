"""Ways to reach per-sample gradients, one readable file each, behind one small interface (`base.Evaluator`).

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

from collections.abc import Callable
from typing import TYPE_CHECKING

from distunlearn.constraints.evaluators.base import Constrained, Evaluator, Look, Match, Views
from distunlearn.constraints.evaluators.ghost_norm import GhostNorm
from distunlearn.constraints.evaluators.head import Head
from distunlearn.constraints.evaluators.input_gp import InputGP
from distunlearn.constraints.evaluators.sketch import DoubleBackward, Sketch
from distunlearn.constraints.evaluators.sliced import Sliced
from distunlearn.constraints.evaluators.two_passes import shown_once

if TYPE_CHECKING:
    from distunlearn.config.schema import RunConfig

__all__ = ["EVALUATORS", "Constrained", "Evaluator", "Match", "extra_images", "make_evaluator"]

EVALUATORS: dict[str, Callable[..., Evaluator]] = {
    "head": Head,
    "sketch": Sketch,
    "sliced": Sliced,
    "ghost_norm": GhostNorm,
    "input_gp": InputGP,
    "double_backward": DoubleBackward,
}


def make_evaluator(cfg: RunConfig, look: Look, views: Views) -> Evaluator:
    """The evaluator that `cfg` names.

    look, views: see `base.Look` and `base.Views`.
    """
    build = EVALUATORS[cfg.constraint.evaluator]
    return build(cfg, look) if build in (Head, Sliced) else build(cfg, look, views)


def extra_images(cfg: RunConfig, branches: int, momentum: bool, forget: int, third: int) -> int:
    """Images through an encoder per step and pair of views, beside one forward of forgotten and third-party images.

    Without the step check of every `constraint.check_every` steps. branches: V of the objective.
    """
    evaluator = cfg.constraint.evaluator
    if evaluator in ("sketch", "ghost_norm"):
        return branches * (2 * forget + (0 if shown_once(cfg, forget, third) else third))
    if evaluator == "sliced":
        return branches * (forget + 2 * third)
    if evaluator == "input_gp":
        return branches * (3 * forget) + (branches * forget if momentum else 0)
    return 0
