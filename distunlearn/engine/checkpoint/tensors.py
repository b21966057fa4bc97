"""The tensors of a checkpoint: the files that a rank writes, and what is read back from those of all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distunlearn.common.files import file_sha256, sync_path
from distunlearn.engine.backends.optimizer_state import nested
from distunlearn.engine.backends.tensor_shards import Piece, Stored, StoredTensor
from distunlearn.engine.checkpoint.format import Checkpoint
from distunlearn.errors import DataError

OPTIMIZER = "optimizer."


def write_pieces(folder: Path, pieces: Iterable[Piece], rank: int, world: int, sharded: bool) -> dict[str, Any]:
    """This rank's files of the checkpoint that is being made in `folder`, synced; what COMMIT.json says of them:
    sha256, bytes, `whole` (names of whole tensors), `pieces` (name: first element, number of elements, shape of all).

    A rank of a sharded checkpoint writes one file, so that whoever needs its part opens one; whole tensors, which every
    rank reads, are in the file of the rank that has them.

    Args:
        pieces: on the CPU, with memory of their own.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    places: dict[str, dict[str, list]] = {}
    state, optimizer = (f"state-{rank:05d}-of-{world:05d}",) * 2 if sharded else ("state", "optimizer")
    for kind in (state, optimizer):
        tensors[kind], places[kind] = {}, {}
    for piece in pieces:
        kind = optimizer if piece.name.startswith(OPTIMIZER) else state
        if piece.start is not None and piece.values.numel() == 0:
            continue
        tensors[kind][piece.name] = piece.values
        if piece.start is not None:
            places[kind][piece.name] = [piece.start, piece.values.numel(), list(piece.shape)]
    files = {}
    for kind, found in tensors.items():
        path = folder / f"{kind}.safetensors"
        save_file(found, path)
        sync_path(path)
        whole = sorted(found.keys() - places[kind].keys())
        files[path.name] = {
            "sha256": file_sha256(path), "bytes": path.stat().st_size, "whole": whole, "pieces": places[kind]
        }  # fmt: skip
    return files


def read_state(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Everything under its name (`model.`, `momentum.`, `queue.`, `method.`, `optimizer.`).

    Where pieces lie is known from COMMIT.json; a file is opened once something in it is asked for.

    Raises:
        DataError: a file cannot be read, or pieces do not make up their tensor.
    """
    folder = checkpoint.folder
    try:
        return _index(folder, checkpoint.facts["files"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} cannot be read ({error}); delete it to use the one before.") from None


def optimizer_state(checkpoint: Checkpoint, state: Mapping[str, Stored] | None = None) -> dict[str, Any]:
    """The optimizer's part of `read_state`, as `backends.optimizer_state` describes it. state: None: it is read."""
    state = read_state(checkpoint) if state is None else state
    entries = ((n.removeprefix(OPTIMIZER), t) for n, t in state.items() if n.startswith(OPTIMIZER))
    return nested(checkpoint.facts["optimizer"], entries)


def _index(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> dict[str, Stored]:
    state: dict[str, Stored] = {}
    pieces: dict[str, list] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted(files):
        opened = functools.cache(functools.partial(safe_open, folder / name, framework="pt", device="cpu"))
        state |= {tensor: opened().get_tensor(tensor) for tensor in files[name]["whole"]}
        for tensor, (start, count, shape) in files[name]["pieces"].items():
            pieces.setdefault(tensor, []).append((start, count, _reader(opened, tensor)))
            if shapes.setdefault(tensor, tuple(shape)) != tuple(shape):
                raise ValueError(f"the pieces of {tensor!r} are of different tensors")
    return state | {name: StoredTensor(name, shapes[name], parts) for name, parts in pieces.items()}


def _reader(opened: Callable[[], Any], name: str) -> Callable[[int, int], Tensor]:
    return lambda a, b: opened().get_slice(name)[a:b]
