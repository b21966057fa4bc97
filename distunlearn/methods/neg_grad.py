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

from distunlearn.config.schema import RunConfig
from distunlearn.data.schedule import Batch
from distunlearn.distributed.collectives import all_reduce_mean, gather_sizes, mean_scale
from distunlearn.methods.base import Stateless, StepOutput, unlearn_batches
from distunlearn.methods.grad_ascent import require_bounded
from distunlearn.methods.mixed_batch import mixed_branches, row_losses
from distunlearn.methods.training import enqueue
from distunlearn.objectives.forward import Context, image_mean

__all__ = ["NegGrad"]


class NegGrad(Stateless):
    """See the module's text."""

    name = "neg_grad"
    forgets = True

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg

    def batch_sizes(self, cfg: RunConfig) -> Mapping[str, int]:
        return unlearn_batches(cfg, "retain", "forget")

    def loss(self, ctx: Context, batches: Mapping[str, Batch]) -> StepOutput:
        retain, forget = batches["retain"], batches["forget"]
        branches = mixed_branches(ctx, retain, forget)
        rows = row_losses(ctx, branches)
        kept, climbed = rows[: len(retain)], rows[len(retain) :]
        scale = mean_scale(gather_sizes(len(rows), rows.device))
        loss = (kept.sum() - self.cfg.method.ascent_weight * climbed.sum()) * scale
        level = float(all_reduce_mean(image_mean(climbed.detach())))
        require_bounded(ctx, self.name, level, self.cfg.method.ascent_bound)
        enqueue(ctx, branches.part(slice(0, len(retain))))
        metrics = {"utility": float(all_reduce_mean(image_mean(kept.detach()))), "forget_loss": level}
        return StepOutput(loss, metrics, {"retain": retain.ids, "forget": forget.ids})
