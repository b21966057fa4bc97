"""The repeated parts of an encoder: what is sharded, recomputed or compiled one at a time.

timm names them alike: `blocks` of a ViT, `layer1` to `layer4` of a ResNet, `stages` with `blocks` inside of the ResNet
that makes the patches of a hybrid ViT.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

REPEATED = ("blocks", "layers", "stages")  # containers of repeated parts
RESNET_STAGE = re.compile(r"layer\d+")


def _containers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, container), outer ones first."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Sequential | nn.ModuleList) and (name in REPEATED or RESNET_STAGE.fullmatch(name)):
                yield name, child


def _with_weights(parts: list[nn.Module]) -> list[nn.Module]:
    return [part for part in parts if any(True for _ in part.parameters())]


def shard_units(model: nn.Module) -> list[nn.Module]:
    """Parts that are gathered and freed one at a time: blocks of a ViT, stages of a ResNet; inner ones first.

    A ResNet's stage is one unit, for its blocks are small and every unit costs a collective.
    """
    units: list[nn.Module] = []
    for name, container in _containers(model):
        units.extend([container] if RESNET_STAGE.fullmatch(name) else container.children())
    return _with_weights(units[::-1])


def blocks(model: nn.Module) -> list[nn.Module]:
    """The smallest repeated parts: blocks of a ViT or ResNet; none lies inside another."""
    parts = [child for _, container in _containers(model) for child in container.children()]
    return [part for part in _with_weights(parts) if not set(part.modules()) & (set(parts) - {part})]


def replace_forward(part: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[[], None]:
    """Let `part` run make(its forward) as its forward; returns what undoes it, the latest first."""
    before = part.__dict__.get("forward")
    part.forward = make(part.forward)

    def undo() -> None:
        if before is None:
            del part.forward
        else:
            part.forward = before

    return undo


@contextmanager
def replaced_forwards(parts: Iterable[nn.Module], make: Callable[[int, Any], Callable[..., Any]]) -> Iterator[None]:
    """Within the block the i-th part runs make(i, its forward) as its forward, also in compiled code."""
    undo = [replace_forward(part, functools.partial(make, index)) for index, part in enumerate(parts)]
    try:
        yield
    finally:
        for take_back in reversed(undo):
            take_back()
