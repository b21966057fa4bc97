"""`sketch` and `double_backward`: sketches of the gradients of many layers, through probes.

`sketch` takes two first-order passes. The first one finds the sketches S_i as gradients of zero cores; Phi and its
derivative V_i = dPhi/dS_i follow from their values. The second one shows every forgotten image twice, with +e V_i and
-e V_i added to the activations (see `constraints/probes.py` and `two_passes.py`), and

    sum_i [l_i(+e_i V_i) - l_i(-e_i V_i)] / 2 e_i,    e_i = rho / |V_i|,

has the gradient of sum_i <V_i, S_i>, hence of Phi, up to O(rho^2). Third-party images get no gradient from Phi and
therefore no copies. `double_backward` differentiates the first pass itself: exact, the reference that the other is
measured by, and impossible where weights are sharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distunlearn.config.checks import SHARDED
from distunlearn.config.schema import RunConfig
from distunlearn.constraints.evaluators.base import (
    CALIBRATION_CHUNK,
    Constrained,
    Differences,
    DifferencesConfig,
    Evaluator,
    Features,
    LayersConfig,
    SketchedConfig,
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
from distunlearn.constraints.gradients.last_layer import NORM_FLOOR
from distunlearn.constraints.gradients.layers import followed_layers
from distunlearn.constraints.gradients.probes import ProbeSet
from distunlearn.data.schedule import Batch, concat_batches
from distunlearn.objectives.base import Branches
from distunlearn.objectives.forward import Context, embed
from distunlearn.objectives.memory_bank import Bank


def draw_probes(settings: ProbesConfig, ctx: Context, draw: int) -> ProbeSet:
    """The probes of one step on the layers that the settings choose.

    Raises:
        ConfigError: see `followed_layers`.
    """
    layers = followed_layers(ctx.model, ctx.first_pass, settings.layers, note=ctx.note)
    dtype = next(ctx.model.parameters()).dtype
    sizes = (settings.sketch_out, settings.sketch_in)
    return ProbeSet(layers, *sizes, ctx.cfg.seed, draw, device=ctx.device, dtype=dtype)


def describe(sketches: Tensor) -> Tensor:
    """(ln max(|S_i|, floor), S_i): [n, L, k_out, k_in] -> [n, 1 + L * k_out * k_in]."""
    flat = sketches.flatten(1)
    log_norm = 0.5 * flat.square().sum(1, keepdim=True).clamp_min(NORM_FLOOR * NORM_FLOOR).log()
    return torch.cat([log_norm, flat], dim=1)


@dataclass(frozen=True, kw_only=True)
class ProbesConfig(SketchedConfig, LayersConfig):
    """Which layers are probed, and their sketches."""


@dataclass(frozen=True, kw_only=True)
class SketchConfig(ProbesConfig, DifferencesConfig):
    """Probes and finite differences."""

    evaluator: str = "sketch"


@dataclass(frozen=True, kw_only=True)
class DoubleBackwardConfig(ProbesConfig):
    """Probes."""

    evaluator: str = "double_backward"


class _Probing(Evaluator[ProbesConfig]):
    """The first pass: sketches of all samples of a batch."""

    def describe(self, ctx: Context, batch: Batch, bank: Bank | None, draw: int) -> tuple[Tensor, list[Branches]]:
        """See `Evaluator.describe`; without graph, and a part of the batch at a time."""
        probes, found = draw_probes(self.settings, ctx, draw), []
        for start in range(0, len(batch), CALIBRATION_CHUNK):
            piece = batch.part(slice(start, start + CALIBRATION_CHUNK))
            sketches, pairs = self._sketches(ctx, piece, bank, probes, views_by_pair(ctx, piece))
            found.append((describe(sketches), [without_graph(b) for b in pairs]))
        return torch.cat([f for f, _ in found]), [joined(parts) for parts in zip(*(p for _, p in found), strict=True)]

    @grad_wanted
    def _sketches(
        self,
        ctx: Context,
        batch: Batch,
        bank: Bank | None,
        probes: ProbeSet,
        viewed: list[list[Tensor]],
        exact: bool = False,
        lasting: bool = False,
    ) -> tuple[Tensor, list[Branches]]:
        """S [n, L, k_out, k_in] and the branches they come from; with a graph of second order if `exact`, one for
        another backward if `lasting`.
        """
        leaves = probes.leaves(len(batch))
        rows = torch.arange(len(batch), device=ctx.device).repeat(ctx.objective.branches)
        attention = sdpa_kernel(SDPBackend.MATH) if exact else nullcontext()  # fused kernels differentiate once
        network = ctx.forward if exact else ctx.first_pass  # what the optimizer sees, or not
        with probes.listening(leaves, rows, twice=exact), attention:
            pairs = [embed(ctx, batch, batchnorm="eval", views=views, network=network) for views in viewed]
            total = mean_loss(ctx, pairs, bank).sum()
            sketches = torch.autograd.grad(
                total, leaves, retain_graph=exact or lasting, create_graph=exact, allow_unused=True
            )
        for name, sketch in zip(probes.layers, sketches, strict=True):
            if sketch is None:
                raise unused_layer(name)
        return torch.stack(sketches, dim=1), pairs


class Sketch(_Probing, Differences):
    """Features (log |S|, S) over the chosen layers, differentiated by signed copies of the forgotten images."""

    name = "sketch"
    Config = SketchConfig
    summary = "log norm and sketches of many layers' gradients, by signed probes on forgotten images"
    steps = {"fp32": 5e-4, "bf16": 7e-3}

    def features(self, ctx: Context, forget: Batch, third: Batch, bank: Bank | None) -> Features:
        probes = draw_probes(self.settings, ctx, ctx.projection)

        def measure(batch: Batch, viewed: list[list[Tensor]], lasting: bool) -> Measured:
            sketches, pairs = self._sketches(ctx, batch, bank, probes, viewed, lasting=lasting)
            return Measured(sketches, None, pairs)

        first = first_pass(ctx, forget, third, measure, self.shown_once(len(forget), len(third)))
        leaf = first.own.detach().requires_grad_()

        def differences(size: Tensor, unit: Tensor, rho: float, network=None) -> tuple[Tensor, list, list]:
            """e_i <V_i, S_i> / rho of this rank's samples, and what the signed copies and third-party gave."""

            def added(copies: Tensor, signs: tuple[float, ...]) -> AbstractContextManager[None]:
                branches = ctx.objective.branches
                rows = copies.clamp_max(first.count - 1).repeat(branches)  # third-party: any core, its sign is 0
                return probes.armed((rho * unit).unbind(1), rows, signs * branches)

            difference, both, strangers = second_pass(ctx, first, bank, added, network)
            return size * difference / (2 * rho), both, strangers

        def pull(phi: Tensor, goal: Tensor) -> Constrained:
            (cotangent,) = torch.autograd.grad(goal, leaf)
            size = cotangent.flatten(1).norm(dim=1)
            unit = cotangent / size.clamp_min(torch.finfo(size.dtype).tiny)[:, None, None, None]
            pulls, both, strangers = differences(size, unit, self.rho)
            metrics = {}
            if self.check.due(ctx.step):
                with torch.no_grad():
                    half, *_ = differences(size, unit, self.rho / 2, ctx.first_pass)
                metrics = self.check.compare(ctx, pulls, half)
            return constrained(phi, goal, pulls, both, strangers, metrics)

        return Features(describe(leaf), describe(first.others), pull)


class DoubleBackward(_Probing):
    """The features of `sketch`, differentiated by a second backward pass: the reference, for whole weights only."""

    name = "double_backward"
    Config = DoubleBackwardConfig
    summary = "as sketch, by a second backward pass: the reference, for whole weights only"

    @classmethod
    def problems(cls, cfg: RunConfig) -> Iterator[str]:
        if cfg.backend in SHARDED:
            yield (
                f"constraint.evaluator=double_backward cannot differentiate twice through the sharded weights of "
                f"backend={cfg.backend}; set constraint.evaluator=sketch, or backend=ddp"
            )

    def features(self, ctx: Context, forget: Batch, third: Batch, bank: Bank | None) -> Features:
        probes, count = draw_probes(self.settings, ctx, ctx.projection), len(forget)
        batch = concat_batches(forget, third)
        sketches, pairs = self._sketches(ctx, batch, bank, probes, views_by_pair(ctx, batch), exact=True)
        own = sketches[:count]
        forgotten, others = ([b.part(rows) for b in pairs] for rows in (slice(count), slice(count, None)))

        def pull(phi: Tensor, term: Tensor) -> Constrained:
            return Constrained(phi, term, forgotten, others, {}, [own])

        return Features(describe(own), describe(sketches[count:]), pull)
