"""scrub: obey the original encoder on retain images and disobey it on forget images.

    first max_share of the steps   L = L_utility(retain) + retain_weight * d(retain) - forget_weight * d(forget)
    after them                     L = L_utility(retain) + retain_weight * d(retain)
    d(X) = mean over images and views of 1 - cos(h(x), h_original(x))

Our reading of Kurmanji, Triantafillou, Hayes and Triantafillou, "Towards Unbounded Machine Unlearning", NeurIPS 2023
(eq. 3 and the max and min steps after it) for encoders: their divergence of class probabilities becomes a cosine
distance of embeddings, which is bounded; their max and min steps, which alternate, are one gradient here; as with them,
the last part of the training is min steps alone. Guarantee: empirical.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from distunlearn.config.schema import RunConfig
from distunlearn.data.schedule import Batch
from distunlearn.distributed.collectives import all_reduce_mean
from distunlearn.methods.base import Stateless, StepOutput, unlearn_batches
from distunlearn.methods.embeddings import apart, directions, original_directions
from distunlearn.methods.training import enqueue, utility
from distunlearn.objectives.base import Objective
from distunlearn.objectives.forward import Context, image_mean

__all__ = ["Scrub"]


class Scrub(Stateless):
    """See the module's text."""

    name = "scrub"
    forgets = True

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg

    def batch_sizes(self, cfg: RunConfig) -> Mapping[str, int]:
        return unlearn_batches(cfg, "retain", "forget")

    def forget_steps(self, cfg: RunConfig) -> int:
        """Steps of the first phase."""
        return math.ceil(cfg.method.max_share * cfg.unlearn.steps)

    def images_per_step(self, cfg: RunConfig, objective: Objective, step: int) -> int:
        retain, online = cfg.unlearn.retain_batch, objective.branches
        images = retain * online * (2 if objective.needs_momentum else 1) + 2 * online * retain
        return images + (2 * online * cfg.unlearn.forget_batch if step < self.forget_steps(cfg) else 0)

    def loss(self, ctx: Context, batches: Mapping[str, Batch]) -> StepOutput:
        weights, retain, forget = self.cfg.method, batches["retain"], batches["forget"]
        task, retained = utility(ctx, retain)
        kept = image_mean(apart(directions(ctx, retain), original_directions(ctx, retain)))
        loss = task + weights.retain_weight * kept
        metrics = {"utility": float(task.detach()), "retain_distance": float(all_reduce_mean(kept.detach()))}
        consumed = {"retain": retain.ids, "forget": []}
        if ctx.step < self.forget_steps(self.cfg):
            left = image_mean(apart(directions(ctx, forget), original_directions(ctx, forget)))
            loss = loss - weights.forget_weight * left
            metrics["forget_distance"] = float(all_reduce_mean(left.detach()))
            consumed["forget"] = forget.ids
        enqueue(ctx, retained)
        return StepOutput(loss, metrics, consumed)
