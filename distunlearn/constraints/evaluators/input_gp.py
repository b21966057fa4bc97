"""`input_gp`: a penalty on input gradients at interpolates of forgotten and third-party images.

    x_i = alpha_i f_i + (1 - alpha_i) t_i,     penalty = mean_i (|grad_x l(x_i)| - c)^2,    alpha_i ~ U(0, 1)

the form of WGAN-GP (Gulrajani et al., NeurIPS 2017, eq. 3) with the bank loss in place of the critic and c 1 or 0
(`constraint.center`). By all that is known Chen, Wang and Mi (Mathematics 12(24):4001, 2024) constrain gradients in
this way; only their abstract was at hand. l takes both views of an image; x_i and its gradient are those of all online
views. Third-party partners are drawn from the global batch. Targets of a momentum encoder are constants.

The gradient's length is differentiated along its own direction v_i, held (envelope theorem):
|grad l| ~ [l(x + rho v) - l(x - rho v)] / 2 rho, two first-order passes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distunlearn.common.device import on_device
from distunlearn.constraints.evaluators.base import (
    Constrained,
    Differences,
    DifferencesConfig,
    Features,
    grad_wanted,
    reuse_targets,
    shared,
    views_by_pair,
    without_graph,
)
from distunlearn.data.schedule import Batch, concat_batches, random_words
from distunlearn.distributed.collectives import all_gather_uneven, all_reduce_mean, gather_sizes, mean_scale
from distunlearn.objectives.base import Branches
from distunlearn.objectives.forward import Context, embed
from distunlearn.objectives.memory_bank import Bank


@dataclass(frozen=True, kw_only=True)
class InputGPConfig(DifferencesConfig):
    """The penalty and finite differences."""

    evaluator: str = "input_gp"
    center: Literal[0, 1] = 1  # gradient norm that the penalty pulls to


class InputGP(Differences[InputGPConfig]):
    """No features are compared: the term is the penalty itself, and third-party images take part in interpolates."""

    name = "input_gp"
    Config = InputGPConfig
    summary = "nothing: a penalty on input gradients at interpolates, by signed steps along each input gradient"
    steps = {"fp32": 1e-2, "bf16": 1e-1}  # length of a step in the space of all pixels of an image's views, in [-1, 1]

    def describe(self, ctx: Context, batch: Batch, bank: Bank | None, draw: int) -> tuple[None, list[Branches]]:
        """See `Evaluator.describe`: None, and branches by pair of views."""
        return None, [embed(ctx, batch, batchnorm="eval", pair=pair) for pair in range(self.settings.view_pairs)]

    def features(self, ctx: Context, forget: Batch, third: Batch, bank: Bank | None) -> Features:
        """See `Evaluator.features`: None, and what pulls is the penalty."""
        return Features(None, None, functools.partial(self._penalty, ctx, forget, third, bank))

    def _penalty(self, ctx: Context, forget: Batch, third: Batch, bank: Bank | None) -> Constrained:
        batch, count = concat_batches(forget, third), len(forget)
        viewed = views_by_pair(ctx, batch)
        pairs = [embed(ctx, batch, batchnorm="eval", views=views) for views in viewed]
        sizes = gather_sizes(count, ctx.device, forget.sizes)
        scale = mean_scale(sizes) / len(pairs)
        penalty = term = torch.zeros((), device=ctx.device)
        places: list[Tensor] = []
        wholes: list[Tensor] = []
        halves: list[Tensor] = []
        for pair in range(len(pairs)):
            views = self._interpolates(ctx, viewed[pair], count, pair, sum(sizes[: ctx.rank]), third.sizes)
            slopes, along, first = self._slopes(ctx, forget, bank, pair, views)
            excess = slopes - self.settings.center
            pulls = (
                2 * excess * self._differences(ctx, forget, bank, pair, views, along, first, self.rho, places=places)
            )
            penalty = penalty + scale * excess.square().sum()
            term = term + scale * pulls.sum()
            if self.check.due(ctx.step):
                with torch.no_grad():
                    half = self._differences(ctx, forget, bank, pair, views, along, first, self.rho / 2, ctx.first_pass)
                wholes.append(pulls)
                halves.append(2 * excess * half)
        metrics = self.check.compare(ctx, torch.cat(wholes), torch.cat(halves)) if wholes else {}
        phi = all_reduce_mean(penalty)
        forgotten, others = ([b.part(rows) for b in pairs] for rows in (slice(count), slice(count, None)))
        return Constrained(phi, term + (phi - term).detach(), forgotten, others, metrics, places)

    def _interpolates(
        self, ctx: Context, views: list[Tensor], count: int, pair: int, first: int, others: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Both views of every x_i, [n, C, S, S], from those of n = `count` forgotten images and of third-party images
        after them; `first` is this rank's first row in the global forget batch; `others`: the latter of every rank.

        Partners and alphas go by the row in the global batch, so that they do not depend on the number of ranks.
        """
        rows = torch.arange(first, first + count, device=ctx.device)
        words = random_words(first + count, "interpolate", ctx.cfg.seed, ctx.draw, pair)[first:]
        alpha = on_device((words >> 11) / 2.0**53, ctx.device)[:, None, None, None]
        mixed = []
        for view in views:
            own, partners = view[:count], all_gather_uneven(view[count:], others)
            share = alpha.to(own.dtype)
            mixed.append(share * own + (1 - share) * partners[rows % len(partners)])
        return mixed

    @grad_wanted
    def _slopes(
        self, ctx: Context, forget: Batch, bank: Bank | None, pair: int, views: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], Branches]:
        """|grad_x l_i| [n], its direction by view (0 for views without online branch), and the branches."""
        online = ctx.objective.branches
        leaves = [view.detach().requires_grad_() for view in views[:online]]
        shown = [*leaves, *views[online:]]
        branches = embed(ctx, forget, batchnorm="eval", views=shown, network=ctx.first_pass)
        total = ctx.objective.per_sample_loss(branches, bank).sum()
        gradients = torch.stack(torch.autograd.grad(total, leaves))
        slopes = gradients.square().sum((0, 2, 3, 4)).sqrt()
        unit = gradients / slopes.clamp_min(torch.finfo(slopes.dtype).tiny)[None, :, None, None, None]
        still = [torch.zeros_like(view) for view in views[online:]]
        return slopes, [*unit, *still], without_graph(branches)

    def _differences(
        self,
        ctx: Context,
        forget: Batch,
        bank: Bank | None,
        pair: int,
        views: list[Tensor],
        along: list[Tensor],
        first: Branches,
        rho: float,
        network: Callable | None = None,
        places: list[Tensor] | None = None,
    ) -> Tensor:
        """[l_i(x + rho v) - l_i(x - rho v)] / 2 rho, [n]; the outputs are added to `places`."""
        count = len(forget)
        signed = [torch.cat([x + rho * v, x - rho * v]) for x, v in zip(views, along, strict=True)]
        twice = torch.arange(count, device=ctx.device).repeat(2)
        with shared(ctx, count, 2 * count):
            twice_shown = concat_batches(forget, forget)
            shown = embed(ctx, twice_shown, batchnorm="eval", views=signed, network=network, momentum=False)
        shown = reuse_targets(shown, first, twice)
        if places is not None:
            places.append(shown.output)
        losses = ctx.objective.per_sample_loss(shown, bank)
        return (losses[:count] - losses[count:]) / (2 * rho)
