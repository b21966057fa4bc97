"""MoCo v2: one query against its momentum key and a queue of past keys.

Source: He, Fan, Wu, Xie, Girshick, "Momentum Contrast for Unsupervised Visual Representation
Learning", CVPR 2020, eq. 1 (loss) and algorithm 1; the v2 recipe (MLP head, stronger views) is
Chen, Fan, Girshick, He, "Improved Baselines with Momentum Contrastive Learning", 2020. With the
query q = u_a (online) and the key k+ = u_b (momentum encoder, stop-gradient), both of length 1:

    loss = mean of -log [ exp(q.k+ / tau) / (exp(q.k+ / tau) + sum_queue exp(q.k / tau)) ]

Earlier keys of the query's own image are left out of the sum by id. At the paper's scale the queue
holds none (it is far shorter than an epoch), so this is eq. 1 there; on a small data set it keeps an
image from being its own negative. Push the step's keys after the loss, as algorithm 1 does.

Per-sample loss: the bank formula with the queue as bank and u_b constant; one online branch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from distunlearn.config.schema import PositiveInt, RunConfig
from distunlearn.objectives.base import Branches, MomentumConfig, MomentumObjective
from distunlearn.objectives.memory_bank import Bank, normalise, query_infonce


@dataclass(frozen=True, kw_only=True)
class MoCoConfig(MomentumConfig):
    """Temperature, momentum encoder and queue."""

    name: str = "moco"
    queue_size: PositiveInt = 512  # past keys that a query is compared with


class MoCo(MomentumObjective):
    """Branch 0: query = online view a, target = momentum view b. temperature: tau > 0."""

    name = "moco"
    Config = MoCoConfig
    summary = "MoCo v2: one query against its momentum key and a queue of past keys"
    uses_queue = True
    branches = 1

    @classmethod
    def problems(cls, cfg: RunConfig) -> Iterator[str]:
        size, largest = cfg.objective.queue_size, max(cfg.pretrain.batch, cfg.unlearn.retain_batch)
        if size < largest:
            yield f"objective.queue_size={size} is smaller than a batch of {largest}; enlarge the queue"

    def row_losses(self, b: Branches, bank: Bank | None = None) -> Tensor:
        """The cross-entropy of every image's key among key and queue, [n]. bank: `KeyQueue.bank(temperature)`."""
        assert bank is not None, "moco needs the queue as its bank"
        z, key = self._pair(b)
        return query_infonce(normalise(z[0]), key[0], bank, b.ids, self.budget)
