"""`head`: the gradient of the head's last linear layer, in closed form (see `constraints/head.py`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distunlearn.constraints.evaluators.base import Constrained, Evaluator, Features, SketchedConfig
from distunlearn.constraints.gradients.last_layer import gradient_features, head_gradients, sketch_matrices
from distunlearn.data.schedule import Batch, concat_batches
from distunlearn.objectives.base import Branches
from distunlearn.objectives.forward import Context, embed
from distunlearn.objectives.memory_bank import Bank


@dataclass(frozen=True, kw_only=True)
class LastLayerConfig(SketchedConfig):
    """The sketch."""

    evaluator: str = "head"


class LastLayer(Evaluator[LastLayerConfig]):
    """Features (log norm, sketch), [n, 1 + k_out * k_in]: exact, first-order, no pass beside the forward itself."""

    name = "head"
    Config = LastLayerConfig
    summary = "log norm and sketch of the last linear layer's gradient, in closed form"

    def describe(self, ctx: Context, batch: Batch, bank: Bank | None, draw: int) -> tuple[Tensor, list[Branches]]:
        """See `Evaluator.describe`; the graph is that of the forward, if one is kept."""
        pairs = self._pairs(ctx, batch)
        return self._described(ctx, pairs, bank, draw), pairs

    def features(self, ctx: Context, forget: Batch, third: Batch, bank: Bank | None) -> Features:
        pairs = self._pairs(ctx, concat_batches(forget, third))  # one code path for both
        count = len(forget)
        forget_part, third_part = ([b.part(rows) for b in pairs] for rows in (slice(count), slice(count, None)))
        own, others = (self._described(ctx, part, bank, ctx.projection) for part in (forget_part, third_part))

        def pull(phi: Tensor, term: Tensor) -> Constrained:
            places = [place for b in forget_part for place in (b.output, b.hidden)]
            return Constrained(phi, term, forget_part, third_part, {}, places)

        return Features(own, others, pull)

    def _pairs(self, ctx: Context, batch: Batch) -> list[Branches]:
        return [embed(ctx, batch, batchnorm="eval", pair=pair) for pair in range(self.settings.view_pairs)]

    def _described(self, ctx: Context, pairs: list[Branches], bank: Bank | None, draw: int) -> Tensor:
        """The gradient of the loss averaged over pairs is one gradient over the branches of all pairs."""
        shape = self.settings
        deltas = [ctx.objective.per_sample_delta(b, bank) / len(pairs) for b in pairs]
        gradients = head_gradients(torch.cat([b.hidden for b in pairs]), torch.cat(deltas))
        out_matrix, in_matrix = sketch_matrices(
            ctx.cfg.seed, draw, deltas[0].shape[-1], pairs[0].hidden.shape[-1], shape.sketch_out, shape.sketch_in,
            device=gradients.delta.device, dtype=gradients.delta.dtype,
        )  # fmt: skip
        return gradient_features(gradients, out_matrix, in_matrix)
