"""A checkpoint made at once by one process, for tests that start from a given state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from distunlearn.engine.backends.tensor_shards import Piece
from distunlearn.engine.checkpoint.format import begin, commit
from distunlearn.engine.checkpoint.tensors import OPTIMIZER, write_pieces


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    facts: Mapping[str, Any],
    may_write: Callable[[], None] | None = None,
) -> Path:
    """Commit whole tensors as the state before step `step`, at once, from one process.

    Args:
        folder: the phase's `checkpoints/`.
        optimizer: as `backends.optimizer_state` describes it.
        facts: plain JSON kept in COMMIT.json (config digest, world, images, seconds, attempt).
        may_write: asked before the first byte and again before the commit.
    """
    if may_write is not None:
        may_write()
    temporary = begin(folder, step)
    moments = {f"{OPTIMIZER}{n}/{k}": v for n, entries in optimizer["state"].items() for k, v in entries.items()}
    pieces = [Piece(n, t.detach().cpu().contiguous(), tuple(t.shape)) for n, t in (dict(tensors) | moments).items()]
    files = write_pieces(temporary, pieces, 0, 1, sharded=False)
    return commit(temporary, step, files, {"optimizer": optimizer["optimizer"], **facts}, may_write)[0]
