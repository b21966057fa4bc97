"""The line of weights from the original encoder through the one that a method made.

    theta(dose) = theta_0 + dose (theta_U - theta_0)

element by element, so that a process reads and computes its own part of a sharded weight and nothing is gathered.
Running variances of batch norms are kept at a share of the smaller end at least: beyond dose 1 a line may cross 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distunlearn.engine.backends.tensor_shards import StoredTensor

VARIANCE_FLOOR = 0.1  # of the smaller end


def between(name: str, start: Tensor, end: Tensor, dose: float) -> Tensor:
    """The elements at `dose`; at 0 and 1 exactly those of the ends. Counters are those of the nearer end.

    name: of the weight or buffer; a batch norm's `running_var` stays positive. start, end: of one shape.
    """
    if dose in (0, 1) or not end.is_floating_point():
        return start if dose < 0.5 else end
    found = torch.lerp(start, end, dose)
    if name.endswith("running_var"):
        found = torch.maximum(found, VARIANCE_FLOOR * torch.minimum(start, end))
    return found


class _Point(StoredTensor):
    """A tensor of the line, of which only what is asked for is computed."""

    def __init__(self, name: str, start: Tensor, end: Tensor, dose: float) -> None:
        self.name, self.shape, self._ends, self._dose = name, tuple(end.shape), (start, end), dose

    def part(self, start: int, count: int) -> Tensor:
        """See `StoredTensor.part`."""
        first, last = (tensor.flatten()[start : start + count] for tensor in self._ends)
        return between(self.name, first, last, self._dose)

    def whole(self) -> Tensor:
        """See `StoredTensor.whole`."""
        return between(self.name, *self._ends, self._dose)


def line(start: Mapping[str, Tensor], end: Mapping[str, Tensor], dose: float) -> dict[str, StoredTensor]:
    """Every tensor of two encoders' states at `dose`, for `Backend.load_full_state`."""
    assert start.keys() == end.keys(), "two states of one encoder"
    return {name: _Point(name, start[name], end[name], dose) for name in end}
