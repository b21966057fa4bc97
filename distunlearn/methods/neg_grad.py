"""neg_grad: descend on the retain images and ascend on the forget images of one batch.

    L = ( sum_{r in retain} l_r - w sum_{i in forget} l_i ) / (R + F)

l is the encoder's own loss in one batch of R retain and F forget images, w = ascent_weight. Source: NegGrad (Golatkar,
Achille and Soatto, "Eternal Sunshine of the Spotless Net", CVPR 2020) with a retain term, known as NegGrad+ (Kurmanji
et al., "Towards Unbounded Machine Unlearning", NeurIPS 2023), in the form for contrastive losses of Wang et al., TMLR
2025 (arXiv 2406.03603). There the retain images include held-out ones; here roles are disjoint. The loss has no lower
bound: `ascent_bound` stops a run that diverges. Guarantee: empirical.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from distunlearn.data.schedule import Batch
from distunlearn.distributed.collectives import all_reduce_mean, mean_scale
from distunlearn.methods.base import Method, StepOutput
from distunlearn.methods.grad_ascent import GradAscentConfig, require_bounded
from distunlearn.methods.mixed_batch import mixed_branches, row_losses
from distunlearn.methods.search_space import Log
from distunlearn.methods.training import enqueue
from distunlearn.objectives.forward import Context, image_mean


@dataclass(frozen=True, kw_only=True)
class NegGradConfig(GradAscentConfig):
    """The climb and where it ends."""

    name: str = "neg_grad"


class NegGrad(Method[NegGradConfig]):
    """See the module's text."""

    name = "neg_grad"
    Config = NegGradConfig
    moves = "unevenly"
    summary = "descend on the retain samples, climb on the forget samples"
    report = "learning the retained images while unlearning the forgotten ones by the same loss turned round"
    space = {"unlearn.lr": Log(5e-5, 5e-3), "method.ascent_weight": Log(0.01, 1.0)}

    def loss(self, ctx: Context, batches: Mapping[str, Batch]) -> StepOutput:
        retain, forget = batches["retain"], batches["forget"]
        branches = mixed_branches(ctx, retain, forget)
        rows = row_losses(ctx, branches)
        kept, climbed = rows[: len(retain)], rows[len(retain) :]
        loss = (kept.sum() - self.settings.ascent_weight * climbed.sum()) * mean_scale(branches.shares)
        task = all_reduce_mean(image_mean(kept.detach(), retain.sizes))
        level = float(all_reduce_mean(image_mean(climbed.detach(), forget.sizes)))
        require_bounded(ctx, self.name, level, self.settings.ascent_bound)
        enqueue(ctx, branches.part(slice(0, len(retain)))._replace(sizes=retain.sizes))
        metrics: dict[str, float | Tensor] = {"task_loss": task, "forget_loss": level}
        return StepOutput(loss, metrics, {"retain": retain.ids, "forget": forget.ids})
