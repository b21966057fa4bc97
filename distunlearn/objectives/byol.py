"""BYOL: predict the momentum projection of the other view, no negatives.

Source: Grill et al., "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning",
NeurIPS 2020, eq. 2 and the symmetrised loss below it. Predictor output q, target projection z':

    L = || q/|q| - z'/|z'| ||^2 = 2 - 2 cos(q, z')
    loss = mean over the images of L(q_a, z'_b) + L(q_b, z'_a)

Per-sample loss: BYOL compares with nothing, so a sample's own loss says little of how well it is told
from others; the bank formula is used instead (target projections of retain as bank, temperature
`objective.temperature`, 0.2 by default, which is ours), mean of the two branches, targets constant.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distunlearn.objectives.base import Branches, MomentumConfig, MomentumObjective
from distunlearn.objectives.memory_bank import Bank, normalise


@dataclass(frozen=True, kw_only=True)
class BYOLConfig(MomentumConfig):
    """Temperature of the bank loss, momentum encoder, projector and predictor."""

    name: str = "byol"


class BYOL(MomentumObjective):
    """Branch 0: prediction from view a of target b; branch 1: from b of a. temperature: of the bank formula only."""

    name = "byol"
    Config = BYOLConfig
    summary = "BYOL: predict the momentum projection of the other view, no negatives"
    predictor = True

    def row_losses(self, b: Branches, bank: Bank | None = None) -> Tensor:
        """L(q_a, z'_b) + L(q_b, z'_a) of every image, [n], in [0, 8]; the bank is not used."""
        z, target = self._pair(b)
        return (2 - 2 * (normalise(z) * target).sum(-1)).sum(0)
