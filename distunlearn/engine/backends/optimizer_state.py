"""Optimizer state as plain data under the parameters' names: the same for every backend and number of processes.

    {"optimizer": "AdamW", "state": {"backbone.conv1.weight": {"step": ..., "exp_avg": [...], ...}, ...}}

Tensors are whole (unsharded) and on the CPU. Settings of the optimizer (rate, decay) are not kept: they follow
from the configuration and the step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distunlearn.errors import DataError

__all__ = ["check_state", "collect_state", "is_per_weight", "spread_state"]


def collect_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], whole: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """The state of every parameter that has any. `whole` makes a full tensor of a possibly sharded one."""
    state: dict[str, dict[str, Any]] = {}
    for name, parameter in named.items():
        entries = optimizer.state.get(parameter)
        if entries:
            state[name] = {k: _plain(v, whole) for k, v in entries.items()}
    return {"optimizer": type(optimizer).__name__, "state": state}


def _plain(value: Any, whole: Callable[[Tensor], Tensor]) -> Any:
    return whole(value.detach()).to("cpu", copy=True) if isinstance(value, Tensor) else value


def spread_state(
    saved: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    place: Callable[[Tensor, nn.Parameter], Tensor],
) -> None:
    """Inverse of `collect_state`. `place` lays a full CPU tensor of a parameter's shape out as that parameter is.

    Raises:
        DataError: the state is of another optimizer or another encoder.
    """
    check_state(saved, optimizer, {name: tuple(p.shape) for name, p in named.items()})
    optimizer.state.clear()
    for name, entries in saved["state"].items():
        parameter = named[name]
        optimizer.state[parameter] = {
            key: place(value, parameter) if is_per_weight(value) else copy.deepcopy(value)
            for key, value in entries.items()
        }


def is_per_weight(value: Any) -> bool:
    """True for a tensor with an element per weight, False for a counter such as AdamW's `step`."""
    return isinstance(value, Tensor) and value.dim() > 0


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
