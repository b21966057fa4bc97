"""An index as columns: NumPy arrays of one row a sample, in memory or mapped from an Arrow IPC file.

The file has one record batch, uncompressed. 96 bytes a sample and its id: shard 4, offset 8, length 4, sha256 32, label
4, width 4, height 4, near 8, end of the id 8, end of the name 8, hash 8 and its row 4; and one bit a sample for each of
label, near and name where some are unknown. `hash` and `hash_row` are the index of the ids: all hashes in ascending
order, and the row of the id that each is of. Roles are no part of the file: they belong to a request.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distunlearn.common.files import HashingFile, file_sha256, replacing
from distunlearn.data.manifest.ids import WINDOW, IdTable, numbers, refused, texts
from distunlearn.data.manifest.records import CODE, SUMMARY, UNUSED, Shard
from distunlearn.errors import DataError

NO_LABEL = -(2**31)
NO_HASH = 2**64 - 1  # no perceptual hash has all bits set: half of them lie below the median
_NAMES = pa.large_string()
SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=name in ("label", "near", "name"))
        for name, kind in {
            "id": pa.large_string(), "shard": pa.dictionary(pa.int32(), _NAMES), "offset": pa.uint64(),
            "length": pa.uint32(), "sha256": pa.binary(32), "label": pa.int32(), "width": pa.uint32(),
            "height": pa.uint32(), "near": pa.uint64(), "name": _NAMES, "hash": pa.uint64(), "hash_row": pa.uint32(),
        }.items()
    ]
)  # fmt: skip
_FIX = "run prepare again"
_NUMERIC = ("shard", "offset", "length", "sha256", "label", "width", "height", "near")
_NO_ROLE = CODE[UNUSED]

# id, shard, offset, length, sha256, label or NO_LABEL, width, height, near or NO_HASH, name or None
Row = tuple[str, int, int, int, bytes, int, int, int, int, str | None]


@dataclass(frozen=True)
class Columns:
    """One row a sample, shard after shard, within a shard in file order.

    ids: a table of n ids. shard uint32 [n]: number of the shard. offset uint64, length uint32 [n]: of the encoded
    image in it. sha256 uint8 [n, 32]. label int32 [n], NO_LABEL where unknown. width, height uint32 [n]: pixels, by the
    header of the image; 0 for one that cannot be used. near uint64 [n]: perceptual hash, NO_HASH where there is none.
    name [n]: by what else a list may name the image, null where there is nothing. role uint8 [n]: of the request.
    """

    ids: IdTable
    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    sha256: np.ndarray
    label: np.ndarray
    width: np.ndarray
    height: np.ndarray
    near: np.ndarray
    name: pa.LargeStringArray
    role: np.ndarray

    def __len__(self) -> int:
        return len(self.shard)

    @classmethod
    def build(cls, rows: Iterable[Row]) -> Columns:
        """From rows, in order, without roles; DataError for what does not fit into them."""
        columns = list(zip(*rows, strict=True)) or [()] * 10
        ids, shard, offset, length, sha256, label, width, height, near, name = columns
        if length and (max(length) > 0xFFFFFFFF or max(label) > 2**31 - 1 or min(label) < NO_LABEL):
            raise DataError("An image of 4 GiB or more, or a label beyond 31 bits, is in the samples; take it out.")
        return cls(
            IdTable.of(ids),
            np.array(shard, dtype=np.uint32),
            np.array(offset, dtype=np.uint64),
            np.array(length, dtype=np.uint32),
            np.frombuffer(b"".join(sha256), dtype=np.uint8).reshape(-1, 32),
            np.array(label, dtype=np.int32),
            np.array(width, dtype=np.uint32),
            np.array(height, dtype=np.uint32),
            np.array(near, dtype=np.uint64),
            texts(name),
            np.full(len(shard), _NO_ROLE, dtype=np.uint8),
        )

    @classmethod
    def join(cls, pieces: Sequence[Columns]) -> Columns:
        """All rows of several, in order."""
        numeric = {name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in (*_NUMERIC, "role")}
        ids = IdTable(pa.concat_arrays([piece.ids.array for piece in pieces]))
        return cls(ids=ids, name=pa.concat_arrays([piece.name for piece in pieces]), **numeric)

    def take(self, rows: np.ndarray) -> Columns:
        """These rows alone. rows: int64, ascending."""
        numeric = {name: getattr(self, name)[rows] for name in (*_NUMERIC, "role")}
        chosen = numbers(pa.int64(), rows)
        return Columns(ids=IdTable(self.ids.array.take(chosen)), name=self.name.take(chosen), **numeric)

    def with_roles(self, role: np.ndarray) -> Columns:
        """The same with other roles, uint8 [n]."""
        return replace(self, role=role)

    def batch(self, shards: Sequence[str]) -> pa.RecordBatch:
        """All columns, as they stand in the file. shards: names of the shards, by number."""
        hashes, rows = self.ids.index()
        columns = [
            self.ids.array,
            pa.DictionaryArray.from_arrays(numbers(pa.int32(), self.shard), texts(shards)),
            numbers(pa.uint64(), self.offset),
            numbers(pa.uint32(), self.length),
            numbers(pa.binary(32), self.sha256),
            numbers(pa.int32(), self.label, self.label != NO_LABEL),
            numbers(pa.uint32(), self.width),
            numbers(pa.uint32(), self.height),
            numbers(pa.uint64(), self.near, self.near != NO_HASH),
            self.name,
            numbers(pa.uint64(), hashes),
            numbers(pa.uint32(), rows),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)

    def samples_digest(self, codes: Sequence[int]) -> str:
        """sha256 of the ids, image digests and labels of all samples of some roles, wherever they lie.

        In the order of the ids' hashes, WINDOW samples at a time.
        """
        wanted = np.zeros(256, dtype=bool)
        wanted[list(codes)] = True
        digest, (_, by_hash) = hashlib.sha256(), self.ids.index()
        waiting = np.zeros(0, dtype=np.int64)
        for start in range(0, len(self) + WINDOW, WINDOW):
            rows = by_hash[start : start + WINDOW].astype(np.int64)
            waiting = np.append(waiting, rows[wanted[self.role[rows]]])
            if len(waiting) < WINDOW and start < len(self):
                continue
            some, waiting = waiting[:WINDOW], waiting[WINDOW:]
            names = self.ids.array.take(numbers(pa.int64(), some))
            digest.update(pc.binary_length(names).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            digest.update(names.buffers()[2] or b"")
            digest.update(self.sha256[some].tobytes())
            digest.update(self.label[some].astype("<i4").tobytes())
            self.ids.release()
        return digest.hexdigest()

    def save(self, path: Path, shards: Sequence[str]) -> str:
        """Replace the file by these columns, durably and as a whole; returns its sha256."""
        with replacing(path) as partial:
            return self._write(HashingFile(partial), shards)

    def digest(self, shards: Sequence[str]) -> str:
        """What `save` would return, without writing."""
        return self._write(HashingFile(None), shards)

    def _write(self, sink: HashingFile, shards: Sequence[str]) -> str:
        with sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_batch(self.batch(shards))
        return sink.sha256()

    @classmethod
    def load(cls, path: Path, sha256: str, shards: Mapping[str, Shard]) -> Columns:
        """Columns mapped from a file of this digest, all of them checked.

        Raises:
            DataError: it is missing or damaged, holds other columns, or contradicts itself or the shards.
        """
        if file_sha256(path) != sha256:
            raise DataError(f"{path} does not have the sha256 that {SUMMARY} states; {_FIX}.")
        try:
            with path.open("rb") as handle:
                mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            reader = pa.ipc.open_file(pa.py_buffer(mapped))
            if not reader.schema.equals(SCHEMA) or reader.num_record_batches != 1:
                raise DataError(f"{path} should hold the columns {', '.join(SCHEMA.names)} in one piece; {_FIX}.")
            batch = reader.get_batch(0)
            batch.validate()
            _check_values(batch, mapped)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{path} is damaged; {_FIX}.") from error
        if batch["shard"].dictionary.to_pylist() != list(shards):
            raise DataError(f"{path} names other shards than {SUMMARY}; {_FIX}.")
        columns = cls._of(batch, mapped)
        columns._check(list(shards), [shard.bytes for shard in shards.values()], [s.samples for s in shards.values()])
        return columns

    @classmethod
    def _of(cls, batch: pa.RecordBatch, mapped: mmap.mmap) -> Columns:
        """Arrays over the memory of a batch; only labels and hashes are copied, where some are unknown."""

        def values(array: pa.Array, kind: str, width: int = 1) -> np.ndarray:
            return np.frombuffer(array.buffers()[1] or b"", kind, len(array) * width)

        def known_values(array: pa.Array, kind: str, unknown: int) -> np.ndarray:
            if (known := array.buffers()[0]) is None:
                return values(array, kind)
            bits = np.unpackbits(np.frombuffer(known, np.uint8), count=len(array), bitorder="little")
            return np.where(bits, values(array, kind), np.array(unknown, dtype=kind))

        return cls(
            ids=IdTable(batch["id"], values(batch["hash"], "<u8"), values(batch["hash_row"], "<u4"), mapped),
            shard=values(batch["shard"].indices, "<u4"),
            offset=values(batch["offset"], "<u8"),
            length=values(batch["length"], "<u4"),
            sha256=values(batch["sha256"], "|u1", 32).reshape(-1, 32),
            label=known_values(batch["label"], "<i4", NO_LABEL),
            width=values(batch["width"], "<u4"),
            height=values(batch["height"], "<u4"),
            near=known_values(batch["near"], "<u8", NO_HASH),
            name=batch["name"],
            role=np.full(len(batch), _NO_ROLE, dtype=np.uint8),
        )

    def _check(self, names: Sequence[str], shard_bytes: Sequence[int], shard_samples: Sequence[int]) -> None:
        """DataError if the columns contradict themselves or the shards they speak of."""
        sizes = np.array(shard_bytes, dtype=np.uint64)
        hashes, rows = self.ids.index()
        counts = np.zeros(len(sizes), dtype=np.int64)
        for start in range(0, len(self), WINDOW):
            part = slice(start, start + WINDOW)
            after = slice(start, start + WINDOW + 1)  # with the first of the next part
            shard, end = self.shard[part], self.offset[part] + self.length[part]
            if not (
                (np.diff(self.shard[after].astype(np.int64)) >= 0).all()
                and (hashes[after][1:] >= hashes[after][:-1]).all()
                and (rows[part] < len(self)).all()
                and (end >= self.offset[part]).all()
                and (end <= sizes[shard]).all()
            ):
                raise DataError(f"The columns of the index contradict one another; {_FIX}.")
            counts += np.bincount(shard, minlength=len(sizes))
            bad = refused(self.ids.array.slice(start, WINDOW))
            if bad:
                raise DataError(f"The index lists {bad[0][:80]!r}, which can be no id; {_FIX}.")
            self.ids.release()
        wrong = np.flatnonzero(counts != np.array(shard_samples, dtype=np.int64))
        if len(wrong):
            k = int(wrong[0])
            raise DataError(f"The index lists {counts[k]} samples of {names[k]}, not {shard_samples[k]}; {_FIX}.")


def _check_values(batch: pa.RecordBatch, mapped: mmap.mmap) -> None:
    """ValueError or ArrowException unless every text is UTF-8, every value is there that must be."""
    for start in range(0, len(batch), WINDOW):
        part = batch.slice(start, WINDOW)
        part.validate(full=True)
        if any(part[field.name].null_count for field in SCHEMA if not field.nullable):
            raise ValueError("a value is missing")
        mapped.madvise(mmap.MADV_DONTNEED)
