"""An encoder of the user's own: any module [n, C, S, S] -> [n, E] of floats.

It is named in `encoder.name` (`package.module:Name`, `path/to/file.py:Name` or an entry point of
`distunlearn.encoders`: a class or function that returns a module, given `encoder.args`), or handed over from Python as
an object. A named one and a function have fresh weights whenever they are called. Of an object fresh weights are a copy
on which every module that holds parameters has had its `reset_parameters` called; where one has no such function the
encoder cannot be retrained.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from distunlearn.common import plugins
from distunlearn.common.text import printable
from distunlearn.config.schema import EncoderConfig
from distunlearn.errors import EncoderError

GROUP = "distunlearn.encoders"
CHANCE = ("DropPath", "StochasticDepth", "PatchDropout", "DropBlock2d")


@dataclass(frozen=True)
class _HandedOver:
    template: nn.Module  # with the weights it came with
    factory: Callable[[], nn.Module] | None


_OBJECTS: dict[str, _HandedOver] = {}


def hand_over(encoder: nn.Module, factory: Callable[[], nn.Module] | None = None) -> str:
    """Keep a copy of an encoder for this process and return the name by which settings have it.

    factory: returns one with fresh weights; None: see `without_reset`.
    """
    name = f"{plugins.OBJECT}{type(encoder).__name__}"
    _OBJECTS[name] = _HandedOver(copy.deepcopy(encoder).float().requires_grad_(True), factory)
    return name


def is_own(name: str) -> bool:
    """Whether `encoder.name` is not timm's."""
    place = name.rpartition(":")[0]
    if name.startswith(plugins.OBJECT) or place.endswith(".py"):
        return True
    if place and place != "timm":
        return plugins.DOTTED.fullmatch(place) is not None
    return not place and name in plugins.names({}, GROUP)


def without_reset(name: str) -> list[str]:
    """Names of the modules of an object that hold parameters and cannot set them anew; empty if it can be retrained."""
    kept = _OBJECTS.get(name)
    if kept is None or kept.factory is not None:
        return []
    return [
        path or "the encoder itself"
        for path, part in kept.template.named_modules()
        if _holds(part) and not _reset(part)
    ]


def create_own(encoder: EncoderConfig) -> nn.Module:
    """The module, checked by a forward of zeros; with fresh weights from the global generator but for `without_reset`.

    Raises:
        EncoderError: it cannot be had, gives no [n, E] of floats, or has weights that take no part in it.
        ConfigError: see `plugins.resolve`.
    """
    module = _made(encoder).float().requires_grad_(True)
    without_chance(module)
    _check(module, encoder)
    return module


def embedding_size(module: nn.Module, shape: tuple[int, int, int]) -> int:
    """E, found by a forward of two images of zeros [C, S, S]; the module is left as it was."""
    return _embed(module, shape).shape[1]


def locate(name: str) -> Callable[..., nn.Module]:
    """What makes the encoder of this name. It is then among `plugins.loaded`, which decides the digest of the code.

    Raises:
        ConfigError: see `plugins.resolve`.
    """
    kept = _OBJECTS.get(name)
    if kept is None:
        return plugins.resolve(name, {}, None, GROUP, "encoder.name")
    plugins.remember(type(kept.template))
    plugins.remember(kept.factory)
    return kept.factory or functools.partial(_afresh, kept.template)


def _made(encoder: EncoderConfig) -> nn.Module:
    name, make = encoder.name, locate(encoder.name)
    if name in _OBJECTS:
        if encoder.args:
            raise EncoderError("encoder.args is set, but the encoder is an object that is made already; remove it.")
        made = make()
    else:
        try:
            made = make(**encoder.args)
        except Exception as error:
            raise EncoderError(
                f"{printable(name)} cannot be made ({type(error).__name__}: {printable(str(error), 200)}), expected a "
                "class or function that takes encoder.args and returns a module; correct one of the two."
            ) from error
    if not isinstance(made, nn.Module):
        raise EncoderError(f"{printable(name)} gives a {type(made).__name__}, expected a torch.nn.Module; return one.")
    return made


def _afresh(template: nn.Module) -> nn.Module:
    module = copy.deepcopy(template)
    holders = [part for part in module.modules() if _holds(part)]
    if all(map(_reset, holders)):
        for part in holders:
            _reset(part)()  # type: ignore[misc]
    return module


def _holds(part: nn.Module) -> bool:
    return any(weight is not None for weight in part._parameters.values())


def _reset(part: nn.Module) -> Callable[[], None] | None:
    return getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)


def without_chance(module: nn.Module) -> None:
    """No dropout, of units or of paths (timm's, torchvision's): compared images must not depend on chance."""
    for part in module.modules():
        kind = type(part).__name__
        for name in ("p", "drop_prob", "drop_rate", "prob"):
            if isinstance(getattr(part, name, None), float) and (
                name == "drop_rate" or isinstance(part, _DropoutNd) or kind in CHANCE
            ):
                setattr(part, name, 0.0)


def _check(module: nn.Module, encoder: EncoderConfig) -> None:
    """One embedding per image, of the size that is declared, in which every weight takes part."""
    name, shape = printable(encoder.name), (encoder.in_chans, encoder.image_size, encoder.image_size)
    if not any(True for _ in module.parameters()):
        raise EncoderError(f"{name} has no weights, expected an encoder to train; hand over another module.")
    try:
        with torch.enable_grad():
            embedding = _embed(module, shape)
            embedding.sum().backward()
    except EncoderError:
        raise
    except Exception as error:
        raise EncoderError(
            f"{name} cannot embed images of {list(shape)} ({type(error).__name__}: {printable(str(error), 200)}), "
            "expected a forward [n, C, S, S] -> [n, E]; set encoder.in_chans and encoder.image_size to what it takes."
        ) from error
    idle = [path for path, weight in module.named_parameters() if weight.grad is None]
    module.zero_grad(set_to_none=True)
    if idle:
        raise EncoderError(
            f"{len(idle)} weights of {name} take no part in the embedding ({printable(', '.join(idle[:5]))}), expected "
            "every weight to be trained; remove them, such as a classifier."
        )
    if encoder.embed_dim not in (None, embedding.shape[1]):
        raise EncoderError(
            f"encoder.embed_dim is {encoder.embed_dim}, but {name} embeds into {embedding.shape[1]} dimensions; "
            f"set encoder.embed_dim={embedding.shape[1]}."
        )


def _embed(module: nn.Module, shape: tuple[int, int, int]) -> Tensor:
    modes = [(part, part.training) for part in module.modules()]
    try:
        embedding = module.eval()(torch.zeros(2, *shape))
    finally:
        for part, training in modes:
            part.training = training
    fits = isinstance(embedding, Tensor) and embedding.is_floating_point()
    if not fits or embedding.dim() != 2 or len(embedding) != 2:
        found = list(embedding.shape) if isinstance(embedding, Tensor) else type(embedding).__name__
        raise EncoderError(
            f"the encoder gives {found} for 2 images, expected floats [2, E], one vector for each; return a pooled, "
            "flat embedding."
        )
    return embedding
