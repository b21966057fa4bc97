"""What every method shares: the context of a step, embedding a batch, and the interface.

A method composes an objective, a constraint and a schedule; it never knows which backend runs it.
Its `loss` returns a *local* scalar whose gradient, averaged over ranks, is the gradient of the
global loss, which is what DDP, FSDP2 and ZeRO average.
"""

# Shapes: n = images of this rank, V = branches, C x S x S = image, D = output dim.

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from distunlearn.config.schema import RunConfig
from distunlearn.data.schedule import Batch, concat_batches
from distunlearn.objectives.forward import Context, embed, image_mean, view_pair

__all__ = [
    "Context",
    "Method",
    "Stateless",
    "StepOutput",
    "concat_batches",
    "embed",
    "unlearn_batches",
    "image_mean",
    "view_pair",
]


@dataclass
class StepOutput:
    """Result of one step: `loss` is a scalar to minimise, `consumed` the ids that entered it, by role.

    metrics: figures to log; a tensor of one element is read after the backward, when nothing waits for it.
    """

    loss: Tensor
    metrics: dict[str, float | Tensor] = field(default_factory=dict)
    consumed: dict[str, list[str]] = field(default_factory=dict)


def unlearn_batches(cfg: RunConfig, *roles: str) -> dict[str, int]:
    """Global images per step of these roles, as the settings of forgetting have them: for `Method.batch_sizes`."""
    return {role: getattr(cfg.unlearn, f"{role}_batch") for role in roles}


class Method(Protocol):
    """A way to train or to forget.

    With gradient accumulation `loss` is called for every micro-batch of a step, each with its part of the batches.

    forgets: True where every forget id must be consumed at least once (else the run has no coverage).

    Three more functions are optional. Where a method has them, they are used:

    adjust(ctx, name, weight, part): called for every trained weight after every optimizer step, whole or in parts as
        the backend holds it; returns the weight as it shall be. `part(tensor)` cuts, out of a whole tensor of the
        weight's shape, what belongs to `weight`. It works element by element and communicates nothing.
    images_per_step(cfg, objective, step): images that `loss` passes through an encoder, for the plan of a run.
        Without it: every view of every batch once.
    forget_steps(cfg): how many steps from the start consume forget images. Without it: all.
    """

    name: str
    forgets: bool

    def batch_sizes(self, cfg: RunConfig) -> Mapping[str, int]:
        """Global images per step, by feeder name ("retain", "forget", "third_party", "members")."""
        ...

    def start(self, ctx: Context, sample: Callable[[str], Batch]) -> dict[str, float]:
        """Calibrate before the first step; `sample(role)` gives all images of a role. Returns figures to log."""
        ...

    def loss(self, ctx: Context, batches: Mapping[str, Batch]) -> StepOutput:
        """Loss of one micro-batch, which is the whole step without gradient accumulation."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs besides weights, momentum encoder and queue."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        ...


class Stateless:
    """A method without calibration and without state besides the weights."""

    def start(self, ctx: Context, sample: Callable[[str], Batch]) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        pass
