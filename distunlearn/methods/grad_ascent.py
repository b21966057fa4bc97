"""grad_ascent: climb the loss of the forgotten images.

    L = -ascent_weight * mean_i l_i,   i in forget

l_i is the bank loss against retain keys, so that the result does not depend on batch mates. Source:
gradient ascent as an unlearning baseline, e.g. Graves, Nagisetty and Ganesh, "Amnesiac Machine Learning",
AAAI 2021, and Thudi et al., "Unrolling SGD", EuroS&P 2022. Nothing holds the encoder's accuracy, and the
loss has no lower bound: `ascent_bound` stops a run that diverges. Guarantee: empirical, usually poor.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from distunlearn.config.schema import RunConfig
from distunlearn.data.schedule import Batch
from distunlearn.distributed.collectives import all_reduce_mean
from distunlearn.errors import NumericsError
from distunlearn.methods.base import Stateless, StepOutput, unlearn_batches
from distunlearn.methods.training import retain_bank
from distunlearn.objectives.forward import Context, embed, image_mean

__all__ = ["GradAscent", "require_bounded"]


def require_bounded(ctx: Context, name: str, level: float, bound: float) -> None:
    """Raises NumericsError where the forget loss, which ascent drives up without end, passes method.ascent_bound."""
    if level > bound:
        raise NumericsError(
            f"{name}: the forget loss reached {level:.3g} at step {ctx.step}, above method.ascent_bound = "
            f"{bound:g}; lower unlearn.lr or unlearn.steps."
        )


class GradAscent(Stateless):
    """Baseline; see the module's text."""

    name = "grad_ascent"
    forgets = True

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg

    def batch_sizes(self, cfg: RunConfig) -> Mapping[str, int]:
        return unlearn_batches(cfg, "retain", "forget")

    def loss(self, ctx: Context, batches: Mapping[str, Batch]) -> StepOutput:
        retain, forget = batches["retain"], batches["forget"]
        bank = None
        if ctx.objective.uses_bank:
            with torch.no_grad():  # retain images are only the negatives here: they enter no loss
                bank = retain_bank(ctx, embed(ctx, retain, batchnorm="eval"))
        branches = embed(ctx, forget, batchnorm="eval")
        losses = ctx.objective.per_sample_loss(branches, bank)
        known = image_mean(losses)
        level = float(all_reduce_mean(known.detach()))
        require_bounded(ctx, self.name, level, self.cfg.method.ascent_bound)
        loss = -self.cfg.method.ascent_weight * known
        return StepOutput(loss, {"forget_loss": level}, {"forget": forget.ids})
