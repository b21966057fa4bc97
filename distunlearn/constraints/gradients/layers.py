"""Which layers per-sample probes can follow, by what they are and by what is seen of them in a forward.

A probe takes the rows of a layer for those of one sample after the other: row i is sample i, or rows i m to (i + 1) m
are (windows of an image, as in Swin). Encoders may do otherwise: tokens first, a table that all images share, a weight
that is used past its layer's forward. So three images A, B, A of noise go through the encoder once:

* what goes into a layer must be alike in the first and the third part of its rows;
* the gradient of an output of B by what comes out of it must be 0 outside the second part.

A layer that fails is left out, and said so.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.conv import _ConvNd

from distunlearn.encoders.activation_checkpointing import recomputing
from distunlearn.encoders.model import ContrastiveModel, EncoderOutput, batchnorm_mode
from distunlearn.errors import ConfigError

Layer = nn.Linear | nn.Conv2d

IMAGES = 3  # A, B, A
ALIKE = 1e-2  # relative difference of what two rows of one image may have by rounding
NAMED = 3  # layers that a message names of every kind

_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[dict[str, Layer], dict[str, str]]]] = (
    weakref.WeakKeyDictionary()
)


def probed_layers(model: nn.Module, pattern: str | None = None, *, trained: bool = True) -> dict[str, Layer]:
    """Linear and convolutional layers of `model` whose name the regular expression finds, by name; None: all.

    Layers that compute something else than their class (weight standardisation, padding of their own), convolutions in
    groups or padded with other than zeros are left out: a probe would not be a change of their weight.

    Raises:
        ConfigError: no layer is left.
    """
    layers, left = _by_kind(model, pattern, trained)
    return _some(layers, left, pattern)


def followed_layers(
    model: ContrastiveModel,
    network: Callable[[Tensor], EncoderOutput],
    pattern: str | None = None,
    *,
    trained: bool = True,
    note: Callable[[str], None] | None = None,
) -> dict[str, Layer]:
    """`probed_layers` less those whose rows are not samples, found once for a model. Collective: one forward.

    Args:
        network: runs `model`, as a pass does that is differentiated by itself.
        note: told once which layers are left out.

    Raises:
        ConfigError: no layer is left.
    """
    found = _known.setdefault(model, {})
    if (pattern, trained) not in found:
        layers, left = _by_kind(model, pattern, trained)
        left |= _seen_otherwise(model, network, layers)
        found[pattern, trained] = {n: layer for n, layer in layers.items() if n not in left}, left
        if note is not None and left:
            note(f"{len(layers) - len(left.keys() & layers)} layers are probed; left out: {left_out_text(left)}")
    return _some(*found[pattern, trained], pattern)


def left_out(
    model: ContrastiveModel, network: Callable[[Tensor], EncoderOutput], pattern: str | None = None
) -> dict[str, str]:
    """Name and reason of every layer that `followed_layers` leaves out."""
    followed_layers(model, network, pattern)
    return _known[model][pattern, True][1]


def left_out_text(left: dict[str, str]) -> str:
    """The names by reason, a few of each."""
    return "; ".join(left_out_parts(left))


def left_out_parts(left: dict[str, str]) -> list[str]:
    """`left_out_text`, a text a reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left.items():
        reasons.setdefault(reason, []).append(name)
    return [
        f"{len(names)} {reason} ({', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''})"
        for reason, names in reasons.items()
    ]


def _some(layers: dict[str, Layer], left: dict[str, str], pattern: str | None) -> dict[str, Layer]:
    if layers:
        return layers
    but = f" that probes can follow; left out: {left_out_text(left)}" if left else ""
    raise ConfigError(
        f"constraint.layers={pattern} finds no trained nn.Linear or nn.Conv2d of the encoder{but}; expected part of a "
        "layer's name; set it to null for all layers, or set constraint.evaluator=head."
    )


def _by_kind(model: nn.Module, pattern: str | None, trained: bool) -> tuple[dict[str, Layer], dict[str, str]]:
    """Layers that can be probed by what they are; name and reason of others."""
    layers: dict[str, Layer] = {}
    left: dict[str, str] = {}
    for name, layer in model.named_modules():
        kinds = (nn.Linear, _ConvNd, nn.MultiheadAttention, nn.RNNBase)
        if not isinstance(layer, kinds) or not re.search(pattern or "", name):
            continue
        if trained and not any(weight.requires_grad for weight in layer.parameters(recurse=False)):
            continue
        if not isinstance(layer, Layer):
            left[name] = "neither nn.Linear nor nn.Conv2d"
        elif type(layer).forward not in (nn.Linear.forward, nn.Conv2d.forward):
            left[name] = "with a forward of their own"
        elif isinstance(layer, nn.Conv2d) and layer.groups != 1:
            left[name] = "convolutions in groups"
        elif isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
            left[name] = "convolutions that are not padded by a number of zeros"
        else:
            layers[name] = layer
    return layers, left


def _seen_otherwise(
    model: ContrastiveModel, network: Callable[[Tensor], EncoderOutput], layers: dict[str, Layer]
) -> dict[str, str]:
    """Name and reason of layers whose rows are not those of one image after the other; see the module's text."""
    weight = next(model.parameters())
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    pair = torch.rand(2, *model.image_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = pair[[0, 1, 0]].to(weight.device, weight.dtype)
    with torch.enable_grad(), batchnorm_mode(model, "eval"), _watching(layers, calls, weight.device):
        output = network(images).output
        outputs = [out for seen in calls.values() for _, out in seen]
        found = torch.autograd.grad(output[1].sum(), outputs, allow_unused=True) if outputs else ()
    of = [(name, x) for name, seen in calls.items() for x, _ in seen]
    why: dict[str, list[str | None]] = {name: [] for name in calls}
    for (name, x), delta in zip(of, found, strict=True):
        why[name].append(_reason(layers[name], x, delta))
    left = {}
    for name, reasons in why.items():
        if not reasons:
            left[name] = "whose weight is used past their own forward, or not at all"
        elif any(reasons):
            left[name] = next(filter(None, reasons))
    return left


@contextmanager
def _watching(layers: dict[str, Layer], calls: dict[str, list], device: torch.device) -> Iterator[None]:
    anchor = torch.zeros((), device=device, requires_grad=True)  # so that every output has a gradient

    def hook(name: str) -> Callable[..., Tensor]:
        def keep(layer: Layer, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            output = output + anchor.to(output.dtype)
            if not recomputing():
                x = args[0].detach().clone()  # a copy: fsdp2 frees a weight that is handed on as it is
                calls[name].append((x, output))
            return output

        return keep

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reason(layer: Layer, x: Tensor, delta: Tensor | None) -> str | None:
    if delta is None:
        return "that take no part in the output"
    if x.shape[0] % IMAGES or delta.shape[0] % IMAGES:
        return "whose rows are not samples"
    if isinstance(layer, nn.Conv2d) and x.shape[0] != IMAGES:
        return "convolutions of parts of images"
    if isinstance(x, FakeTensor):
        return None  # a plan's: there are no values to look at
    parts = x.unflatten(0, (IMAGES, -1)).float()
    outside = delta.unflatten(0, (IMAGES, -1))[[0, 2]]
    alike = (parts[0] - parts[2]).norm() <= ALIKE * parts[0].norm()
    return None if bool(alike) and not bool(outside.any()) else "whose rows are not those of one image after the other"
