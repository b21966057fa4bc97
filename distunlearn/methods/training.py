"""Plain training with the encoder's own objective: `pretrain`, `retrain` and `finetune` are this step.

    L = L_task(batch)

pretrain runs it on all members; `retrain` from scratch on the retain samples only (exact unlearning,
the reference of every report); `finetune` from the original encoder on the retain samples
(catastrophic forgetting is all it hopes for; Golatkar et al. 2020 use it as a baseline).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from distunlearn.config.schema import MethodConfig
from distunlearn.data.schedule import Batch
from distunlearn.methods.base import Method, StepOutput
from distunlearn.methods.search_space import Log, Space
from distunlearn.objectives.base import Branches
from distunlearn.objectives.forward import Context, embed
from distunlearn.objectives.memory_bank import Bank


def task_loss(ctx: Context, batch: Batch) -> tuple[Tensor, Branches]:
    """L_task of one batch with batch statistics, and the branches, whose keys become the bank."""
    branches = embed(ctx, batch, batchnorm="train")
    queue = None if ctx.queue is None else ctx.queue.bank(ctx.objective.temperature)
    return ctx.objective.task_loss(branches, queue), branches


def retain_bank(ctx: Context, branches: Branches) -> Bank | None:
    """Bank of the step: the retain keys of all ranks, detached; MoCo v2: the queue; supervised: none."""
    if not ctx.objective.uses_bank:
        return None
    if ctx.queue is not None:
        return ctx.queue.bank(ctx.objective.temperature)
    return gathered_keys(ctx, branches)


def gathered_keys(ctx: Context, branches: Branches) -> Bank:
    """The keys of all ranks' images."""
    keys, ids = ctx.objective.bank_keys(branches)
    each = len(keys) // max(1, branches.num_samples)
    sizes = None if branches.sizes is None or not each else [each * size for size in branches.sizes]
    return Bank.gather(keys, ids, ctx.objective.temperature, sizes)


def enqueue(ctx: Context, branches: Branches) -> None:
    """MoCo v2: the keys of this step, from all ranks and with their ids, enter the queue after the loss is taken."""
    if ctx.queue is not None:
        gathered = gathered_keys(ctx, branches)
        ctx.queue.push(gathered.keys, gathered.ids)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(MethodConfig):
    """No settings of its own."""

    name: str = "finetune"


@dataclass(frozen=True, kw_only=True)
class RetrainConfig(MethodConfig):
    """No settings of its own."""

    name: str = "retrain"


class Training(Method[MethodConfig]):
    """Training on one stream of images, without a word about forgetting."""

    feeder: ClassVar[str] = "retain"
    needs = ("retain",)
    forgets = False

    def loss(self, ctx: Context, batches: Mapping[str, Batch]) -> StepOutput:
        batch = batches[self.feeder]
        value, branches = task_loss(ctx, batch)
        enqueue(ctx, branches)
        return StepOutput(loss=value, metrics={"task_loss": value.detach()}, consumed={self.feeder: batch.ids})


class Pretrain(Training):
    """Training of the original encoder on all members; not a method of forgetting."""

    name = "pretrain"
    Config = MethodConfig
    summary = report = "train on all members"
    guarantee = "none"
    begins = "scratch"
    steps = "pretrain"
    needs = ()  # type: ignore[assignment]
    feeder = "members"

    def batch_sizes(self) -> Mapping[str, int]:
        return {"members": self.cfg.pretrain.batch}


class TrainHeads(Pretrain):
    """Training of new heads on the backbone of a foreign checkpoint, without the images to forget."""

    report = "train new heads on the images that stay"
    feeder = "retain"

    def batch_sizes(self) -> Mapping[str, int]:
        return {"retain": self.cfg.pretrain.batch}


class Retrain(Training):
    """Training from scratch without the forget set, by the recipe of `pretrain`."""

    name = "retrain"
    Config = RetrainConfig
    summary = "train again from scratch without the forget samples"
    report = "training from the beginning without the forgotten images"
    guarantee = "exact"
    begins = "scratch"
    steps = "pretrain"

    def batch_sizes(self) -> Mapping[str, int]:
        return {"retain": self.cfg.pretrain.batch}


class Finetune(Training):
    """A few steps on the retain samples, from the original encoder."""

    name = "finetune"
    Config = FinetuneConfig
    moves = "little"
    summary = "a few more steps on the retain samples only"
    report = "fine-tuning on the retained images only (a reference, not a full method)"
    space: ClassVar[Space] = {"unlearn.lr": Log(5e-5, 5e-3)}
