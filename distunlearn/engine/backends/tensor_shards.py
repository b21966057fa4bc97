"""Tensors in pieces: what one process saves of a tensor, and a tensor that is read back from the pieces of all.

A piece is a run of elements of the flattened tensor. Every sharding used here is of that kind: FSDP2 splits rows,
DeepSpeed splits flattened weights. Which processes wrote the pieces is of no matter to the one that reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distunlearn.errors import DataError


@dataclass(frozen=True)
class Piece:
    """Elements of the tensor `name` of shape `shape`.

    start: None: `values` is the whole tensor, in its shape; else `values` is flat, and its first element is the one at
        this place of the flattened whole.
    """

    name: str
    values: Tensor
    shape: tuple[int, ...]
    start: int | None = None


class StoredTensor:
    """A tensor on disk, of which only what is asked for is read.

    Args:
        pieces: (first element, number of elements, read), in any order; `read(a, b)` gives elements a to b of the
            piece, flat, on the CPU.

    Raises:
        DataError: the pieces leave a gap, or overlap.
    """

    def __init__(
        self, name: str, shape: Sequence[int], pieces: Sequence[tuple[int, int, Callable[[int, int], Tensor]]]
    ) -> None:
        self.name, self.shape = name, tuple(shape)
        self._pieces = sorted(pieces, key=lambda piece: piece[0])
        end = 0
        for start, count, _ in self._pieces:
            if start != end:
                break
            end += count
        if end != math.prod(self.shape) or len(self._pieces) == 0:
            raise DataError(
                f"the pieces of {name!r} in the checkpoint do not make up a tensor of shape {self.shape}: they break "
                f"off at element {end}; go back to an earlier checkpoint."
            )

    def dim(self) -> int:
        """As of a tensor."""
        return len(self.shape)

    def part(self, start: int, count: int) -> Tensor:
        """`count` elements of the flattened tensor from `start` on: [count]."""
        found = []
        for first, size, read in self._pieces:
            a, b = max(start, first), min(start + count, first + size)
            if a < b:
                found.append(read(a - first, b - first))
        return torch.cat(found) if len(found) > 1 else found[0] if found else self._pieces[0][2](0, 0)

    def whole(self) -> Tensor:
        """All of it, in its shape."""
        return self.part(0, math.prod(self.shape)).view(self.shape)


Stored = Tensor | StoredTensor


def whole(value: Stored) -> Tensor:
    """All of a tensor, wherever it is."""
    return value if isinstance(value, Tensor) else value.whole()


def part(value: Stored, start: int, count: int) -> Tensor:
    """`count` elements of the flattened tensor from `start` on, wherever it is: [count]."""
    return value.flatten()[start : start + count] if isinstance(value, Tensor) else value.part(start, count)
