"""scrub: obey the original encoder on retain images and disobey it on forget images.

    first max_share of the steps   L = L_task(retain) + retain_weight * d(retain) - forget_weight * d(forget)
    after them                     L = L_task(retain) + retain_weight * d(retain)
    d(X) = mean over images and views of 1 - cos(h(x), h_original(x))

Our reading of Kurmanji, Triantafillou, Hayes and Triantafillou, "Towards Unbounded Machine Unlearning", NeurIPS 2023
(eq. 3 and the max and min steps after it) for encoders: their divergence of class probabilities becomes a cosine
distance of embeddings, which is bounded; their max and min steps, which alternate, are one gradient here; as with them,
the last part of the training is min steps alone. Guarantee: empirical.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from distunlearn.config.schema import MethodConfig, NonNegativeFloat, PartShare
from distunlearn.data.schedule import Batch
from distunlearn.distributed.collectives import all_reduce_mean
from distunlearn.methods.base import Method, StepOutput
from distunlearn.methods.embeddings import apart, directions, original_directions
from distunlearn.methods.search_space import Choice, Log
from distunlearn.methods.training import enqueue, task_loss
from distunlearn.objectives.forward import Context, image_mean


@dataclass(frozen=True, kw_only=True)
class ScrubConfig(MethodConfig):
    """Weights, and the length of the first part."""

    name: str = "scrub"
    forget_weight: NonNegativeFloat = 1.0  # of the distance to the original encoder on forget images
    retain_weight: NonNegativeFloat = 1.0  # of the distance to the original encoder on retain images
    max_share: PartShare = 0.5  # share of the steps that push forget images away


class Scrub(Method[ScrubConfig]):
    """See the module's text."""

    name = "scrub"
    Config = ScrubConfig
    moves = "little"
    summary = "obey the original encoder on retain, disobey it on forget samples"
    report = "disagreeing with the original encoder on the forgotten images and agreeing with it on the retained ones"
    needs = ("retain", "forget", "teacher")
    space = {
        "unlearn.lr": Log(5e-5, 5e-3),
        "method.forget_weight": Log(0.1, 10.0),
        "method.retain_weight": Log(0.1, 10.0),
        "method.max_share": Choice((0.25, 0.5, 0.75)),
    }

    def forget_steps(self) -> int:
        """Steps of the first phase."""
        return math.ceil(self.settings.max_share * self.cfg.unlearn.steps)

    def loss(self, ctx: Context, batches: Mapping[str, Batch]) -> StepOutput:
        weights, retain, forget = self.settings, batches["retain"], batches["forget"]
        task, retained = task_loss(ctx, retain)
        kept = image_mean(apart(directions(ctx, retain), original_directions(ctx, retain)), retain.sizes)
        loss = task + weights.retain_weight * kept
        metrics = {"task_loss": task.detach(), "retain_distance": all_reduce_mean(kept.detach())}
        consumed = {"retain": retain.ids, "forget": []}
        if ctx.step < self.forget_steps():
            left = image_mean(apart(directions(ctx, forget), original_directions(ctx, forget)), forget.sizes)
            loss = loss - weights.forget_weight * left
            metrics["forget_distance"] = all_reduce_mean(left.detach())
            consumed["forget"] = forget.ids
        enqueue(ctx, retained)
        return StepOutput(loss, metrics, consumed)
