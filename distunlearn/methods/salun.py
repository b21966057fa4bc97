"""salun: random targets for the forget images, learned by the weights alone that matter to them.

    m = 1 for the mask_share of all weights where |d/d theta mean_{i in forget} l_i| is largest, else 0
    theta <- m * (theta after the step) + (1 - m) * theta_original,      the loss is that of `random_target`

The gradient is the original encoder's, over the whole forget set; l_i is the bank loss. Source: Fan et al., "SalUn:
Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image Classification and Generation", ICLR
2024, eq. 4 to 6, there with random labels; random places instead, and the bank loss, are our reading for encoders.
Masked weights are put back after each step, so that neither weight decay nor an optimizer's memory moves them.
Guarantee: empirical.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distunlearn.config.schema import PartShare, RunConfig
from distunlearn.data.schedule import Batch, permutation
from distunlearn.distributed.collectives import all_reduce_mean
from distunlearn.methods.random_target import RandomTarget, RandomTargetConfig
from distunlearn.methods.search_space import Choice
from distunlearn.objectives.forward import Context, embed
from distunlearn.objectives.memory_bank import Bank


def largest(gradients: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """bool masks by name: True at the round(share * all) elements, and at least one, that are largest in size."""
    flat = torch.cat([g.abs().flatten() for g in gradients.values()])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(max(1, round(share * flat.numel()))).indices] = True
    parts = mask.split([g.numel() for g in gradients.values()])
    return {name: part.view(g.shape) for (name, g), part in zip(gradients.items(), parts, strict=True)}


@dataclass(frozen=True, kw_only=True)
class SalUnConfig(RandomTargetConfig):
    """Weight and mask."""

    name: str = "salun"
    mask_share: PartShare = 0.5  # share of the weights that may move


class SalUn(RandomTarget):
    """See the module's text. State: the mask, bool, by weight, and the places of `random_target`."""

    name = "salun"
    Config = SalUnConfig
    summary = "random targets, learned by the weights that forget samples move"
    report = "moving the forgotten images to random places, by the weights alone that matter to them"
    needs = ("retain", "forget", "teacher", "original_gradients")  # type: ignore[assignment]
    space = {**RandomTarget.space, "method.mask_share": Choice((0.1, 0.3, 0.5, 0.7))}

    def __init__(self, cfg: RunConfig) -> None:
        super().__init__(cfg)
        self.mask: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}

    def calibrate(self, ctx: Context, sample: Callable[[str], Batch]) -> dict[str, float]:
        figures = super().calibrate(ctx, sample)
        gradients = self.forget_gradients(ctx, sample("forget"), sample("retain"))
        # All ranks have seen the same images, but may have rounded differently, and a mask must be one mask.
        self.mask = largest({name: all_reduce_mean(g) for name, g in gradients.items()}, self.settings.mask_share)
        moving = sum(int(m.sum()) for m in self.mask.values())
        return figures | {"mask_share": moving / sum(m.numel() for m in self.mask.values())}

    def forget_gradients(self, ctx: Context, forget: Batch, retain: Batch) -> dict[str, Tensor]:
        """Gradient of the mean forget loss in every weight of the original encoder, a step's images at a time."""
        size = self.cfg.unlearn.retain_batch // self.cfg.unlearn.accumulate
        bank = self._bank(ctx, retain.pick(permutation(len(retain), self.cfg.seed, "bank")[:size].tolist()))
        named = dict(ctx.original.named_parameters())
        total = {name: torch.zeros_like(weight) for name, weight in named.items()}
        size = max(1, self.cfg.unlearn.forget_batch // self.cfg.unlearn.accumulate)
        for weight in named.values():
            weight.requires_grad_(True)
        try:
            for first in range(0, len(forget), size):
                branches = embed(ctx, forget.part(slice(first, first + size)), batchnorm="eval", network=ctx.original)
                loss = ctx.objective.per_sample_loss(branches, bank).sum() / len(forget)
                found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
                for sum_of, gradient in zip(total.values(), found, strict=True):
                    if gradient is not None:
                        sum_of += gradient
        finally:
            for weight in named.values():
                weight.requires_grad_(False)
        return total

    def _bank(self, ctx: Context, retain: Batch) -> Bank | None:
        """The original encoder's retain keys, alike on every rank; MoCo v2: the queue."""
        if not ctx.objective.uses_bank:
            return None
        if ctx.queue is not None:
            return ctx.queue.bank(ctx.objective.temperature)
        with torch.no_grad():
            keys = ctx.objective.bank_keys(embed(ctx, retain, batchnorm="eval", network=ctx.original))
        return Bank(*keys, ctx.objective.temperature)

    def adjust(self, ctx: Context, name: str, weight: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
        if not self._held:
            self._held = {n: p.detach() for n, p in ctx.original.named_parameters()}
        return torch.where(part(self.mask[name]), weight, part(self._held[name]))

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {f"mask.{name}": m.cpu().clone() for name, m in self.mask.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.mask = {k.removeprefix("mask."): v.clone() for k, v in state.items() if k.startswith("mask.")}
