"""From an EncoderConfig to a backbone without classifier, timm's or the user's own, checked before it is trained.

Shapes: n = images, C x S x S = one image, E = embedding size.
"""

from __future__ import annotations

import copy
import json
import numbers
from typing import Any

import timm
import torch
from torch import Tensor, nn

from distunlearn.common.text import printable
from distunlearn.config.schema import EncoderConfig
from distunlearn.encoders.own_module import create_own, embedding_size, is_own, without_chance
from distunlearn.encoders.timm_names import check_name, is_resnet, takes_size
from distunlearn.errors import EncoderError

# Arguments of timm.create_model that have a setting of their own, and those that would fetch weights or
# return something other than one embedding per image.
SETTINGS = {
    "in_chans": "encoder.in_chans",
    "img_size": "encoder.image_size",
    "stem_type": "encoder.stem",
    "checkpoint_path": "encoder.checkpoint",
}
RESERVED = frozenset(
    {
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_model_args",
        "pretrained_strict",
        "cache_dir",
        "num_classes",
        "features_only",
        "out_indices",
        "feature_cls",
        "use_naflex",
        "scriptable",
        "exportable",
        "no_jit",
        "device",
        "dtype",
        "model_name",
        "pruned",
    }
)
DEEP_STEM_WIDTH = 32  # of timm's own deep-stem variants (resnet18d, resnet50d)


def input_size(encoder: EncoderConfig) -> tuple[int, int, int]:
    """(C, S, S) of the images that the encoder takes."""
    return encoder.in_chans, encoder.image_size, encoder.image_size


def embed_dim(backbone: nn.Module, encoder: EncoderConfig) -> int:
    """E of a backbone that `create_backbone` made."""
    if is_own(encoder.name):
        return embedding_size(backbone, input_size(encoder))
    known = _SOUND.get(_key(backbone, encoder))
    return known or _hollow_embedding(_without_values(backbone).eval(), encoder).shape[1]


def create_args(encoder: EncoderConfig) -> dict[str, Any]:
    """Arguments for timm.create_model besides the name; plain JSON, so that an export can carry them.

    Raises:
        EncoderError: arguments that other settings decide, dropout, or a stem that the model cannot have.
    """
    args = dict(encoder.args)
    for key, value in args.items():
        shown = printable(key)
        if key in SETTINGS:
            raise EncoderError(f"encoder.args.{shown} is set, but it has a setting of its own; use {SETTINGS[key]}.")
        if key in RESERVED:
            raise EncoderError(f"encoder.args.{shown} is set, but an encoder decides it by itself; remove it.")
        if "drop" in key and isinstance(value, numbers.Number) and value != 0:
            raise EncoderError(
                f"encoder.args.{shown} is {value}, expected 0: what is compared between images must not depend on "
                "chance; remove it."
            )
    try:
        json.dumps(args)
    except (TypeError, ValueError) as error:
        raise EncoderError(
            f"encoder.args holds what JSON cannot ({printable(error)}), expected numbers, texts, lists and tables, "
            "because an export carries them; change it."
        ) from error
    if encoder.stem == "deep":
        args["stem_type"] = "deep"
        args.setdefault("stem_width", DEEP_STEM_WIDTH)
    if takes_size(encoder.name):
        args["img_size"] = encoder.image_size
    return {**args, "in_chans": encoder.in_chans, "num_classes": 0}


# Embedding sizes that this process has checked, by settings and names of weights: a run builds its encoder ten times.
_SOUND: dict[tuple, int] = {}


def create_backbone(encoder: EncoderConfig) -> nn.Module:
    """A model with fresh weights from the global generator: [n, C, S, S] -> [n, E], E as `embed_dim` has it.

    Raises:
        EncoderError: an unknown name, arguments that timm refuses, an image size that the patches do not divide,
            another embedding size than declared, or weights that take no part in the embedding; see `create_own`.
    """
    if not is_own(encoder.name):
        check_name(encoder.name)
    if encoder.stem != "standard" and (is_own(encoder.name) or not is_resnet(encoder.name)):
        raise EncoderError(
            f"encoder.stem is {encoder.stem}, but {printable(encoder.name)} is none of timm's ResNets; expected "
            "standard; set encoder.stem=standard."
        )
    if is_own(encoder.name):
        return create_own(encoder)
    args = create_args(encoder)
    try:
        backbone = timm.create_model(encoder.name, pretrained=False, **args)
    except Exception as error:  # timm and torch raise whatever the wrong argument happens to break
        raise _refused(encoder, error) from error
    _check_patches(backbone, encoder)
    key = _key(backbone, encoder)
    if key not in _SOUND:
        _SOUND[key] = _check_embedding(backbone, encoder)
    without_chance(backbone)
    return backbone


def _key(backbone: nn.Module, encoder: EncoderConfig) -> tuple:
    return repr(encoder), tuple(backbone.state_dict())


def _refused(encoder: EncoderConfig, error: Exception) -> EncoderError:
    """Name the argument that timm's message names, else all that were given."""
    reason = printable(error) or type(error).__name__
    if encoder.stem == "deep" and "stem_" in reason and "stem_width" not in encoder.args:
        return EncoderError(
            f"encoder.stem is deep, which {encoder.name} cannot have ({reason}); expected standard; "
            "set encoder.stem=standard."
        )
    named = [key for key in encoder.args if key in reason] or list(encoder.args)
    given = ", ".join(printable(f"{key}={encoder.args[key]}") for key in named) or "none"
    return EncoderError(
        f"timm refuses to build {encoder.name} with encoder.args {given} at image size {encoder.image_size} "
        f"({type(error).__name__}: {reason}); expected arguments that this model takes; change or remove them."
    )


def _check_patches(backbone: nn.Module, encoder: EncoderConfig) -> None:
    """Refuse an image size that would silently cut off the last rows and columns."""
    patches = getattr(backbone, "patch_embed", None)
    if patches is None or getattr(patches, "dynamic_img_pad", False):
        return
    ratio = patches.feat_ratio() if callable(getattr(patches, "feat_ratio", None)) else patches.patch_size
    sides = (ratio,) if isinstance(ratio, int) else tuple(ratio)
    if any(encoder.image_size % side for side in sides):
        raise EncoderError(
            f"encoder.image_size is {encoder.image_size}, which the patches of {encoder.name} ({sides[0]} pixels) do "
            "not divide; expected a multiple; change encoder.image_size or encoder.args.patch_size."
        )


def _check_embedding(backbone: nn.Module, encoder: EncoderConfig) -> int:
    """Pass two images without values through a twin without weights: shapes and use of every weight, for no memory.
    Returns the embedding's size."""
    twin = _without_values(backbone).train()
    try:
        embedding = _hollow_embedding(twin, encoder)
    except Exception as error:
        raise _refused(encoder, error) from error
    found = list(embedding.shape[1:]) if isinstance(embedding, Tensor) else type(embedding).__name__
    if not isinstance(found, list) or len(found) != 1:
        raise EncoderError(
            f"{encoder.name} with these encoder.args gives {found} per image, expected one vector; change encoder.args "
            "(global_pool decides it)."
        )
    if encoder.embed_dim not in (None, found[0]):
        raise EncoderError(
            f"encoder.embed_dim is {encoder.embed_dim}, but {encoder.name} with these arguments embeds into {found[0]} "
            f"dimensions; expected the two to agree; set encoder.embed_dim={found[0]}."
        )
    with torch.enable_grad():
        embedding.sum().backward()
    idle = [name for name, weight in twin.named_parameters() if weight.grad is None]
    if idle:
        raise EncoderError(
            f"{len(idle)} weights of {encoder.name} take no part in the embedding ({', '.join(idle[:5])}), expected "
            "every weight to be trained; choose another encoder.args or encoder.name."
        )
    return found[0]


def _hollow_embedding(twin: nn.Module, encoder: EncoderConfig) -> Any:
    """What a twin without values gives for two images."""
    with torch.enable_grad():
        return twin(torch.empty(2, *input_size(encoder), device="meta"))


def _without_values(module: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have shapes but no storage; `module` shares nothing with it."""
    hollow: dict[int, Any] = {}
    for weight in module.parameters():
        hollow[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
    for buffer in module.buffers():
        hollow[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, hollow)
