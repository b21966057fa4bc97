"""held_out_distillation: the views of a forget image follow those of a similar image that was never trained on.

    L = L_utility(retain) + forget_weight * mean_{i in forget, views v} 1 - cos(h(v(x_i)), h_original(v(p_i)))

p_i is, among the third-party images of the global batch, the one that the original encoder finds most like x_i (cosine
of its mean embedding over the views). Both views follow, so that they also disagree as much as a stranger's views do.
Our reading, for encoders, of ReGUn (arXiv 2603.11210), of which the idea was at hand and not the formulas: held-out
data, as the original model treats them, are what forget data are distilled towards. Guarantee: empirical.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from distunlearn.config.schema import RunConfig
from distunlearn.data.schedule import Batch
from distunlearn.distributed.collectives import all_gather_uneven, all_reduce_mean
from distunlearn.methods.base import Stateless, StepOutput, unlearn_batches
from distunlearn.methods.embeddings import apart, directions, original_directions
from distunlearn.methods.training import enqueue, utility
from distunlearn.objectives.base import Objective
from distunlearn.objectives.forward import Context, image_mean
from distunlearn.objectives.memory_bank import normalise

__all__ = ["HeldOutDistillation", "followed"]


def followed(forget: Tensor, strangers: Tensor) -> Tensor:
    """For each image [V, n, E] the views [V, n, E] of the stranger [V, m, E] whose mean direction is nearest."""
    nearest = (normalise(forget.mean(0)) @ normalise(strangers.mean(0)).mT).argmax(1)
    return strangers[:, nearest]


class HeldOutDistillation(Stateless):
    """See the module's text."""

    name = "held_out_distillation"
    forgets = True

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg

    def batch_sizes(self, cfg: RunConfig) -> Mapping[str, int]:
        return unlearn_batches(cfg, "retain", "forget", "third_party")

    def images_per_step(self, cfg: RunConfig, objective: Objective, step: int) -> int:
        sizes, momentum = cfg.unlearn, 2 if objective.needs_momentum else 1
        return objective.branches * (momentum * sizes.retain_batch + 2 * sizes.forget_batch + sizes.third_party_batch)

    def loss(self, ctx: Context, batches: Mapping[str, Batch]) -> StepOutput:
        retain, forget, third = batches["retain"], batches["forget"], batches["third_party"]
        task, retained = utility(ctx, retain)
        strangers = all_gather_uneven(original_directions(ctx, third).transpose(0, 1)).transpose(0, 1)
        targets = followed(original_directions(ctx, forget), strangers)
        away = image_mean(apart(directions(ctx, forget), targets))
        enqueue(ctx, retained)
        metrics = {"utility": float(task.detach()), "target_distance": float(all_reduce_mean(away.detach()))}
        consumed = {"retain": retain.ids, "forget": forget.ids, "third_party": third.ids}
        return StepOutput(task + self.cfg.method.forget_weight * away, metrics, consumed)
