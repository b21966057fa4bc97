"""Foreign weights into a backbone: nothing in the file is executed, and nothing that does not fit is let through."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distunlearn.common.text import printable
from distunlearn.encoders.checkpoint_names import Reading, match_names
from distunlearn.errors import EncoderError, NumericsError

PICKLES = (".pth", ".pt", ".bin")
FIRST = 10  # names shown of a longer list
COUNTER = "num_batches_tracked"  # absent from checkpoints of before 2018; only a cumulative average reads it


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Raise NumericsError naming up to 5 tensors of `state` that hold NaN or infinite values."""
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        raise NumericsError(
            f"{len(bad)} of {len(state)} tensors hold NaN or infinite values ({_names(bad, 5)}), expected finite "
            "weights; go back to an earlier checkpoint or lower the learning rate."
        )


def load_backbone(backbone: nn.Module, path: str | Path, *, in_chans: int | None = None) -> list[str]:
    """Load a checkpoint of another program into a timm backbone, all tensors or none.

    Args:
        backbone: as `create_backbone` makes it.
        path: .safetensors, or .pth, .pt, .bin, which are read with `weights_only=True` and never otherwise. Weights
            may lie at the top or under a usual key, with the names of usual wrappers in front; torchvision's ViT
            names are mapped. Heads, queues and momentum copies are left out.
        in_chans: 1 allows a first convolution for 3 channels to be summed to 1, which is exact for grey images;
            None: strict.

    Returns:
        What was stripped, mapped, left out or converted, one sentence each, for the log.

    Raises:
        EncoderError: a file that is missing, damaged, unsafe, or does not fit; the backbone is unchanged.
        NumericsError: weights with NaN or infinite values, also after conversion to fp32; the backbone is unchanged.
    """
    path = Path(path)
    own = backbone.state_dict()
    reading = match_names(_read_file(path), frozenset(own))
    if reading is None:
        raise EncoderError(
            f"{_shown(path)} holds no tensors where weights are usually kept, expected a state dict; "
            "save the encoder's state_dict() and use that file."
        )
    notes = _describe(reading)
    state = dict(reading.state)
    notes += _grey_input(backbone, state, in_chans)
    notes += _missing_counters(own, state)
    _check_fit(path, own, state, reading.unknown)
    notes += _widened(own, state)
    state = {name: tensor.to(own[name].dtype) for name, tensor in state.items()}
    _check_values(path, state)
    backbone.load_state_dict(state)
    return notes


def _read_file(path: Path) -> Mapping[str, Any]:
    """The file's content as a mapping."""
    if not path.is_file():
        raise EncoderError(f"encoder.checkpoint {_shown(path)} is not a file; expected weights; check the path.")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        try:
            tensors = load_file(path)
            _refuse_duplicates(path)
            return tensors
        except (SafetensorError, OSError, ValueError) as error:
            raise EncoderError(
                f"{_shown(path)} is no complete safetensors file ({printable(error)}); expected header and data to "
                "agree; copy the file again."
            ) from error
    if suffix not in PICKLES:
        raise EncoderError(
            f"encoder.checkpoint {_shown(path)} ends in {suffix!r}, expected .safetensors, {', '.join(PICKLES)}; "
            "convert it to safetensors."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise EncoderError(
            f"{_shown(path)} is damaged or holds Python objects besides tensors, which could run code and are never "
            "loaded; expected tensors only; have its owner save a state_dict, best as .safetensors."
        ) from error
    except Exception as error:  # a damaged archive fails in many ways
        raise EncoderError(
            f"{_shown(path)} cannot be read ({type(error).__name__}: {printable(error)}), expected a file written by "
            "torch.save; copy the file again."
        ) from error
    if not isinstance(content, Mapping):
        raise EncoderError(
            f"{_shown(path)} holds a {type(content).__name__}, expected a state dict; "
            "save the encoder's state_dict() and use that file."
        )
    return content


def _refuse_duplicates(path: Path) -> None:
    """ValueError where a (valid) header names a tensor twice: two readers could then see different weights."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name occurs twice in its header")
        return found

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        json.loads(file.read(length), object_pairs_hook=unique)


def _describe(reading: Reading) -> list[str]:
    notes = []
    if reading.container:
        notes.append(f"Weights were taken from {printable(reading.container)} in the checkpoint.")
    if reading.prefix:
        notes.append(f"The prefix {printable(reading.prefix)} was stripped.")
    if reading.torchvision:
        notes.append("Names of torchvision's ViT were mapped to timm's.")
    if reading.dropped:
        notes.append(f"{len(reading.dropped)} tensors outside the backbone were left out: {_names(reading.dropped)}.")
    return notes


def _grey_input(backbone: nn.Module, state: dict[str, Tensor], in_chans: int | None) -> list[str]:
    """Sum a first convolution over its 3 input channels where that was asked for; changes `state`."""
    if in_chans != 1:
        return []
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            key = f"{name}.weight"
            weight = state.get(key)
            if weight is None or weight.dim() != 4 or weight.shape[1] != 3 or module.in_channels != 1:
                return []
            state[key] = weight.float().sum(1, keepdim=True)
            return [f"The first convolution ({key}) was summed over its 3 input channels."]
    return []


def _missing_counters(own: Mapping[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """Old checkpoints lack the counters of BatchNorm, which nothing here reads; changes `state`."""
    missing = [name for name in own if name.endswith(COUNTER) and name not in state]
    state.update({name: torch.zeros_like(own[name], device="cpu") for name in missing})
    return [f"{len(missing)} BatchNorm counters are not in the checkpoint and were set to 0."] if missing else []


def _check_fit(path: Path, own: Mapping[str, Tensor], state: Mapping[str, Tensor], unknown: list[str]) -> None:
    """Names, shapes and kinds of all tensors, before any of them is converted."""
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in [*state, *unknown] if name not in own]
    for name, ours in own.items():
        theirs = state.get(name)
        if theirs is None:
            continue
        if theirs.shape != ours.shape:
            problems.append(f"{name} is {list(theirs.shape)} instead of {list(ours.shape)}")
        elif theirs.layout != torch.strided or theirs.is_quantized or theirs.is_meta:
            problems.append(f"{name} is no plain tensor")
        elif theirs.is_floating_point() != ours.is_floating_point() or theirs.is_complex():
            problems.append(f"{name} is {theirs.dtype} instead of {ours.dtype}")
    if problems:
        shown = "; ".join(printable(problem) for problem in problems[:FIRST])
        more = f"; {len(problems) - FIRST} more" if len(problems) > FIRST else ""
        raise EncoderError(
            f"{_shown(path)} does not fit the encoder in {len(problems)} places ({shown}{more}), expected its very "
            "tensors; set encoder.name, encoder.args, encoder.stem, encoder.in_chans and encoder.image_size to the "
            "checkpoint's."
        )


def _widened(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    kinds = sorted({str(t.dtype).removeprefix("torch.") for n, t in state.items() if t.dtype != own[n].dtype})
    return [f"Weights in {', '.join(kinds)} were converted to the encoder's own type."] if kinds else []


def _check_values(path: Path, state: Mapping[str, Tensor]) -> None:
    """Finite, and no weight matrix of zeros: what an overflow or a file full of holes leaves."""
    try:
        check_finite(state)
    except NumericsError as error:
        raise NumericsError(f"{_shown(path)} cannot be used: {error}") from None
    zero = [name for name, t in state.items() if t.dim() > 1 and name.endswith(".weight") and not t.any()]
    if zero:
        raise EncoderError(
            f"{len(zero)} weights in {_shown(path)} are all zero ({_names(zero, 5)}), expected trained weights; "
            "copy the file again or use another checkpoint."
        )


def _names(names: list[str], first: int = FIRST) -> str:
    more = f" and {len(names) - first} more" if len(names) > first else ""
    return ", ".join(printable(name) for name in names[:first]) + more


def _shown(path: Path) -> str:
    return repr(printable(path))
