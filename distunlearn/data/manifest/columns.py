"""A manifest as columns: NumPy arrays of one row a sample, in memory or mapped from `.npy` files.

73 bytes a sample and its id: shard 4, offset 8, length 4, sha256 32, role 1, label 4, end of the id 8, hash 8 and its
row 4 (for look-ups). Readable by anyone with `numpy.load(..., mmap_mode="r")`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from distunlearn.common.files import file_sha256, sync_path
from distunlearn.data.manifest.ids import WINDOW, IdTable, release
from distunlearn.errors import DataError

__all__ = ["NO_LABEL", "Columns", "Row"]

NO_LABEL = -(2**31)
_TYPES = {
    "id_bytes": "|u1", "id_ends": "<u8", "shard": "<u4", "offset": "<u8", "length": "<u4", "sha256": "|u1",
    "role": "|u1", "label": "<i4", "hash": "<u8", "hash_row": "<u4",
}  # fmt: skip
_FIX = "run prepare again"

Row = tuple[str, int, int, int, bytes, int, int]  # id, shard, offset, length, sha256, role, label or NO_LABEL


@dataclass(frozen=True)
class Columns:
    """One row a sample, shard after shard, within a shard in file order.

    ids: a table of n ids. shard uint32 [n]: number of the shard. offset uint64, length uint32 [n]: of the encoded
    image in it. sha256 uint8 [n, 32]. role uint8 [n]. label int32 [n], NO_LABEL where unknown.
    """

    ids: IdTable
    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    sha256: np.ndarray
    role: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.shard)

    @classmethod
    def build(cls, rows: Iterable[Row]) -> Columns:
        """From rows, in bounded memory beside the columns themselves."""
        pieces: list[Columns] = []
        waiting: list[Row] = []
        for row in rows:
            waiting.append(row)
            if len(waiting) == WINDOW:
                pieces.append(cls._piece(waiting))
                waiting = []
        pieces.append(cls._piece(waiting))
        return cls.join(pieces)

    @classmethod
    def _piece(cls, rows: Sequence[Row]) -> Columns:
        ids, shard, offset, length, sha256, role, label = zip(*rows, strict=True) if rows else ((),) * 7
        if length and (max(length) > 0xFFFFFFFF or max(label) > 2**31 - 1 or min(label) < NO_LABEL):
            raise DataError("An image of 4 GiB or more, or a label beyond 31 bits, is in the samples; take it out.")
        return cls(
            IdTable.of(ids),
            np.array(shard, dtype=np.uint32),
            np.array(offset, dtype=np.uint64),
            np.array(length, dtype=np.uint32),
            np.frombuffer(b"".join(sha256), dtype=np.uint8).reshape(-1, 32),
            np.array(role, dtype=np.uint8),
            np.array(label, dtype=np.int32),
        )

    @classmethod
    def join(cls, pieces: Sequence[Columns]) -> Columns:
        """All rows of several, in order."""
        starts = np.cumsum([0] + [len(piece.ids.blob) for piece in pieces]).tolist()
        ends = [piece.ids.ends[:-1] + np.uint64(start) for piece, start in zip(pieces, starts, strict=False)]
        ends.append(np.array([starts[-1]], dtype=np.uint64))
        ids = IdTable(np.concatenate([piece.ids.blob for piece in pieces]), np.concatenate(ends))
        names = ("shard", "offset", "length", "sha256", "role", "label")
        return cls(ids, *(np.concatenate([getattr(piece, name) for piece in pieces]) for name in names))

    def with_roles(self, role: np.ndarray) -> Columns:
        """The same with other roles, uint8 [n]."""
        return replace(self, role=role)

    def arrays(self) -> dict[str, np.ndarray]:
        """All columns by the names of their files."""
        hashes, rows = self.ids.index()
        return {
            "id_bytes": self.ids.blob, "id_ends": self.ids.ends, "shard": self.shard, "offset": self.offset,
            "length": self.length, "sha256": self.sha256, "role": self.role, "label": self.label,
            "hash": hashes, "hash_row": rows,
        }  # fmt: skip

    def nbytes(self) -> int:
        """Size of all columns."""
        return sum(column.nbytes for column in self.arrays().values())

    def save(self, folder: Path) -> dict[str, str]:
        """One durable .npy file a column into an existing folder; returns {column: sha256 of its file}."""
        digests = {}
        for name, column in self.arrays().items():
            path = folder / f"{name}.npy"
            with path.open("wb") as handle:
                np.save(handle, column.astype(_TYPES[name], copy=False), allow_pickle=False)
                handle.flush()
                os.fsync(handle.fileno())
            digests[name] = file_sha256(path)
        sync_path(folder)
        return digests

    @classmethod
    def load(cls, folder: Path, digests: Mapping[str, str]) -> Columns:
        """Columns mapped from files that have the stated digests.

        Raises:
            DataError: one is missing, damaged, or of another shape than the others.
        """
        if digests.keys() != _TYPES.keys():
            raise DataError(f"{folder} should hold the columns {', '.join(_TYPES)}; {_FIX}.")
        found: dict[str, np.ndarray] = {}
        for name, kind in _TYPES.items():
            path = folder / f"{name}.npy"
            if file_sha256(path) != digests[name]:
                raise DataError(f"{path} does not have the sha256 that the summary states; {_FIX}.")
            try:
                found[name] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (ValueError, OSError) as error:
                raise DataError(f"{path} is damaged; {_FIX}.") from error
            if found[name].dtype != np.dtype(kind):
                raise DataError(f"{path} holds {found[name].dtype}, expected {kind}; {_FIX}.")
        n = len(found["shard"])
        shapes = {"id_bytes": found["id_bytes"].shape[:1], "id_ends": (n + 1,), "sha256": (n, 32)}
        for name, column in found.items():
            if column.shape != shapes.get(name, (n,)):
                raise DataError(f"{folder / name}.npy has the shape {column.shape}, which does not fit; {_FIX}.")
        ids = IdTable(found["id_bytes"], found["id_ends"], found["hash"], found["hash_row"])
        rest = (found[name] for name in ("shard", "offset", "length", "sha256", "role", "label"))
        return cls(ids, *rest)

    def check(self, shard_bytes: Sequence[int], shard_samples: Sequence[int], num_roles: int) -> None:
        """DataError if the columns contradict themselves or the shards they speak of."""
        sizes = np.array(shard_bytes, dtype=np.uint64)
        hashes, rows = self.ids.index()
        good = int(self.ids.ends[0]) == 0 and int(self.ids.ends[-1]) == len(self.ids.blob)
        counts = np.zeros(len(sizes), dtype=np.int64)
        for start in range(0, len(self), WINDOW):
            part = slice(start, start + WINDOW)
            after = slice(start, start + WINDOW + 1)  # with the first of the next part
            shard = self.shard[part]
            good = good and bool(
                (np.diff(self.shard[after].astype(np.int64)) >= 0).all()
                and (np.diff(self.ids.ends[after].astype(np.int64)) > 0).all()
                and (hashes[after][1:] >= hashes[after][:-1]).all()
                and (rows[part] < len(self)).all()
                and (self.role[part] < num_roles).all()
                and (shard < len(sizes)).all()
            )
            if not good:
                break
            good = bool((self.offset[part] + self.length[part] <= sizes[shard]).all())
            counts += np.bincount(shard, minlength=len(sizes))
            release(*self.arrays().values())
        for start in range(0, len(self.ids.blob), 1 << 22):
            piece = self.ids.blob[start : start + (1 << 22)]
            good = good and not bool(((piece < 32) | (piece == 127)).any())
            release(self.ids.blob)
        if not good:
            raise DataError(f"The columns of the manifest contradict one another; {_FIX}.")
        wrong = np.flatnonzero(counts != np.array(shard_samples, dtype=np.int64))
        if len(wrong):
            k = int(wrong[0])
            raise DataError(f"The manifest lists {counts[k]} samples of shard {k}, not {shard_samples[k]}; {_FIX}.")

    def digests(self) -> dict[str, str]:
        """What `save` would return, without writing."""
        found = {}
        for name, column in self.arrays().items():
            sink = _Hasher()
            np.lib.format.write_array(sink, column.astype(_TYPES[name], copy=False), allow_pickle=False)
            found[name] = sink.digest.hexdigest()
        return found


class _Hasher:
    """A file that keeps only the sha256 of what is written."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return len(data)
