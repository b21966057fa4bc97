"""Foreign weights into a backbone: nothing in the file is executed, and nothing that does not fit is let through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distunlearn.common.text import printable
from distunlearn.config.preprocessing import beside
from distunlearn.config.schema import EncoderConfig
from distunlearn.encoders.checkpoint_file import read_checkpoint, shown
from distunlearn.encoders.checkpoint_names import COUNTER, Reading, flatten, whole_readings
from distunlearn.errors import EncoderError, NumericsError

FIRST = 10  # names shown of a longer list
STEM = "conv1.weight"  # of ResNets


class Loaded(NamedTuple):
    """What was done: sentences for the log, how the backbone was read, its other copies, and all tensors by name."""

    done: list[str]
    reading: Reading
    copies: list[Reading]
    tensors: dict[str, Tensor]

    @property
    def notes(self) -> list[str]:
        """What was done and, if nothing else is taken from the file, what was left out."""
        return [*self.done, *self.left_out()]

    def left_out(self, taken: Sequence[str] = ()) -> list[str]:
        """Sentences about what was left out. taken: prefixes of what was taken besides the backbone."""
        notes = []
        copies = [copy.prefix for copy in self.copies if copy.prefix not in taken]
        if copies:
            others = ", ".join(bare(prefix) or "the top" for prefix in copies)
            notes.append(f"Copies below {others} were not taken; encoder.prefix chooses another one.")
        elsewhere = tuple(prefix for prefix in (*taken, *(copy.prefix for copy in self.copies)) if prefix)
        outside = [name for name in self.reading.outside if not name.startswith(elsewhere)]
        if outside:
            number = "1 tensor outside it was" if len(outside) == 1 else f"{len(outside)} tensors outside it were"
            notes.append(f"The backbone fits; {number} left out: {_names(outside)}.")
        return notes


def bare(prefix: str) -> str:
    """A prefix fit to be printed, without the dot at its end."""
    return printable(prefix.removesuffix("."))


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Raise NumericsError naming up to 5 tensors of `state` that hold NaN or infinite values."""
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        raise NumericsError(
            f"{len(bad)} of {len(state)} tensors hold NaN or infinite values ({_names(bad, 5)}), expected finite "
            "weights; go back to an earlier checkpoint or lower the learning rate."
        )


def load_backbone(
    backbone: nn.Module,
    path: str | Path,
    *,
    in_chans: int | None = None,
    prefix: str | None = None,
    ignore: Sequence[str] = (),
) -> Loaded:
    """Load a checkpoint of another program into a backbone, all tensors or none.

    Args:
        backbone: as `create_backbone` makes it.
        path: a file of safetensors or of torch.save, whatever its ending; see `read_checkpoint`.
        in_chans: 1 allows a first convolution for 3 channels to be summed to 1, which is exact for grey images;
            None: strict.
        prefix, ignore: see `whole_readings`.

    Raises:
        EncoderError: a file that is missing, damaged, unsafe, or does not fit; the backbone is unchanged.
        NumericsError: weights with NaN or infinite values, also after conversion to fp32; the backbone is unchanged.
    """
    path = Path(path)
    own = backbone.state_dict()
    tensors = flatten(read_checkpoint(path))
    readings = whole_readings(tensors, backbone, prefix=prefix, ignore=ignore)
    if not readings or not tensors:
        what = f"under encoder.prefix={printable(prefix)}" if tensors else "by names"
        raise EncoderError(
            f"{shown(path)} holds no tensors {what}, expected a state dict; save the encoder's state_dict() and use "
            "that file, or set encoder.prefix to what stands before its names."
        )
    reading, *copies = readings
    state = dict(reading.state)
    notes = _describe(reading) + _activation(path, backbone, reading)
    grey = _grey_input(backbone, state, in_chans)
    _check_fit(path, own, state, reading)
    notes += grey + _resampled(tensors, reading, own) + _missing_counters(own, state) + _widened(own, state)
    state = {name: tensor.to(own[name].dtype) for name, tensor in state.items()}
    _check_values(path, state)
    backbone.load_state_dict(state)
    return Loaded(notes, reading, copies, tensors)


def load_checkpoint(backbone: nn.Module, encoder: EncoderConfig) -> Loaded:
    """`load_backbone` of `encoder.checkpoint`, as the settings say."""
    assert encoder.checkpoint is not None, "there is a checkpoint"
    return load_backbone(
        backbone, encoder.checkpoint, in_chans=encoder.in_chans, prefix=encoder.prefix, ignore=encoder.ignore
    )


def _describe(reading: Reading) -> list[str]:
    notes = []
    if reading.prefix:
        notes.append(f"The backbone was read from below {bare(reading.prefix)} in the checkpoint.")
    if reading.dialect != "timm":
        notes.append(f"Its names, of {reading.dialect}, were mapped to timm's.")
    return notes


def _activation(path: Path, backbone: nn.Module, reading: Reading) -> list[str]:
    """No tensor says which GELU a transformer has; a configuration of Hugging Face's does.

    Raises:
        EncoderError: it says another one than the backbone has.
    """
    said = {str(config["hidden_act"]) for config in beside(path) if "hidden_act" in config}
    quick = any(type(part).__name__ == "QuickGELU" for part in backbone.modules())
    if len(said) == 1 and reading.dialect.startswith("Hugging Face"):
        if ("quick_gelu" in said) != quick:
            raise EncoderError(
                f"the configuration beside {shown(path)} has the activation {printable(said.pop())}, the encoder "
                f"{'QuickGELU' if quick else 'another one'}; expected the same; set encoder.name to timm's model "
                f"{'without' if quick else 'with'} quickgelu in its name."
            )
        return []
    if "CLIP" in reading.dialect or reading.dialect == "open_clip":
        return ["A file does not say which GELU a CLIP has: OpenAI's need an encoder.name with quickgelu."]
    return []


def _resampled(tensors: Mapping[str, Tensor], reading: Reading, own: Mapping[str, Tensor]) -> list[str]:
    """timm fits position embeddings of another image size, and patch embeddings of another patch size."""
    found = [
        f"{name} from {list(tensors[f'{reading.prefix}{name}'].shape)} to {list(own[name].shape)}"
        for name in reading.state
        if f"{reading.prefix}{name}" in tensors and name in ("pos_embed", "patch_embed.proj.weight")
        and tensors[f"{reading.prefix}{name}"].shape != own[name].shape
    ]  # fmt: skip
    return [f"timm resampled {' and '.join(found)}."] if found else []


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


def _check_fit(path: Path, own: Mapping[str, Tensor], state: Mapping[str, Tensor], reading: Reading) -> None:
    """Names, shapes and kinds of all tensors, before any of them is converted."""
    problems = [f"missing {name}" for name in reading.missing]
    problems += [
        f"{name} is {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in own if name in state and state[name].shape != own[name].shape
    ]  # fmt: skip
    for name, theirs in state.items():
        if theirs.layout != torch.strided or theirs.is_quantized or theirs.is_meta:
            problems.append(f"{name} is no plain tensor")
        elif theirs.is_floating_point() != own[name].is_floating_point() or theirs.is_complex():
            problems.append(f"{name} is {theirs.dtype} instead of {own[name].dtype}")
    if not problems and not reading.inside:
        return
    listed = [*problems, *(f"unexpected {name}" for name in reading.inside)]
    listing = "; ".join(printable(problem) for problem in listed[:FIRST])
    more = f"; {len(listed) - FIRST} more" if len(listed) > FIRST else ""
    where = f" below {bare(reading.prefix)}" if reading.prefix else ""
    raise EncoderError(
        f"{shown(path)} does not fit the encoder{where} in {len(listed)} places ({listing}{more}), expected its very "
        f"tensors; {_advice(own, state, reading, problems)}"
    )


def _advice(own: Mapping[str, Tensor], state: Mapping[str, Tensor], reading: Reading, problems: Sequence[str]) -> str:
    if not problems:
        return (
            "all of the encoder's are there, and the others would be lost in silence: set encoder.name and "
            "encoder.args to the larger model, or encoder.ignore to a pattern of names that may be left out."
        )
    if STEM in state and STEM in own and state[STEM].shape[2:] == (3, 3) and own[STEM].shape[2:] == (7, 7):
        return (
            "this is a ResNet with the small stem for CIFAR: set encoder.name=distunlearn.encoders.cifar:resnet, "
            "encoder.args={name: resnet18} (or another ResNet) and encoder.stem=standard."
        )
    if reading.fitting == 0:
        first = [name for name in reading.outside or list(state)][:3]
        return (
            f"none of its names is known (it begins with {_names(first)}): set encoder.name to the checkpoint's model, "
            "encoder.prefix to what stands before its names, or save it from timm's model."
        )
    return (
        "set encoder.name, encoder.args, encoder.stem, encoder.in_chans and encoder.image_size to the checkpoint's, or "
        "encoder.prefix to another part of it."
    )


def _widened(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    kinds = sorted({str(t.dtype).removeprefix("torch.") for n, t in state.items() if t.dtype != own[n].dtype})
    return [f"Weights in {', '.join(kinds)} were converted to the encoder's own type."] if kinds else []


def _check_values(path: Path, state: Mapping[str, Tensor]) -> None:
    """Finite, and no weight matrix of zeros: what an overflow or a file full of holes leaves."""
    try:
        check_finite(state)
    except NumericsError as error:
        raise NumericsError(f"{shown(path)} cannot be used: {error}") from None
    zero = [name for name, t in state.items() if t.dim() > 1 and name.endswith(".weight") and not t.any()]
    if zero:
        raise EncoderError(
            f"{len(zero)} weights in {shown(path)} are all zero ({_names(zero, 5)}), expected trained weights; "
            "copy the file again or use another checkpoint."
        )


def _names(names: list[str], first: int = FIRST) -> str:
    more = f" and {len(names) - first} more" if len(names) > first else ""
    return ", ".join(printable(name) for name in names[:first]) + more
