"""Projector, predictor and momentum encoder of a foreign checkpoint, where their shapes fit the objective.

A head is a chain of linear layers, with or without BatchNorms between them, whatever it is called: MoCo's
`encoder_q.fc`, solo-learn's `projector`, lightly's `projection_head.layers`. Its trained copy and its moving average
are told apart as those of the backbone are. A BatchNorm after the last layer (MoCo v3, SimCLR of lightly) is folded
into it with its running statistics; a bias before a BatchNorm moves into the running mean.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distunlearn.encoders.checkpoint_names import COUNTER, Reading, precedence
from distunlearn.encoders.model import ContrastiveModel, Head, MomentumEncoder
from distunlearn.encoders.weights import Loaded, bare, check_finite

TENSORS = 40  # of a head, at most
EPS = 1e-5  # of nn.BatchNorm1d


class _Found(NamedTuple):
    prefix: str
    layers: list[dict[str, Tensor]]


class Shape(NamedTuple):
    """Of a head in a file. widths: of the outputs of its linear layers. norm: whether BatchNorms stand between them."""

    prefix: str
    inputs: int
    widths: tuple[int, ...]
    norm: bool

    @property
    def layers(self) -> int:
        return len(self.widths)

    @property
    def is_predictor(self) -> bool:
        return "pred" in self.prefix


def head_shapes(
    tensors: Mapping[str, Tensor], reading: Reading, copies: Sequence[Reading], embed_dim: int
) -> list[Shape]:
    """Chains of linear layers beside a backbone, of its own copy: those that begin at the embedding, and predictors."""
    found = []
    beside = {name: tensors[name] for name in reading.outside}
    for head in _heads(beside, [copy.prefix for copy in (reading, *copies)]):
        linear = [layer["weight"].shape for layer in head.layers if layer.get("weight", torch.ones(0)).dim() == 2]
        if not linear or precedence(head.prefix) != precedence(reading.prefix):
            continue
        norm = any("running_mean" in layer for layer in head.layers[:-1])
        shape = Shape(head.prefix, linear[0][1], tuple(shape[0] for shape in linear), norm)
        if shape.is_predictor or shape.inputs == embed_dim:
            found.append(shape)
    return found


class Taken(NamedTuple):
    """What was taken: a sentence each, and the prefixes below which it stood."""

    notes: list[str]
    prefixes: list[str]


def take_heads(model: ContrastiveModel, momentum: MomentumEncoder | None, loaded: Loaded) -> Taken | None:
    """Load the heads of a file whose backbone is loaded. None: nothing was taken.

    The momentum encoder gets its own copies where the file has them, else those of the model.
    """
    found = _heads(loaded.tensors, [*(copy.prefix for copy in (loaded.reading, *loaded.copies))])
    level = precedence(loaded.reading.prefix)
    both = {"projector": model.projector, "predictor": model.predictor}
    heads = {name: head for name, head in both.items() if head is not None}
    chosen: dict[str, _Found] = {}
    states: dict[str, dict[str, Tensor]] = {}
    for name, head in heads.items():
        named = [f for f in found if precedence(f.prefix) == level and ("pred" in f.prefix) == (name == "predictor")]
        fitting = [(f, state) for f in named if (state := _state(f, head)) is not None]
        if len(fitting) != 1:
            return None
        chosen[name], states[name] = fitting[0]
    check_finite({f"{name}.{key}": value for name, state in states.items() for key, value in state.items()})
    for name, state in states.items():
        heads[name].load_state_dict(state)
    where = " and ".join(f"the {name} from below {bare(head.prefix)}" for name, head in chosen.items())
    taken = Taken([f"The checkpoint's own heads were taken: {where}."], [head.prefix for head in chosen.values()])
    if momentum is not None:
        _take_momentum(model, momentum, loaded, found, taken)
    return taken


def other_heads(loaded: Loaded, embed_dim: int) -> list[str]:
    """A sentence about chains of linear layers that begin at the embedding, for which there are settings."""
    described = []
    for found in head_shapes(loaded.tensors, loaded.reading, loaded.copies, embed_dim):
        if found.layers > 1 and found.inputs == embed_dim:
            norm = "with" if found.norm else "without"
            widths = "-".join(str(n) for n in (embed_dim, *found.widths))
            described.append(f"below {bare(found.prefix)} {widths} {norm} BatchNorm")
    settings = "objective.hidden_dim, output_dim, head_layers and head_norm say which shapes fit."
    return [f"Its own are {' and '.join(described[:3])}; {settings}"] if described else []


def _take_momentum(
    model: ContrastiveModel, momentum: MomentumEncoder, loaded: Loaded, found: list[_Found], taken: Taken
) -> None:
    """Load the momentum encoder, and add to `taken` what was."""
    momentum.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("predictor.")})
    copies = [copy for copy in loaded.copies if precedence(copy.prefix) == 2]
    named = [f for f in found if precedence(f.prefix) == 2 and "pred" not in f.prefix]
    fitting = [(f, state) for f in named if (state := _state(f, model.projector)) is not None]
    if len(copies) != 1 or len(fitting) != 1:
        taken.notes.append("It holds no momentum encoder with its projector; it begins as a copy of the encoder.")
        return
    own = momentum.model.backbone.state_dict()
    state = {name: value.to(own[name].dtype) for name, value in copies[0].state.items()}
    check_finite(state)
    momentum.model.backbone.load_state_dict({**own, **state})
    momentum.model.projector.load_state_dict(fitting[0][1])
    taken.notes.append(f"The momentum encoder was taken from below {bare(copies[0].prefix)}.")
    taken.prefixes.extend((copies[0].prefix, fitting[0][0].prefix))


def _heads(tensors: Mapping[str, Tensor], backbones: list[str]) -> list[_Found]:
    """Every chain of linear layers, once, by the longest prefix that holds it."""
    below: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        parts = name.split(".")
        for end in range(1, len(parts) - 1):
            below[".".join(parts[:end]) + "."].append(name)
    found: dict[tuple[str, ...], _Found] = {}
    for prefix, names in below.items():
        if len(names) > TENSORS or any(backbone.startswith(prefix) for backbone in backbones):
            continue
        layers: dict[str, dict[str, Tensor]] = {}
        for name in names:
            if not name.endswith(COUNTER):
                path, _, part = name.rpartition(".")
                layers.setdefault(path, {})[part] = tensors[name]
        found[tuple(names)] = _Found(prefix, list(layers.values()))
    return list(found.values())


def _state(found: _Found, head: Head) -> dict[str, Tensor] | None:
    """The head's state; None where the layers are others."""
    state: dict[str, Tensor] = {}
    layers = [{name: tensor.float() for name, tensor in layer.items()} for layer in found.layers]
    moved = None
    for name, part in head.named_modules():
        if not isinstance(part, (nn.Linear, nn.BatchNorm1d)):
            continue
        layer = layers.pop(0) if layers else {}
        kind = "running_mean" if isinstance(part, nn.BatchNorm1d) else "weight"
        if kind not in layer or layer[kind].shape != getattr(part, kind).shape:
            return None
        if isinstance(part, nn.BatchNorm1d):
            if moved is not None:
                layer["running_mean"] = layer["running_mean"] - moved
            layer.setdefault("weight", torch.ones_like(layer["running_mean"]))
            layer.setdefault("bias", torch.zeros_like(layer["running_mean"]))
            layer["num_batches_tracked"] = torch.tensor(0)
        elif part.bias is None:
            moved = layer.pop("bias", None)
        else:
            layer.setdefault("bias", torch.zeros(len(layer["weight"])))
        state |= {f"{name}.{key}": value for key, value in layer.items()}
    if layers and layers[0].get("running_mean", torch.ones(0)).shape == state["last.bias"].shape:
        _fold(state, layers.pop(0))
    own = head.state_dict()
    same = not layers and state.keys() == own.keys() and all(own[k].shape == v.shape for k, v in state.items())
    return state if same else None


def _fold(state: dict[str, Tensor], norm: Mapping[str, Tensor]) -> None:
    """A BatchNorm behind the last layer, with running statistics, as part of that layer."""
    scale = norm.get("weight", torch.ones(1)) / (norm["running_var"] + EPS).sqrt()
    state["last.weight"] = state["last.weight"] * scale[:, None]
    state["last.bias"] = (state["last.bias"] - norm["running_mean"]) * scale + norm.get("bias", torch.zeros(1))
