"""`ghost_norm`: the exact norm of every sample's gradient over the weights of the whole network.

A first pass gives the norms n_i (see `constraints/ghost.py`). Phi compares the ln n_i; with w_i = dPhi / d n_i, the
second pass shows every forgotten image with the weights moved by +rho and by -rho along its own gradient, and
sum_i w_i [l_i(+) - l_i(-)] / 2 rho has the gradient of Phi up to O(rho^2).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from distunlearn.constraints.evaluators.base import (
    CALIBRATION_CHUNK,
    Constrained,
    Differences,
    DifferencesConfig,
    Features,
    LayersConfig,
    grad_wanted,
    joined,
    mean_loss,
    unused_layer,
    views_by_pair,
    without_graph,
)
from distunlearn.constraints.evaluators.two_passes import (
    Measured,
    constrained,
    first_pass,
    second_pass,
)
from distunlearn.constraints.gradients.ghost_norms import GhostGradients, Recorder
from distunlearn.constraints.gradients.last_layer import NORM_FLOOR
from distunlearn.constraints.gradients.layers import followed_layers
from distunlearn.data.schedule import Batch
from distunlearn.objectives.base import Branches
from distunlearn.objectives.forward import Context, embed
from distunlearn.objectives.memory_bank import Bank


@dataclass(frozen=True, kw_only=True)
class GhostNormConfig(LayersConfig, DifferencesConfig):
    """Layers and finite differences."""

    evaluator: str = "ghost_norm"


class GhostNorm(Differences[GhostNormConfig]):
    """Features ln max(n_i, floor), [n, 1]."""

    name = "ghost_norm"
    Config = GhostNormConfig
    summary = "log norm of the gradient of many layers' weights, by signed steps along each own gradient"
    steps = {"fp32": 5e-4, "bf16": 6e-3}  # length of a step in the space of all weights

    def describe(self, ctx: Context, batch: Batch, bank: Bank | None, draw: int) -> tuple[Tensor, list[Branches]]:
        """See `Evaluator.describe`; without graph, and a part of the batch at a time."""
        found = []
        for start in range(0, len(batch), CALIBRATION_CHUNK):
            piece = batch.part(slice(start, start + CALIBRATION_CHUNK))
            gradients, pairs = self._gradients(ctx, piece, bank, views_by_pair(ctx, piece), kept=0)
            found.append((_describe(gradients.norm()), [without_graph(b) for b in pairs]))
        return torch.cat([f for f, _ in found]), [joined(parts) for parts in zip(*(p for _, p in found), strict=True)]

    def features(self, ctx: Context, forget: Batch, third: Batch, bank: Bank | None) -> Features:

        def measure(batch: Batch, viewed: list[list[Tensor]], lasting: bool) -> Measured:
            kept = 0 if lasting else len(forget)  # of third-party images only norms are needed
            gradients, pairs = self._gradients(ctx, batch, bank, viewed, kept, lasting)
            return Measured(gradients.norm(), gradients, pairs)

        first = first_pass(ctx, forget, third, measure, self.shown_once(len(forget), len(third)))
        leaf = first.own.detach().requires_grad_()

        def differences(weight: Tensor, rho: float, network=None) -> tuple[Tensor, list[Branches], list[Branches]]:
            """w_i [l_i(+) - l_i(-)] / 2 rho of this rank's samples, and what signed copies and third-party gave."""
            steps = rho / first.own.clamp_min(NORM_FLOOR)

            def added(copies: Tensor, signs: tuple[float, ...]) -> AbstractContextManager[None]:
                return first.kept.armed(signs * ctx.objective.branches, steps)

            difference, both, strangers = second_pass(ctx, first, bank, added, network)
            return weight * difference / (2 * rho), both, strangers

        def pull(phi: Tensor, goal: Tensor) -> Constrained:
            (weight,) = torch.autograd.grad(goal, leaf)
            pulls, both, strangers = differences(weight, self.rho)
            metrics = {}
            if self.check.due(ctx.step):
                with torch.no_grad():
                    half, *_ = differences(weight, self.rho / 2, ctx.first_pass)
                metrics = self.check.compare(ctx, pulls, half)
            return constrained(phi, goal, pulls, both, strangers, metrics)

        return Features(_describe(leaf), _describe(first.others), pull)

    @grad_wanted
    def _gradients(
        self,
        ctx: Context,
        batch: Batch,
        bank: Bank | None,
        viewed: list[list[Tensor]],
        kept: int,
        lasting: bool = False,
    ) -> tuple[GhostGradients, list[Branches]]:
        """Gradients of a batch: norms of all samples, factors of the first `kept`; and the branches, whose graph is
        used up if it is not `lasting`.
        """
        layers = followed_layers(ctx.model, ctx.first_pass, self.settings.layers, note=ctx.note)
        recorder = Recorder(layers, len(batch) * ctx.objective.branches)
        with recorder.recording():
            pairs = [embed(ctx, batch, batchnorm="eval", views=views, network=ctx.first_pass) for views in viewed]
        total = mean_loss(ctx, pairs, bank).sum()
        try:
            gradients = recorder.gradients(total, len(batch), kept, lasting=lasting)
        except KeyError as error:
            raise unused_layer(error.args[0]) from error
        return gradients, pairs


def _describe(norms: Tensor) -> Tensor:
    return norms.clamp_min(NORM_FLOOR).log()[:, None]
