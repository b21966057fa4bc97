"""Optimizer state as plain data under the parameters' names: the same for every backend and number of processes.

    {"optimizer": "AdamW", "state": {"backbone.conv1.weight": {"step": ..., "exp_avg": [...], ...}, ...}}

On its way to and from a file an entry is called `backbone.conv1.weight/exp_avg`. Values are tensors, whole or, where
they are read back, possibly in pieces. Settings of the optimizer (rate, decay) are not kept: they follow from the
configuration and the step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distunlearn.engine.backends.tensor_shards import Stored
from distunlearn.errors import DataError


def entries_of(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, str, Tensor]]:
    """(parameter, key, value) of every parameter that has state. An optimizer's None is the same as no entry.

    Raises:
        TypeError: an entry that is no tensor, which neither AdamW nor SGD has.
    """
    for name, parameter in named.items():
        for key, value in (optimizer.state.get(parameter) or {}).items():
            if isinstance(value, Tensor):
                yield name, key, value.detach()
            elif value is not None:
                raise TypeError(f"the optimizer keeps a {type(value).__name__} as {key} of {name!r}, expected a tensor")


def nested(kind: str, entries: Iterable[tuple[str, Stored]]) -> dict[str, Any]:
    """The structure above from pairs of `parameter/key` and value. kind: the optimizer's class."""
    state: dict[str, dict[str, Stored]] = {}
    for name, value in entries:
        parameter, _, key = name.rpartition("/")
        state.setdefault(parameter, {})[key] = value
    return {"optimizer": kind, "state": state}


def spread_state(
    saved: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    place: Callable[[Stored, nn.Parameter], Tensor],
) -> None:
    """Give the optimizer the `saved` state. `place` lays a value of a parameter's shape out as that parameter is.

    Raises:
        DataError: the state is of another optimizer or another encoder.
    """
    check_state(saved, optimizer, {name: tuple(p.shape) for name, p in named.items()})
    optimizer.state.clear()
    for name, entries in saved["state"].items():
        parameter = named[name]
        optimizer.state[parameter] = {
            key: place(value, parameter) if is_per_weight(value) else counter(value, optimizer, parameter.device)
            for key, value in entries.items()
        }


def counter(value: Any, optimizer: torch.optim.Optimizer, device: torch.device) -> Any:
    """A copy of a counter where `optimizer` keeps its own: beside the weights if it is fused, else on the CPU."""
    if isinstance(value, Tensor) and optimizer.defaults.get("fused"):
        return value.to(device, copy=True)
    return copy.deepcopy(value)


def is_per_weight(value: Any) -> bool:
    """True for a tensor with an element per weight, False for a counter such as AdamW's `step`."""
    return not isinstance(value, int | float) and value.dim() > 0


def check_state(
    saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises:
    DataError: `saved` is of another optimizer, or of an encoder whose parameters are not those of `shapes`.
    """
    kind = type(optimizer).__name__
    if saved["optimizer"] != kind:
        raise DataError(
            f"the checkpoint's optimizer is {saved['optimizer']}, expected {kind}; resume with the optimizer it was "
            "written with."
        )
    for name, entries in saved["state"].items():
        if name not in shapes:
            raise DataError(
                f"the checkpoint holds optimizer state of {name!r}, which this encoder lacks; resume with the "
                "encoder it was written with."
            )
        for key, value in entries.items():
            if is_per_weight(value) and tuple(value.shape) != shapes[name]:
                raise DataError(
                    f"the checkpoint's {key} of {name!r} has shape {tuple(value.shape)}, expected {shapes[name]}; "
                    "resume with the encoder it was written with."
                )
