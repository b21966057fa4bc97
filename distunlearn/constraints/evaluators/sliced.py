"""`sliced`: one random direction of weight space per step, in which gradients are compared as numbers.

    s_i = [l_i(+rho U) - l_i(-rho U)] / 2 rho  =  <U, S_i> + O(rho^2)

with one U for all samples, drawn anew each step (see `constraints/probes.py`). Values and gradients come from the same
forward, so that Phi of the s_i is an ordinary loss. Distributions that agree in every direction agree (Cramer and
Wold, 1936); over the steps, A, B and U take many. Third-party images, which Phi does not move, are shown without graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distunlearn.common.random import generator_of
from distunlearn.config.schema import RunConfig
from distunlearn.constraints.evaluators.base import (
    CALIBRATION_CHUNK,
    Constrained,
    Differences,
    DifferencesConfig,
    Features,
    joined,
    mean_loss,
    reuse_targets,
    shared,
    signed_copies,
)
from distunlearn.constraints.evaluators.sketch import ProbesConfig, draw_probes
from distunlearn.constraints.gradients.probes import ProbeSet
from distunlearn.data.schedule import Batch, concat_batches
from distunlearn.objectives.base import Branches
from distunlearn.objectives.forward import Context, embed
from distunlearn.objectives.memory_bank import Bank


def direction(probes: ProbeSet, seed: int, draw: int) -> list[Tensor]:
    """U: a random core [1, k_out, k_in] per layer, of norm 1 all together; a pure function of (seed, draw)."""
    drawn = generator_of("sliced", seed, draw).standard_normal(probes.shape)
    whole = torch.from_numpy(drawn / np.linalg.norm(drawn)).to(probes.ins[0])
    return list(whole[:, None])


@dataclass(frozen=True, kw_only=True)
class SlicedConfig(ProbesConfig, DifferencesConfig):
    """Probes and finite differences."""

    evaluator: str = "sliced"


class Sliced(Differences[SlicedConfig]):
    """Features s_i, [n, 1]; not with precision=bf16: Phi of numbers goes by their order, which rounding changes."""

    name = "sliced"
    Config = SlicedConfig
    summary = "gradients as numbers in one random direction per step, by signed probes on all images"
    steps = {"fp32": 3e-3}

    @classmethod
    def problems(cls, cfg: RunConfig) -> Iterator[str]:
        if cfg.precision not in cls.steps:
            yield (
                "constraint.evaluator=sliced compares gradients as single numbers, whose order the rounding of "
                f"precision={cfg.precision} changes; set constraint.evaluator=sketch, or precision=fp32"
            )

    def describe(self, ctx: Context, batch: Batch, bank: Bank | None, draw: int) -> tuple[Tensor, list[Branches]]:
        """See `Evaluator.describe`; without graph, and a part of the batch at a time."""
        probes, found = draw_probes(self.settings, ctx, draw), []
        core = direction(probes, ctx.cfg.seed, draw)
        for start in range(0, len(batch), CALIBRATION_CHUNK):
            piece = batch.part(slice(start, start + CALIBRATION_CHUNK))
            with torch.no_grad():
                shown = self._shown(ctx, piece, len(piece), probes, core, self.rho)
                values, both = self._values(ctx, shown, len(piece), bank, self.rho)
            found.append((values[:, None], both))
        return torch.cat([f for f, _ in found]), [joined(parts) for parts in zip(*(p for _, p in found), strict=True)]

    def features(self, ctx: Context, forget: Batch, third: Batch, bank: Bank | None) -> Features:
        count, probes = len(forget), draw_probes(self.settings, ctx, ctx.projection)
        core = direction(probes, ctx.cfg.seed, ctx.projection)
        shown = self._shown(ctx, concat_batches(forget, third), count, probes, core, self.rho)
        values, both = self._values(ctx, shown, count, bank, self.rho)
        strangers = [b.part(slice(2 * count, None)) for b in shown]
        with torch.no_grad():
            still = self._shown(ctx, third, len(third), probes, core, self.rho, strangers)
            others, _ = self._values(ctx, still, len(third), bank, self.rho)

        def pull(phi: Tensor, term: Tensor) -> Constrained:
            metrics = {}
            if self.check.due(ctx.step):
                with torch.no_grad():
                    first = both[: len(shown)]
                    again = self._shown(ctx, forget, count, probes, core, self.rho / 2, first)
                    half, _ = self._values(ctx, again, count, bank, self.rho / 2)
                metrics = self.check.compare(ctx, values, half)
            return Constrained(phi, term, both, strangers, metrics, [values])

        return Features(values[:, None], others[:, None], pull)

    def _shown(
        self,
        ctx: Context,
        batch: Batch,
        count: int,
        probes: ProbeSet,
        core: list[Tensor],
        rho: float,
        targets: list[Branches] | None = None,
    ) -> list[Branches]:
        """Signed copies of the first `count` images, then the others, by pair of views.

        targets: branches of the same images, whose momentum targets are taken over; None: they are computed.
        """
        copies, signs = signed_copies(count, len(batch), ctx.device)
        branches = ctx.objective.branches
        rows = torch.zeros_like(copies).repeat(branches)
        moved = [rho * part for part in core]
        with probes.armed(moved, rows, signs * branches), shared(ctx, count, len(copies)):
            shown = [
                embed(ctx, batch, batchnorm="eval", pair=pair, copies=copies, momentum=targets is None)
                for pair in range(self.settings.view_pairs)
            ]
        if targets is None:
            return shown
        return [reuse_targets(b, first, copies) for b, first in zip(shown, targets, strict=True)]

    @staticmethod
    def _values(
        ctx: Context, shown: list[Branches], count: int, bank: Bank | None, rho: float
    ) -> tuple[Tensor, list[Branches]]:
        """s_i of the first `count` images, [count], and both copies of them: all with +, then all with -."""
        plus, minus = ([b.part(part) for b in shown] for part in (slice(count), slice(count, 2 * count)))
        return (mean_loss(ctx, plus, bank) - mean_loss(ctx, minus, bank)) / (2 * rho), plus + minus
