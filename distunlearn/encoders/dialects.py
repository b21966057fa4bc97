"""What the tensors of a backbone are called by other libraries, and how timm calls them.

A dialect turns tensors by their names there (prefixes are stripped already) into tensors by timm's names, or gives None
where the names are not its own. A tensor of a block that it does not know keeps its name inside the block, so that it
counts as one that the encoder lacks: a weight is never left out of a block in silence.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
Dialect = Callable[[Mapping[str, Tensor], nn.Module], "State | None"]
Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]  # as `re.sub` takes them

TORCHVISION_VIT: Rules = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+)\.ln_([12])\.", r"\1.norm\2."),
    (r"^(blocks\.\d+)\.self_attention\.in_proj_", r"\1.attn.qkv."),
    (r"^(blocks\.\d+)\.self_attention\.out_proj\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.mlp\.(?:0|linear_1)\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.mlp\.(?:3|linear_2)\.", r"\1.mlp.fc2."),
)
# Hugging Face: ViT, DeiT, DINOv2 with and without registers, MAE; their names of versions 4 and 5.
HUGGING_FACE_VIT: Rules = (
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+)\.layernorm_before\.", r"\1.norm1."),
    (r"^(blocks\.\d+)\.layernorm_after\.", r"\1.norm2."),
    (r"^(blocks\.\d+)\.layer_scale([12])\.lambda1$", r"\1.ls\2.gamma"),
    (r"^(blocks\.\d+)\.attention\.(?:attention\.)?(query|key|value|[qkv]_proj)\.", r"\1.attn.\2."),
    (r"^(blocks\.\d+)\.attention\.(?:output\.dense|o_proj)\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^(blocks\.\d+)\.mlp\.weights_in\.", r"\1.mlp.w12."),
    (r"^(blocks\.\d+)\.mlp\.weights_out\.", r"\1.mlp.w3."),
)
HUGGING_FACE_CLIP: Rules = (
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+)\.layer_norm([12])\.", r"\1.norm\2."),
    (r"^(blocks\.\d+)\.self_attn\.([qkv]_proj)\.", r"\1.attn.\2."),
    (r"^(blocks\.\d+)\.self_attn\.out_proj\.", r"\1.attn.proj."),
)
HUGGING_FACE_RESNET: Rules = (
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^encoder\.stages\.(\d+)\.layers\.", lambda m: f"layer{int(m[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    (r"\.layer\.(\d)\.convolution\.", lambda m: f".conv{int(m[1]) + 1}."),
    (r"\.layer\.(\d)\.normalization\.", lambda m: f".bn{int(m[1]) + 1}."),
)
PARTS = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))


def timm_filter(state: State, backbone: nn.Module) -> State:
    """timm's own conversion for the model (`checkpoint_filter_fn`), which also resamples position embeddings."""
    module = sys.modules[type(backbone).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None) if module.__name__.startswith("timm.") else None
    if convert is None:
        return state
    try:
        with torch.no_grad():
            return {name: value for name, value in convert(dict(state), backbone).items() if isinstance(value, Tensor)}
    except Exception:  # of names or shapes that it was not written for: then it has nothing to convert
        return state


def _renamed(rules: Rules, sign: str, names: Mapping[str, Tensor]) -> State | None:
    if sign not in names:
        return None
    compiled = [(re.compile(pattern), ours) for pattern, ours in rules]
    state = {}
    for name, tensor in names.items():
        for pattern, ours in compiled:
            name = pattern.sub(ours, name, count=1)
        state[name] = tensor
    return state


def _joined(state: State) -> State:
    """The three projections of an attention as one, in the order query, key, value."""
    found = dict(state)
    for name in state:
        place, _, last = name.rpartition(".")
        block, _, part = place.rpartition(".")
        if part not in PARTS[0]:
            continue
        names = [next((n for p in part if (n := f"{block}.{p}.{last}") in state), "") for part in PARTS]
        tensors = [state[n] for n in names if n]
        if len(tensors) == 3 and len({t.shape for t in tensors}) == 1:
            found[f"{block}.qkv.{last}"] = torch.cat(tensors)
            for n in names:
                del found[n]
    return found


def _plain(names: Mapping[str, Tensor], backbone: nn.Module) -> State:
    """timm's names, and torchvision's of ResNets; a residual's projection is a shortcut in CIFAR's ResNets."""
    return {re.sub(r"^(layer\d\.\d+)\.shortcut\.", r"\1.downsample.", name): value for name, value in names.items()}


def _torchvision_vit(names: Mapping[str, Tensor], backbone: nn.Module) -> State | None:
    return _renamed(TORCHVISION_VIT, "conv_proj.weight", names)


def _hugging_face_vit(names: Mapping[str, Tensor], backbone: nn.Module) -> State | None:
    state = _renamed(HUGGING_FACE_VIT, "embeddings.patch_embeddings.projection.weight", names)
    return state and _joined(state)


def _hugging_face_clip(names: Mapping[str, Tensor], backbone: nn.Module) -> State | None:
    state = _renamed(HUGGING_FACE_CLIP, "embeddings.patch_embedding.weight", names)
    if state is None:
        return None
    for name, shape in (("cls_token", (1, 1, -1)), ("pos_embed", (1, *state["pos_embed"].shape))):
        state[name] = state[name].reshape(shape)
    return _joined(state)


def _hugging_face_resnet(names: Mapping[str, Tensor], backbone: nn.Module) -> State | None:
    return _renamed(HUGGING_FACE_RESNET, "embedder.embedder.convolution.weight", names)


def _open_clip(names: Mapping[str, Tensor], backbone: nn.Module) -> State | None:
    """The image tower alone; as part of the whole model timm's filter knows it."""
    if "class_embedding" not in names or "conv1.weight" not in names:
        return None
    return {f"visual.{name}": value for name, value in names.items()}


def _sequential(names: Mapping[str, Tensor], backbone: nn.Module) -> State | None:
    """Children by number, of `Sequential(*list(model.children())[:-1])`, matched in order by what lies below them."""
    theirs, ours = _children(names), list(_children(backbone.state_dict()).items())
    if not theirs or not all(child.isdecimal() for child in theirs):
        return None
    renamed: dict[str, str] = {}
    for number in sorted(theirs, key=int):
        if len(renamed) < len(ours) and theirs[number] == ours[len(renamed)][1]:
            renamed[number] = ours[len(renamed)][0]
    parts = ((name.partition("."), tensor) for name, tensor in names.items())
    return {f"{renamed.get(child, child)}{dot}{rest}": tensor for (child, dot, rest), tensor in parts}


def _children(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, torch.Size]]:
    """Names and shapes below each child."""
    found: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in tensors.items():
        child, _, rest = name.partition(".")
        if not rest.endswith("num_batches_tracked"):
            found.setdefault(child, {})[rest] = tensor.shape
    return found


DIALECTS: Mapping[str, Dialect] = {
    "timm": _plain,
    "torchvision's ViT": _torchvision_vit,
    "Hugging Face's ViT": _hugging_face_vit,
    "Hugging Face's CLIP": _hugging_face_clip,
    "Hugging Face's ResNet": _hugging_face_resnet,
    "open_clip": _open_clip,
    "a Sequential of the encoder's children": _sequential,
}
