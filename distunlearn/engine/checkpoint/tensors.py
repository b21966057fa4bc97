"""The tensors of a checkpoint: the files that a rank writes, and what is read back from those of all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
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
    """This rank's files of the checkpoint that is being made in `folder`, synced; what COMMIT.json says of them.

    Args:
        pieces: on the CPU, with memory of their own.
    """
    share = f"-{rank:05d}-of-{world:05d}" if sharded else ""
    tensors: dict[str, dict[str, Tensor]] = {"state": {}, "optimizer": {}}
    places: dict[str, dict[str, list]] = {"state": {}, "optimizer": {}}
    for piece in pieces:
        kind = "optimizer" if piece.name.startswith(OPTIMIZER) else "state"
        if piece.start is not None and piece.values.numel() == 0:
            continue
        tensors[kind][piece.name] = piece.values
        if piece.start is not None:
            places[kind][piece.name] = [piece.start, list(piece.shape)]
    files = {}
    for kind, found in tensors.items():
        path = folder / f"{kind}{share}.safetensors"
        save_file(found, path, metadata={"pieces": json.dumps(places[kind])} if sharded else None)
        sync_path(path)
        files[path.name] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    return files


def read_state(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Everything under its name (`model.`, `momentum.`, `queue.`, `method.`, `optimizer.`), read when used.

    Raises:
        DataError: a file cannot be read, or pieces do not make up their tensor.
    """
    folder = checkpoint.folder
    try:
        return _index([folder / name for name in sorted(checkpoint.facts["files"]) if name.endswith(".safetensors")])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} cannot be read ({error}); delete it to use the one before.") from None


def optimizer_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The optimizer's part of `read_state`, as `backends.optimizer_state` describes it."""
    entries = ((n.removeprefix(OPTIMIZER), t) for n, t in read_state(checkpoint).items() if n.startswith(OPTIMIZER))
    return nested(checkpoint.facts["optimizer"], entries)


def _index(paths: Sequence[Path]) -> dict[str, Stored]:
    state: dict[str, Stored] = {}
    pieces: dict[str, list] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        file = safe_open(path, framework="pt", device="cpu")
        places = json.loads((file.metadata() or {}).get("pieces", "{}"))
        for name in file.keys():  # noqa: SIM118  (not a mapping)
            if name not in places:
                state[name] = file.get_tensor(name)
                continue
            start, shape = places[name]
            found = file.get_slice(name)
            pieces.setdefault(name, []).append((start, math.prod(found.get_shape()), _reader(found)))
            if shapes.setdefault(name, tuple(shape)) != tuple(shape):
                raise ValueError(f"the pieces of {name!r} are of different tensors")
    return state | {name: StoredTensor(name, shapes[name], parts) for name, parts in pieces.items()}


def _reader(found: Any) -> Callable[[int, int], Tensor]:
    return lambda a, b: found[a:b]
