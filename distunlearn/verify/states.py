"""The digest of an encoder's weights, from its safetensors file, without torch.

The state digest is the root of a tree over the tensors by name (`merkle`); a leaf is the canonical JSON (RFC 8785) of
[name, dtype, shape, SHA-256 of the little-endian bytes]. Metadata and layout of the file do not count.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import rfc8785

from .errors import EvidenceError
from .merkle import leaf_hash, root
from .records import open_plain

BACKBONE = "model.backbone."  # names of the exported weights within a state
EXPORTED = ("config.json", "model.safetensors")
SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8,
         "U64": 8, "F64": 8}  # fmt: skip
HEADER = 100 << 20  # bytes that a header may have


class Tensor(NamedTuple):
    """dtype as safetensors calls it, shape, SHA-256 (hex) of the bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, by name.

    Raises:
        EvidenceError: it cannot be read, or is no such file, whole and without anything between the tensors.
    """
    try:
        with open_plain(path) as file:
            return _tensors(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EvidenceError(f"{path} is not a whole file of weights ({error}); restore it.") from None


def _tensors(file: Any) -> dict[str, Tensor]:
    size = int.from_bytes(file.read(8), "little")
    if size > HEADER:
        raise ValueError("its header is too long")
    header = json.loads(file.read(size), object_pairs_hook=_once)
    header.pop("__metadata__", None)
    found, at = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0])):
        start, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        count = 1
        for length in shape:
            count *= length
        if start != at or end - start != count * SIZES[entry["dtype"]]:
            raise ValueError(f"the place of {name!r} does not fit its shape")
        found[name] = Tensor(entry["dtype"], shape, _sha256(file, end - start))
        at = end
    if at + 8 + size != os.fstat(file.fileno()).st_size:
        raise ValueError("its length is another one")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _sha256(file: Any, size: int) -> str:
    digest = hashlib.sha256()
    while size > 0:
        piece = file.read(min(size, 1 << 20))
        if not piece:
            raise ValueError("it ends too early")
        digest.update(piece)
        size -= len(piece)
    return digest.hexdigest()


def state_digest(tensors: Mapping[str, Tensor]) -> str:
    """The digest of these tensors, hexadecimal."""
    leaves = [rfc8785.dumps([name, t.dtype, list(t.shape), t.sha256]) for name, t in sorted(tensors.items())]
    return root([leaf_hash(leaf) for leaf in leaves]).hex()


def export_digests(folder: Path) -> dict[str, str]:
    """SHA-256 (hex) of the files of an exported encoder.

    Raises:
        EvidenceError: one cannot be read.
    """
    found = {}
    for name in EXPORTED:
        try:
            with open_plain(Path(folder) / name) as file:
                found[name] = _sha256(file, os.fstat(file.fileno()).st_size)
        except (OSError, ValueError) as error:
            raise EvidenceError(f"{Path(folder) / name} cannot be read ({error}); restore it.") from None
    return found


def require_same_backbone(state: Mapping[str, Tensor], export: Path) -> None:
    """The exported weights are those of the state, tensor by tensor and bit for bit.

    Raises:
        EvidenceError: they are not.
    """
    found = read_tensors(Path(export) / "model.safetensors")
    expected = {n.removeprefix(BACKBONE): t for n, t in state.items() if n.startswith(BACKBONE)}
    differing = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if differing:
        raise EvidenceError(
            f"{export} does not hold the weights of the encoder beside it ({len(differing)} tensors differ, "
            f"{sorted(differing)[0]} among them); what is exported is not what was audited; train it again."
        )
