"""Ways to reach per-sample gradients, one readable file each, behind one small interface (`base.Evaluator`).

| name | what is compared | how it is differentiated |
|---|---|---|
| `head` | log norm and sketch of the last linear layer's gradient | closed form, exact |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from distunlearn.constraints.evaluators.base import Constrained, Evaluator, Look, Match
from distunlearn.constraints.evaluators.head import Head

if TYPE_CHECKING:
    from distunlearn.config import RunConfig

__all__ = ["EVALUATORS", "Constrained", "Evaluator", "Match", "make_evaluator"]

EVALUATORS: dict[str, Callable[..., Evaluator]] = {
    "head": Head,
}


def make_evaluator(cfg: RunConfig, look: Look) -> Evaluator:
    """The evaluator that `cfg` names.

    look: see `base.Look`.
    """
    return EVALUATORS[cfg.constraint.evaluator](cfg, look)
