"""Names in foreign checkpoints: which part is the backbone, and what its tensors are called in timm.

Training scripts wrap a backbone in other modules (`module.encoder_q.conv1.weight`) and store it beside heads,
queues and optimizer state. `match_names` finds the reading under which most names are the backbone's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

# Keys under which a checkpoint keeps weights, best first where two fit equally well.
CONTAINERS = (
    "state_dict",
    "model",
    "model_state",
    "model_state_dict",
    "state_dict_ema",
    "model_ema",
    "net",
    "network",
    "encoder",
    "backbone",
    "teacher",
    "student",
    "params",
    "weights",
    "module",
)
# Modules that wrap a backbone, best first where two fit equally well: the online copy before the momentum copy.
WRAPPERS = (
    "module",
    "_orig_mod",
    "model",
    "net",
    "network",
    "backbone",
    "encoder",
    "trunk",
    "feature_extractor",
    "encoder_q",
    "base_encoder",
    "online_encoder",
    "online_network",
    "visual",
    "student",
    "teacher",
    "momentum_encoder",
    "encoder_k",
    "target_encoder",
    "target_network",
)
# First names of what is not the backbone and may be left out.
HEADS = frozenset(
    {
        "fc",
        "head",
        "heads",
        "head_dist",
        "classifier",
        "projector",
        "projection",
        "projection_head",
        "proj_head",
        "contrastive_head",
        "mlp_head",
        "predictor",
        "prediction_head",
        "prototypes",
        "online_predictor",
    }
)
OTHERS = frozenset(
    {
        "queue",
        "queue_ptr",
        "queue_ids",
        "momentum_encoder",
        "encoder_k",
        "target_encoder",
        "target_network",
        "momentum_projector",
        "teacher",
        "teacher_head",
        "student_head",
        "criterion",
        "loss",
    }
)
MAX_DEPTH = 4  # containers in containers, wrappers in wrappers

TORCHVISION_VIT = (
    (r"class_token", "cls_token"),
    (r"conv_proj\.", "patch_embed.proj."),
    (r"encoder\.pos_embedding", "pos_embed"),
    (r"encoder\.ln\.", "norm."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.ln_1\.", r"blocks.\1.norm1."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.ln_2\.", r"blocks.\1.norm2."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_", r"blocks.\1.attn.qkv."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.", r"blocks.\1.mlp.fc1."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.", r"blocks.\1.mlp.fc2."),
)


class Reading(NamedTuple):
    """One way to read a checkpoint: tensors by the backbone's names, what was left out, and how it was read."""

    state: dict[str, Tensor]
    dropped: list[str]  # names in the file, of heads and other copies
    container: str  # where in the file, "" at the top
    prefix: str  # stripped from every name
    torchvision: bool  # names were mapped from torchvision's ViT
    unknown: list[str]  # names outside `prefix` that belong to nothing known


def match_names(checkpoint: Mapping[str, Any], expected: frozenset[str]) -> Reading | None:
    """The reading that finds most of the `expected` names; None where the checkpoint holds no tensors at all."""
    best: tuple[tuple[int, int, int], Reading] | None = None
    for rank, (container, tensors) in enumerate(_containers(checkpoint)):
        for prefix in _prefixes(tensors):
            reading = _read(tensors, expected, container, prefix)
            score = (len(expected & reading.state.keys()), -rank, -_prefix_rank(prefix))
            if best is None or score > best[0]:
                best = score, reading
    return None if best is None else best[1]


def _containers(
    checkpoint: Mapping[str, Any], path: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    tensors = {name: value for name, value in checkpoint.items() if isinstance(value, Tensor) and isinstance(name, str)}
    if tensors:
        yield path, tensors
    if depth < MAX_DEPTH:
        for name in CONTAINERS:
            inner = checkpoint.get(name)
            if isinstance(inner, Mapping):
                yield from _containers(inner, f"{path}.{name}" if path else name, depth + 1)


def _prefixes(names: Mapping[str, Any]) -> set[str]:
    """Every chain of wrapper modules that some name starts with, and none."""
    found = {""}
    for name in names:
        prefix = ""
        for part in name.split(".")[:MAX_DEPTH]:
            if part not in WRAPPERS:
                break
            prefix += f"{part}."
            found.add(prefix)
    return found


def _prefix_rank(prefix: str) -> int:
    return sum(1 + WRAPPERS.index(part) for part in prefix.split(".") if part)


def _read(tensors: Mapping[str, Tensor], expected: frozenset[str], container: str, prefix: str) -> Reading:
    inside = {name[len(prefix) :]: name for name in tensors if name.startswith(prefix)}
    torchvision = "conv_proj.weight" in inside and "conv_proj.weight" not in expected
    state: dict[str, Tensor] = {}
    dropped: list[str] = []
    for name, original in inside.items():
        ours = _from_torchvision(name) if torchvision else name
        if ours not in expected and ours.split(".")[0] in (HEADS if prefix else HEADS | OTHERS):
            dropped.append(original)
        else:
            state[ours] = tensors[original]
    outside = [name for name in tensors if not name.startswith(prefix)]
    unknown = [name for name in outside if not _is_other(name)]
    dropped += [name for name in outside if _is_other(name)]
    return Reading(state, dropped, container, prefix, torchvision, unknown)


def _is_other(name: str) -> bool:
    """Whether a tensor outside the backbone is a head, a queue or another copy."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in ("module", "_orig_mod", "model", "net", "network"):
        parts = parts[1:]
    return parts[0] in HEADS | OTHERS


def _from_torchvision(name: str) -> str:
    for pattern, ours in TORCHVISION_VIT:
        mapped, count = re.subn(rf"^{pattern}", ours, name)
        if count:
            return mapped
    return name
