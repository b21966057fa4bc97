"""Recipes for photos, to start from: every setting that matters for the encoder and its views is written here.

The images are a folder, `data.root`, and what to forget is a list, `data.forget`: both are yours to name. Pretraining
is that of the papers; the settings of forgetting come from small encoders and have not been searched at this size.
"""

from __future__ import annotations

from distunlearn.config.registry import EVALUATOR, METHOD, OBJECTIVE, settings_of
from distunlearn.config.schema import DataConfig, EncoderConfig, PretrainConfig, RunConfig, UnlearnConfig, ViewsConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DATA = DataConfig(
    source="imagefolder", root=None, members=None, forget="forget.txt",
    decode_size=None, holdout=2000, calibration=1000, third_party=2000, third_party_audit=1000,
    samples_per_shard=1024, workers=8,
)  # fmt: skip


def photos_64() -> RunConfig:
    """MoCo v2 (arXiv 2003.04297), ResNet-50, photos at 64 pixels from a folder; one GPU."""
    return RunConfig(
        recipe="photos_64",
        precision="bf16",
        data=DATA,
        encoder=EncoderConfig(
            name="resnet50", image_size=64, in_chans=3, stem="standard", args={},
            mean=IMAGENET_MEAN, std=IMAGENET_STD,
            crop_pct=0.875, interpolation="bilinear", embed_dim=None,
        ),
        objective=settings_of(
            OBJECTIVE, "moco", temperature=0.2, hidden_dim=2048, output_dim=128, momentum=0.999, queue_size=16384,
            head_layers=2, head_norm=False,
        ),
        views=ViewsConfig(recipe="mocov2"),
        pretrain=PretrainConfig(
            epochs=200, batch=256, accumulate=1, optimizer="sgd", lr=0.03, lr_scaling="linear", momentum=0.9,
            nesterov=False, weight_decay=1e-4, decay_all=True, warmup=0.0, clip=0.0, checkpoint_every=1000,
        ),
        unlearn=UnlearnConfig(
            steps=500, retain_batch=256, forget_batch=64, third_party_batch=64, accumulate=1, optimizer="adamw",
            lr=1e-4, lr_scaling="none", weight_decay=1e-4, decay_all=False, warmup=0.05, clip=0.0,
            checkpoint_every=100,
        ),
        method=settings_of(METHOD, "third_party", gradient_weight=1.0, output_weight=4.0, confidence_weight=0.05),
        constraint=settings_of(EVALUATOR, "head", view_pairs=1),
    )  # fmt: skip


def photos_224() -> RunConfig:
    """MoCo v3 (arXiv 2104.02057), ViT-S/16, photos at 224 pixels from a folder; eight GPUs."""
    return RunConfig(
        recipe="photos_224",
        precision="bf16",
        data=DATA,
        encoder=EncoderConfig(
            name="vit_small_patch16_224", image_size=224, in_chans=3, stem="standard", args={},
            mean=IMAGENET_MEAN, std=IMAGENET_STD,
            crop_pct=0.875, interpolation="bicubic", embed_dim=None,
        ),
        objective=settings_of(
            OBJECTIVE, "mocov3", temperature=0.2, hidden_dim=4096, output_dim=256, momentum=0.99,
            head_layers=3, head_norm=True,
        ),
        views=ViewsConfig(recipe="mocov3"),
        pretrain=PretrainConfig(
            epochs=300, batch=1024, accumulate=1, optimizer="adamw", lr=1.5e-4, lr_scaling="linear",
            weight_decay=0.1, decay_all=True, warmup=0.13, clip=0.0, checkpoint_every=1000,
        ),
        unlearn=UnlearnConfig(
            steps=500, retain_batch=256, forget_batch=64, third_party_batch=64, accumulate=1, optimizer="adamw",
            lr=5e-5, lr_scaling="none", weight_decay=0.1, decay_all=False, warmup=0.05, clip=1.0,
            checkpoint_every=100,
        ),
        method=settings_of(METHOD, "third_party", gradient_weight=1.0, output_weight=4.0, confidence_weight=0.05),
        constraint=settings_of(EVALUATOR, "head", view_pairs=1),
    )  # fmt: skip
