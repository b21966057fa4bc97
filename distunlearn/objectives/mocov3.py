"""MoCo v3: queries through a predictor against the momentum keys of the global batch, no queue.

Source: Chen, Xie, He, "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV
2021, eq. 1 and algorithm 1. Queries q1, q2 and momentum keys k1, k2 of the two views, length 1:

    ctr(q, k) = 2 tau * mean_i -log [ exp(q_i.k_i / tau) / sum_j exp(q_i.k_j / tau) ]
    loss      = ctr(q1, k2) + ctr(q2, k1)                   j: all images of the global batch

The factor 2 tau is the paper's: algorithm 1 scales the loss so that its gradient does not grow as tau
falls. The per-sample loss does not carry it (bank formula, mean of the two branches, keys constant).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distunlearn.distributed.collectives import get_rank, mean_scale
from distunlearn.objectives.base import Branches, MomentumConfig, MomentumObjective
from distunlearn.objectives.infonce import infonce
from distunlearn.objectives.memory_bank import Bank, normalise
from distunlearn.objectives.tiled_softmax import Columns


@dataclass(frozen=True, kw_only=True)
class MoCoV3Config(MomentumConfig):
    """Temperature, momentum encoder, projector and predictor."""

    name: str = "mocov3"


class MoCoV3(MomentumObjective):
    """Branch 0: query a with key b; branch 1: query b with key a. temperature: tau > 0."""

    name = "mocov3"
    Config = MoCoV3Config
    summary = "MoCo v3: queries through a predictor against the momentum keys of the batch"
    predictor = True

    def task_loss(self, b: Branches, bank: Bank | None = None) -> Tensor:
        """Symmetrised contrastive loss over the global keys; the bank is not used; a collective call."""
        losses, sizes = self._branch_losses(b)
        return 2 * self.temperature * losses.sum() * mean_scale(sizes)

    def row_losses(self, b: Branches, bank: Bank | None = None) -> Tensor:
        """Both branches' losses of every image, times 2 tau, [n]; a collective call."""
        return 2 * self.temperature * self._branch_losses(b)[0].sum(0)

    def _branch_losses(self, b: Branches) -> tuple[Tensor, list[int]]:
        """Losses of both branches, [2, n], and the images of every rank."""
        z, key = self._pair(b)
        sizes = b.shares
        own = torch.arange(b.num_samples, device=z.device) + sum(sizes[: get_rank()])
        everyone = None if b.gathered is None else b.gathered.unflatten(0, (-1, self.branches)).movedim(1, 0)
        columns, budget = Columns(own), self.budget
        return infonce(normalise(z), key, columns, self.temperature, sizes, budget=budget, everyone=everyone), sizes
