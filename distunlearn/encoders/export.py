"""A backbone as a folder that timm loads without this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distunlearn.common.files import replacing, write_atomic
from distunlearn.config.schema import EncoderConfig
from distunlearn.encoders.backbone import create_args, embed_dim, input_size
from distunlearn.encoders.own_module import is_own
from distunlearn.encoders.weights import check_finite

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def export_backbone(backbone: nn.Module, encoder: EncoderConfig, folder: Path) -> None:
    """Write `folder`/model.safetensors and `folder`/config.json, each complete or not at all.

    `timm.create_model("local-dir:<folder>", pretrained=True)` then maps images [n, C, S, S], normalised by the mean and
    std of config.json, to the same embeddings [n, E]; without `pretrained=True` timm gives that model fresh weights.
    Of an own module the weights have the names of its own `state_dict`, for `load_state_dict`.

    Args:
        backbone: as `create_backbone` makes it, on any device; floating weights are stored in fp32.
        encoder: what it was made from.
        folder: created where it is missing; older files of these names are replaced.

    Raises:
        NumericsError: weights that are not finite; nothing is written.
    """
    tensors = {name: _plain(tensor) for name, tensor in backbone.state_dict().items()}
    check_finite(tensors)
    config = json.dumps(_config(backbone, encoder), indent=2, sort_keys=True) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    write_atomic(folder / CONFIG, config)


def _plain(tensor: Tensor) -> Tensor:
    """A copy on the CPU, contiguous and with memory of its own: safetensors refuses shared storage."""
    tensor = tensor.detach()
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device="cpu").copy_(tensor)


def _config(backbone: nn.Module, encoder: EncoderConfig) -> dict[str, Any]:
    """timm's config.json: how to build the model, and how its images are made. Of an own module: where it is from."""
    shape = input_size(encoder)
    images = {
        "input_size": shape,
        "mean": list(encoder.mean or [0.5] * encoder.in_chans),
        "std": list(encoder.std or [0.5] * encoder.in_chans),
    }
    if is_own(encoder.name):
        kind = type(backbone)
        return {
            "encoder": encoder.name,
            "class": f"{kind.__module__}:{kind.__qualname__}",
            "args": dict(encoder.args),
            "num_features": embed_dim(backbone, encoder),
            **images,
        }
    own: Any = backbone.pretrained_cfg
    args = create_args(encoder)
    return {
        "architecture": encoder.name,
        "num_classes": 0,
        "num_features": embed_dim(backbone, encoder),
        "model_args": args,
        "pretrained_cfg": {
            "num_classes": 0,
            **images,
            "fixed_input_size": bool(own.get("fixed_input_size", False)),
            "interpolation": encoder.interpolation or "bilinear",
            "crop_pct": encoder.crop_pct or 1.0,
            "crop_mode": "center",
            "pool_size": None,
            "first_conv": "conv1.0" if args.get("stem_type") == "deep" else own.get("first_conv"),
            "classifier": own.get("classifier"),
            "custom_load": False,
        },
    }
