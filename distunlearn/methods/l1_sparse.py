"""l1_sparse: fine-tuning on the retain images while weights shrink towards zero.

    L = L_utility(retain) + l1_weight * |theta|_1,      theta: all trained weights

Source: Jia et al., "Model Sparsity Can Simplify Machine Unlearning", NeurIPS 2023, there with the subgradient of the
absolute values in the gradient. Here the second term is taken by its proximal operator after each optimizer step,
theta <- sign(theta) max(0, |theta| - rate * l1_weight) (Beck and Teboulle, "A Fast Iterative Shrinkage-Thresholding
Algorithm", 2009, eq. 1.5): the same to first order under plain gradient descent, exact zeros, and a strength that the
optimizer's scaling of gradients does not change. The forget images are never looked at. Guarantee: empirical.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from distunlearn.config.schema import RunConfig
from distunlearn.methods.training import Finetune
from distunlearn.objectives.forward import Context

__all__ = ["L1Sparse"]


class L1Sparse(Finetune):
    """See the module's text."""

    def __init__(self, cfg: RunConfig) -> None:
        super().__init__()
        self.name, self.weight = "l1_sparse", cfg.method.l1_weight

    def adjust(self, ctx: Context, name: str, weight: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
        return weight.sign() * (weight.abs() - ctx.rate * self.weight).clamp(min=0)
