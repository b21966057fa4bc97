"""grad_ascent: climb the loss of the forgotten images.

    L = -ascent_weight * mean_i l_i,   i in forget

l_i is the bank loss against retain keys, so that the result does not depend on batch mates. Source:
gradient ascent as an unlearning baseline, e.g. Graves, Nagisetty and Ganesh, "Amnesiac Machine Learning",
AAAI 2021, and Thudi et al., "Unrolling SGD", EuroS&P 2022. Nothing holds the encoder's accuracy, and the
loss has no lower bound: `ascent_bound` stops a run that diverges. Guarantee: empirical, usually poor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from distunlearn.config.schema import MethodConfig, NonNegativeFloat, PositiveFloat
from distunlearn.data.schedule import Batch
from distunlearn.distributed.collectives import all_reduce_mean
from distunlearn.errors import NumericsError
from distunlearn.methods.base import Method, StepOutput
from distunlearn.methods.search_space import Log
from distunlearn.methods.training import retain_bank
from distunlearn.objectives.forward import Context, embed, image_mean


def require_bounded(ctx: Context, name: str, level: float, bound: float, key: str = "ascent_bound") -> None:
    """Raises NumericsError where the forget loss, which ascent drives up without end, passes `bound`, that of `key`."""
    if level > bound:
        raise NumericsError(
            f"{name}: the forget loss reached {level:.3g} at step {ctx.step}, above method.{key} = "
            f"{bound:g}; lower unlearn.lr or unlearn.steps."
        )


@dataclass(frozen=True, kw_only=True)
class GradAscentConfig(MethodConfig):
    """The climb and where it ends."""

    name: str = "grad_ascent"
    ascent_weight: NonNegativeFloat = 1.0  # of the forget loss that is climbed
    ascent_bound: PositiveFloat = 50.0  # stop (exit 4) when that loss passes this


class GradAscent(Method[GradAscentConfig]):
    """Baseline; see the module's text."""

    name = "grad_ascent"
    Config = GradAscentConfig
    moves = "far"
    summary = "climb the loss of the forget samples"
    report = "gradient ascent on the forgotten images (a reference, not a full method)"
    space = {"unlearn.lr": Log(1e-6, 1e-3)}

    def loss(self, ctx: Context, batches: Mapping[str, Batch]) -> StepOutput:
        retain, forget = batches["retain"], batches["forget"]
        bank = None
        if ctx.objective.uses_bank:
            with torch.no_grad():  # retain images are only the negatives here: they enter no loss
                bank = retain_bank(ctx, embed(ctx, retain, batchnorm="eval"))
        branches = embed(ctx, forget, batchnorm="eval")
        losses = ctx.objective.per_sample_loss(branches, bank)
        known = image_mean(losses, forget.sizes)
        level = float(all_reduce_mean(known.detach()))
        require_bounded(ctx, self.name, level, self.settings.ascent_bound)
        loss = -self.settings.ascent_weight * known
        return StepOutput(loss, {"forget_loss": level}, {"forget": forget.ids})
