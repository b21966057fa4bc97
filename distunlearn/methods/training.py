"""Plain training with the encoder's own objective: `pretrain`, `retrain` and `finetune` are this step.

    L = L_utility(batch)

pretrain runs it on all members; `retrain` from scratch on the retain samples only (exact unlearning,
the reference of every report); `finetune` from the original encoder on the retain samples
(catastrophic forgetting is all it hopes for; Golatkar et al. 2020 use it as a baseline).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from distunlearn.config.schema import RunConfig
from distunlearn.data.schedule import Batch
from distunlearn.methods.base import Stateless, StepOutput
from distunlearn.objectives.base import Branches
from distunlearn.objectives.forward import Context, embed
from distunlearn.objectives.memory_bank import Bank

__all__ = ["Contrastive", "Finetune", "Retrain", "enqueue", "retain_bank", "utility"]


def utility(ctx: Context, batch: Batch) -> tuple[Tensor, Branches]:
    """L_utility of one batch with batch statistics, and the branches, whose keys become the bank."""
    branches = embed(ctx, batch, batchnorm="train")
    queue = None if ctx.queue is None else ctx.queue.bank(ctx.objective.temperature)
    return ctx.objective.utility(branches, queue), branches


def retain_bank(ctx: Context, branches: Branches) -> Bank | None:
    """Bank of the step: the retain keys of all ranks, detached; MoCo v2: the queue; supervised: none."""
    if not ctx.objective.uses_bank:
        return None
    if ctx.queue is not None:
        return ctx.queue.bank(ctx.objective.temperature)
    return Bank.gather(*ctx.objective.bank_keys(branches), ctx.objective.temperature)


def enqueue(ctx: Context, branches: Branches) -> None:
    """MoCo v2: the keys of this step, from all ranks and with their ids, enter the queue after the loss is taken."""
    if ctx.queue is not None:
        gathered = Bank.gather(*ctx.objective.bank_keys(branches), ctx.objective.temperature)
        ctx.queue.push(gathered.keys, gathered.ids)


class Contrastive(Stateless):
    """Training on one stream of images, without a word about forgetting."""

    forgets = False

    def __init__(self, name: str, feeder: str) -> None:
        """`feeder`: "members" (pretrain) or "retain"."""
        self.name = name
        self.feeder = feeder

    def batch_sizes(self, cfg: RunConfig) -> Mapping[str, int]:
        return {self.feeder: cfg.pretrain.batch}

    def loss(self, ctx: Context, batches: Mapping[str, Batch]) -> StepOutput:
        batch = batches[self.feeder]
        value, branches = utility(ctx, batch)
        enqueue(ctx, branches)
        return StepOutput(loss=value, metrics={"utility": value.detach()}, consumed={self.feeder: batch.ids})


class Retrain(Contrastive):
    """Training from scratch without the forget set, by the recipe of `pretrain`."""

    def __init__(self) -> None:
        super().__init__("retrain", "retain")


class Finetune(Contrastive):
    """A few steps on the retain samples, from the original encoder."""

    def __init__(self) -> None:
        super().__init__("finetune", "retain")

    def batch_sizes(self, cfg: RunConfig) -> Mapping[str, int]:
        return {"retain": cfg.unlearn.retain_batch}
