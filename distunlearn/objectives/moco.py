"""MoCo v2: one query against its momentum key and a queue of past keys.

Source: He, Fan, Wu, Xie, Girshick, "Momentum Contrast for Unsupervised Visual Representation
Learning", CVPR 2020, eq. 1 (loss) and algorithm 1; the v2 recipe (MLP head, stronger views) is
Chen, Fan, Girshick, He, "Improved Baselines with Momentum Contrastive Learning", 2020. With the
query q = u_a (online) and the key k+ = u_b (momentum encoder, stop-gradient), both of length 1:

    utility = mean of -log [ exp(q.k+ / tau) / (exp(q.k+ / tau) + sum_queue exp(q.k / tau)) ]

Earlier keys of the query's own image are left out of the sum by id. At the paper's scale the queue
holds none (it is far shorter than an epoch), so this is eq. 1 there; on a small data set it keeps an
image from being its own negative. Push the step's keys after the loss, as algorithm 1 does.

Per-sample loss: the bank formula with the queue as bank and u_b constant; one online branch.
"""

from __future__ import annotations

from torch import Tensor

from distunlearn.distributed.collectives import gather_sizes, mean_scale
from distunlearn.objectives.base import Branches, MomentumObjective
from distunlearn.objectives.memory_bank import Bank, normalise, query_infonce

__all__ = ["MoCo"]


class MoCo(MomentumObjective):
    """Branch 0: query = online view a, target = momentum view b. temperature: tau > 0."""

    name = "moco"
    needs_momentum = True
    uses_bank = True
    uses_queue = True
    uses_labels = False
    views = 2
    branches = 1

    def utility(self, b: Branches, bank: Bank | None = None) -> Tensor:
        """Cross-entropy of the key among key and queue. bank: `KeyQueue.bank(temperature)`; a collective call."""
        losses = self.row_losses(b, bank)
        return losses.sum() * mean_scale(gather_sizes(b.num_samples, losses.device))

    def row_losses(self, b: Branches, bank: Bank | None = None) -> Tensor:
        """The cross-entropy of every image, [n]."""
        assert bank is not None, "moco needs the queue as its bank"
        z, key = self._pair(b)
        return query_infonce(normalise(z[0]), key[0], bank, b.ids, self.budget)
