"""Encoders small enough to build by the dozen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from parts import objective_settings

from distunlearn.config.schema import EncoderConfig, RunConfig

NARROW = {"stem_width": 4, "channels": [8, 16, 24, 32], "layers": [1, 1, 1, 1]}
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
AVERAGED = {**VIT, "class_token": False, "global_pool": "avg"}

RESNET18 = EncoderConfig(name="resnet18", image_size=32, in_chans=1, stem="deep", args=NARROW)
ENCODERS = {
    "resnet18 deep": RESNET18,
    "resnet50 deep": replace(RESNET18, name="resnet50", in_chans=3),
    "resnet18 standard": replace(RESNET18, stem="standard", args={**NARROW, "stem_width": 64}),
    "vit token": EncoderConfig(name="vit_tiny_patch16_224", image_size=32, in_chans=3, stem="standard", args=VIT),
    "vit averaged": EncoderConfig(name="vit_small_patch16_224", in_chans=1, stem="standard", args=AVERAGED),
    "vit base averaged with token": EncoderConfig(
        name="vit_base_patch16_224", in_chans=1, stem="standard", args={**VIT, "global_pool": "avg"}
    ),
    "deit distilled": EncoderConfig(
        name="deit_tiny_distilled_patch16_224", image_size=24, in_chans=3, stem="standard", args=VIT
    ),
}
OBJECTIVES = ("simclr", "moco", "mocov3", "byol", "supervised")
HIDDEN, OUT, CLASSES = 10, 6, 5


def run_config(encoder: EncoderConfig = RESNET18, objective: str = "simclr", **changes: Any) -> RunConfig:
    heads = objective_settings(name=objective, hidden_dim=HIDDEN, output_dim=OUT)
    return replace(RunConfig(encoder=encoder, objective=heads), **changes)


def images_for(encoder: EncoderConfig, n: int = 4, seed: int = 0) -> torch.Tensor:
    shape = (n, encoder.in_chans, encoder.image_size, encoder.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
