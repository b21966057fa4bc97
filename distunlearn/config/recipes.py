"""Named recipes: functions that return a RunConfig, derived from one another.

Embedded recipes use scikit-learn's digits (8 x 8 pixels, shown to the encoder at 32 x 32) and encoders that
two CPU cores train in a few minutes. Settings of `digits` were chosen on seeds 10 to 12. The others take over what was
chosen on the digits before, without `method.climb_weight`, which was measured with SimCLR and a ResNet alone. Change
single values with `--set`, or derive a function of your own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from distunlearn.config.photo_recipes import photos_64, photos_224
from distunlearn.config.registry import EVALUATOR, METHOD, OBJECTIVE, settings_of, switched
from distunlearn.config.schema import (
    DataConfig,
    EncoderConfig,
    MethodConfig,
    PretrainConfig,
    RunConfig,
    UnlearnConfig,
    ViewsConfig,
)

SMALL_RESNET = EncoderConfig(
    name="resnet18",
    image_size=32,
    in_chans=1,
    stem="deep",
    args={"stem_width": 8, "channels": [16, 32, 64, 128], "layers": [1, 1, 1, 1]},
    embed_dim=128,
)
SMALL_VIT = EncoderConfig(
    name="vit_tiny_patch16_224",
    image_size=32,
    in_chans=1,
    stem="standard",
    args={"patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3, "class_token": False, "global_pool": "avg"},
    embed_dim=96,
)


def digits() -> RunConfig:
    """SimCLR, a narrow ResNet, scikit-learn's digits: 900 members, 200 of them to forget."""
    base = _digits("digits")
    return replace(
        base,
        data=replace(base.data, members=900, holdout=500, third_party=250, third_party_audit=50),
        views=replace(base.views, crop_scale_min=0.6),
        pretrain=replace(base.pretrain, epochs=300),
        unlearn=replace(base.unlearn, steps=350, lr=2.2e-3),
        method=_third_party(climb_weight=0.17, gradient_weight=0.03, output_weight=0.13),
        audit=replace(base.audit, views=20),
    )


def _third_party(**weights: float) -> MethodConfig:
    return settings_of(METHOD, "third_party", confidence_weight=0.05, **weights)


def _digits(name: str) -> RunConfig:
    """What the recipes on the digits have in common: 700 members, 200 of them to forget."""
    return RunConfig(
        recipe=name,
        data=DataConfig(source="digits", calibration=97, third_party=300, third_party_audit=100),
        encoder=SMALL_RESNET,
        objective=settings_of(OBJECTIVE, "simclr", temperature=0.2, hidden_dim=256, output_dim=64),
        views=ViewsConfig(recipe="grey"),
        pretrain=PretrainConfig(epochs=400, batch=128, lr=4e-3),
        unlearn=UnlearnConfig(steps=175, retain_batch=96, forget_batch=32, third_party_batch=48, lr=1e-3),
        method=_third_party(gradient_weight=1.0, output_weight=4.0),
        constraint=settings_of(EVALUATOR, "head", view_pairs=2),
    )


def digits_moco() -> RunConfig:
    """MoCo v2 with a queue."""
    base = _digits("digits_moco")
    return replace(base, objective=switched(OBJECTIVE, base.objective, "moco"))


def digits_mocov3() -> RunConfig:
    """MoCo v3 style: no queue, a predictor, a small ViT."""
    base = _digits("digits_mocov3")
    return replace(
        base,
        encoder=SMALL_VIT,
        objective=switched(OBJECTIVE, base.objective, "mocov3"),
        pretrain=replace(base.pretrain, lr=1e-3),
        unlearn=replace(base.unlearn, lr=5e-4),
    )


def digits_byol() -> RunConfig:
    """BYOL: no negatives in training; the bank of the per-sample loss are target projections of retain."""
    base = _digits("digits_byol")
    return replace(base, objective=switched(OBJECTIVE, base.objective, "byol"))


def digits_supervised() -> RunConfig:
    """Cross-entropy with labels."""
    base = _digits("digits_supervised")
    return replace(base, objective=switched(OBJECTIVE, base.objective, "supervised"))


def digits_vit() -> RunConfig:
    """SimCLR with a small ViT."""
    base = _digits("digits_vit")
    return replace(
        base,
        encoder=SMALL_VIT,
        pretrain=replace(base.pretrain, lr=1e-3),
        unlearn=replace(base.unlearn, lr=5e-4),
    )


def fashion_mnist() -> RunConfig:
    """SimCLR on Fashion-MNIST: 1,000 members, 200 to forget (IDX files as Debian's dataset-fashion-mnist lays them)."""
    base = _digits("fashion_mnist")
    return replace(
        base,
        data=DataConfig(
            source="fashion_mnist",
            members=1000,
            forget=200,
            holdout=1000,
            calibration=400,
            third_party=500,
            third_party_audit=500,
        ),
        views=replace(base.views, flip=0.5),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "digits": digits,
    "digits_moco": digits_moco,
    "digits_mocov3": digits_mocov3,
    "digits_byol": digits_byol,
    "digits_supervised": digits_supervised,
    "digits_vit": digits_vit,
    "fashion_mnist": fashion_mnist,
    "photos_64": photos_64,
    "photos_224": photos_224,
}
