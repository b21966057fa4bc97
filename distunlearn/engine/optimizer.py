"""Optimizers, which weights they decay, and the learning-rate schedule, from the settings of a training."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.optim import Lars, param_groups_weight_decay
from torch import nn

from distunlearn.config.schema import OptimizerConfig, PretrainConfig, UnlearnConfig

SCALED_FROM = 256  # images of the batch at which scaled rates are stated (Goyal et al., arXiv 1706.02677)


def make_optimizer(settings: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the trained weights of `model`, at the unscaled rate.

    Biases, norms and what the backbone's `no_weight_decay` names (position embeddings, tokens) do not decay, and LARS
    steps them as SGD does, unless `decay_all`. AdamW is fused: one pass over the weights in place of ten, a quarter of
    the time on a CPU. SGD is not: torch 2.14 cannot shard its fused kernel, which FSDP2 would need.
    """
    groups = _groups(settings, model)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, fused=True)
    heavy: dict[str, Any] = {"lr": settings.lr, "momentum": settings.momentum, "nesterov": settings.nesterov}
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, **heavy)
    return Lars(groups, trust_coeff=settings.trust, **heavy)


def _groups(settings: OptimizerConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Groups of timm, and whether LARS adapts them. Which weights are excluded does not depend on how much decays."""
    found: list[dict[str, Any]]
    if settings.decay_all:
        found = [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": 1.0}]
    else:
        backbone: Any = getattr(model, "backbone", None)
        named = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
        found = param_groups_weight_decay(model, 1.0, no_weight_decay_list=[f"backbone.{name}" for name in named])
    return [
        {
            "params": group["params"],
            "weight_decay": group["weight_decay"] * settings.weight_decay,
            "always_adapt": group["weight_decay"] > 0,  # read by LARS: also where `weight_decay` is 0
        }
        for group in found
    ]


def peak_rate(settings: PretrainConfig | UnlearnConfig) -> float:
    """The largest learning rate: `lr`, scaled by the images of the global batch (unlearning: of its retain batch)."""
    images = settings.batch if isinstance(settings, PretrainConfig) else settings.retain_batch
    ratio = images / SCALED_FROM
    return settings.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[settings.lr_scaling]


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the share `warmup` of `steps`, then a cosine to 0 (Loshchilov and Hutter 2017, eq. 5)."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return peak * (step + 1) / ramp
    return 0.5 * peak * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))
