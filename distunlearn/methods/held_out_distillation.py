"""held_out_distillation: the views of a forget image follow those of a similar image that was never trained on.

    L = L_task(retain) + forget_weight * mean_{i in forget, views v} 1 - cos(h(v(x_i)), h_original(v(p_i)))

p_i is, among the third-party images of the global batch, the one that the original encoder finds most like x_i (cosine
of its mean embedding over the views). Both views follow, so that they also disagree as much as a stranger's views do.
Our reading, for encoders, of ReGUn (arXiv 2603.11210), of which the idea was at hand and not the formulas: held-out
data, as the original model treats them, are what forget data are distilled towards. Guarantee: empirical.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from distunlearn.config.schema import MethodConfig, NonNegativeFloat
from distunlearn.data.schedule import Batch
from distunlearn.distributed.collectives import all_gather_uneven, all_reduce_mean
from distunlearn.methods.base import Method, StepOutput
from distunlearn.methods.embeddings import apart, directions, original_directions
from distunlearn.methods.search_space import Log
from distunlearn.methods.training import enqueue, task_loss
from distunlearn.objectives.forward import Context, image_mean
from distunlearn.objectives.memory_bank import normalise


def followed(forget: Tensor, strangers: Tensor) -> Tensor:
    """For each image [V, n, E] the views [V, n, E] of the stranger [V, m, E] whose mean direction is nearest."""
    nearest = (normalise(forget.mean(0)) @ normalise(strangers.mean(0)).mT).argmax(1)
    return strangers[:, nearest]


@dataclass(frozen=True, kw_only=True)
class HeldOutDistillationConfig(MethodConfig):
    """One weight."""

    name: str = "held_out_distillation"
    forget_weight: NonNegativeFloat = 1.0  # of the forget term


class HeldOutDistillation(Method[HeldOutDistillationConfig]):
    """See the module's text."""

    name = "held_out_distillation"
    Config = HeldOutDistillationConfig
    moves = "little"
    summary = "views of forget samples follow those of similar images that were never trained on"
    report = "treating each forgotten image as the original encoder treats a similar one it never saw"
    needs = ("retain", "forget", "third_party", "teacher")
    space = {"unlearn.lr": Log(5e-5, 5e-3), "method.forget_weight": Log(0.1, 10.0)}

    def loss(self, ctx: Context, batches: Mapping[str, Batch]) -> StepOutput:
        retain, forget, third = batches["retain"], batches["forget"], batches["third_party"]
        task, retained = task_loss(ctx, retain)
        strangers = all_gather_uneven(original_directions(ctx, third).transpose(0, 1), third.sizes).transpose(0, 1)
        targets = followed(original_directions(ctx, forget), strangers)
        away = image_mean(apart(directions(ctx, forget), targets), forget.sizes)
        enqueue(ctx, retained)
        metrics = {"task_loss": task.detach(), "target_distance": all_reduce_mean(away.detach())}
        consumed = {"retain": retain.ids, "forget": forget.ids, "third_party": third.ids}
        return StepOutput(task + self.settings.forget_weight * away, metrics, consumed)
