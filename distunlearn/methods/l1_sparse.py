"""l1_sparse: fine-tuning on the retain images while weights shrink towards zero.

    L = L_task(retain) + l1_weight * |theta|_1,      theta: all trained weights

Source: Jia et al., "Model Sparsity Can Simplify Machine Unlearning", NeurIPS 2023, there with the subgradient of the
absolute values in the gradient. Here the second term is taken by its proximal operator after each optimizer step,
theta <- sign(theta) max(0, |theta| - rate * l1_weight) (Beck and Teboulle, "A Fast Iterative Shrinkage-Thresholding
Algorithm", 2009, eq. 1.5): the same to first order under plain gradient descent, exact zeros, and a strength that the
optimizer's scaling of gradients does not change. The forget images are never looked at. Guarantee: empirical.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from distunlearn.config.schema import MethodConfig, NonNegativeFloat
from distunlearn.methods.search_space import Log
from distunlearn.methods.training import Finetune
from distunlearn.objectives.forward import Context


@dataclass(frozen=True, kw_only=True)
class L1SparseConfig(MethodConfig):
    """One weight."""

    name: str = "l1_sparse"
    l1_weight: NonNegativeFloat = 0.1  # of the sum of the weights' absolute values


class L1Sparse(Finetune):
    """See the module's text."""

    name = "l1_sparse"
    Config = L1SparseConfig  # type: ignore[assignment]
    summary = "fine-tuning on retain samples while weights shrink to zero"
    report = "fine-tuning on the retained images only while small weights vanish (a reference, not a full method)"
    space = {**Finetune.space, "method.l1_weight": Log(0.01, 3.0)}

    def adjust(self, ctx: Context, name: str, weight: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
        return weight.sign() * (weight.abs() - ctx.rate * self.settings.l1_weight).clamp(min=0)
