"""Sample ids at scale: one normal form, and a table of ids that is searched by hash.

Normal form: Unicode NFC, `\\` read as `/`, empty and `.` parts of the path left out; case is kept. Two ids are the same
if their normal forms are. Ids stand in an Arrow array, so that a hundred million of them need no Python objects and may
lie in a mapped file.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distunlearn.data.manifest.role_rows import RoleRows
from distunlearn.errors import DataError

_MAX_ID = 1_024  # characters
# Control characters, and line or paragraph separators: they would break logs, manifests and reports.
_UNPRINTABLE = {"Cc", "Zl", "Zp", "Cs"}
_ODD = re.compile(r"\\|//|(?:^|/)\.(?:/|$)|^/|/$")
# What `check_id` refuses beside long ids, as one RE2 expression for many ids at once.
_HOSTILE = (
    r"[\p{Cc}\p{Zl}\p{Zp}]"
    r"|^[/\\]|^[A-Za-z]:[/\\]|(?:^|[/\\])\.\.(?:[/\\]|$)"  # absolute, or climbs
    r"|^\.?(?:[/\\]+\.?)*$"  # names no file, or is empty
)
WINDOW = 1 << 16  # ids made or hashed together
LOOK = 1 << 9  # ids looked up together; then mapped pages are given back


def normal_id(sample_id: str) -> str:
    r"""The form in which ids are compared.

    >>> normal_id("a\\b//./c.png"), normal_id("e\u0301") == "\u00e9", normal_id("A") == normal_id("a")
    ('a/b/c.png', True, False)
    """
    if sample_id.isascii() and _ODD.search(sample_id) is None:
        return sample_id
    text = unicodedata.normalize("NFC", sample_id).replace("\\", "/")
    return "/".join(part for part in text.split("/") if part not in ("", "."))


def check_id(sample_id: str, where: str) -> None:
    """Refuse an id that is empty, too long, unprintable, absolute or climbs out of its folder (DataError)."""
    if not sample_id or len(sample_id) > _MAX_ID:
        raise DataError(f"{where}: an id of {len(sample_id)} characters; expected 1 to {_MAX_ID}.")
    if not (sample_id.isascii() and sample_id.isprintable()) and any(
        unicodedata.category(character) in _UNPRINTABLE for character in sample_id
    ):
        raise DataError(f"{where}: the id {sample_id[:80]!r} holds a control character; remove it.")
    parts = re.split(r"[/\\]", sample_id)
    if not parts[0] or ".." in parts or re.match(r"[A-Za-z]:[/\\]", sample_id):
        raise DataError(
            f"{where}: the id {sample_id[:80]!r} is absolute or climbs with '..'; expected a relative sample id."
        )
    if set(parts) <= {".", ""}:
        raise DataError(f"{where}: the id {sample_id[:80]!r} names no file; expected a relative sample id.")


def numbers(kind: pa.DataType, values: np.ndarray, known: np.ndarray | None = None) -> pa.Array:
    """An Arrow array over values [n] or [n, width]; known: bool [n], False where a value is missing.

    `pyarrow.array` would do, but imports pandas where it is installed: 40 MiB and half a second in every process.
    """
    valid = None if known is None or known.all() else pa.py_buffer(np.packbits(known, bitorder="little"))
    return pa.Array.from_buffers(kind, len(values), [valid, pa.py_buffer(np.ascontiguousarray(values))])


def texts(values: Sequence[str | None]) -> pa.LargeStringArray:
    """An Arrow array of texts, null for None."""
    data = [b"" if value is None else value.encode() for value in values]
    ends = np.cumsum([0, *map(len, data)], dtype=np.int64)
    known = np.array([value is not None for value in values], dtype=bool)
    valid = None if known.all() else pa.py_buffer(np.packbits(known, bitorder="little"))
    return pa.LargeStringArray.from_buffers(len(data), pa.py_buffer(ends), pa.py_buffer(b"".join(data)), valid)


def refused(ids: pa.LargeStringArray) -> list[str]:
    """The ids among many that `check_id` refuses."""
    odd = pc.or_(
        pc.match_substring_regex(ids, _HOSTILE),
        pc.greater(pc.utf8_length(ids), numbers(pa.int64(), np.array([_MAX_ID]))[0]),
    )
    return ids.filter(odd).to_pylist()


def hash_ids(ids: Iterable[str]) -> np.ndarray:
    """uint64 [n]: BLAKE2b of the normal forms, 8 bytes each."""
    make = hashlib.blake2b
    return np.frombuffer(b"".join(make(normal_id(i).encode(), digest_size=8).digest() for i in ids), dtype="<u8")


class IdTable(Sequence[str]):
    """Ids by row, and rows by id.

    Args:
        array: large_string [n].
        hashes: uint64 [n] ascending, rows: uint32 [n], of `hash_ids`; None: computed at the first look-up.
        mapped: the file in which all of these lie; None: they lie in memory.
    """

    def __init__(
        self,
        array: pa.LargeStringArray,
        hashes: np.ndarray | None = None,
        rows: np.ndarray | None = None,
        mapped: mmap.mmap | None = None,
    ) -> None:
        self.array = array
        self._hashes, self._rows, self._mapped = hashes, rows, mapped

    @classmethod
    def of(cls, ids: Iterable[str]) -> IdTable:
        """A table in memory; the Python texts are dropped as they come."""
        rest = iter(ids)
        pieces = [texts(list(islice(rest, WINDOW)))]
        while len(pieces[-1]):
            pieces.append(texts(list(islice(rest, WINDOW))))
        return cls(pa.concat_arrays(pieces))

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, row: int) -> str:  # type: ignore[override]
        return self.array[row].as_py()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), WINDOW):
            yield from self.array.slice(start, WINDOW).to_pylist()

    def at(self, rows: np.ndarray) -> list[str]:
        """Ids of many rows."""
        return self.array.take(numbers(pa.int64(), np.asarray(rows, dtype=np.int64))).to_pylist()

    def index(self) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[override]
        """(hashes uint64 [n] ascending, rows uint32 [n])."""
        if self._hashes is None or self._rows is None:
            parts = (self.array.slice(start, WINDOW) for start in range(0, len(self), WINDOW))
            hashes = np.concatenate([np.zeros(0, dtype="<u8"), *(hash_ids(part.to_pylist()) for part in parts)])
            order = np.argsort(hashes, kind="stable")
            self._hashes, self._rows = hashes[order], order.astype(np.uint32)
        return self._hashes, self._rows

    def release(self) -> None:
        """Take the pages of a mapped file out of this process's memory; they stay in the system's cache."""
        if self._mapped is not None:
            self._mapped.madvise(mmap.MADV_DONTNEED)

    def find(self, ids: Sequence[str], exact: bool = False) -> np.ndarray:
        """int64 [n]: the row of each id, -1 where there is none. exact: as it is spelled, not in its normal form.

        Raises:
            DataError: two rows have the normal form of one of the ids, so that it names no single image.
        """
        hashes, rows = self.index()
        found = np.full(len(ids), -1, dtype=np.int64)
        wanted = hash_ids(ids)
        order = np.argsort(wanted, kind="stable")
        for start in range(0, len(ids), LOOK):
            some = order[start : start + LOOK]
            first = np.searchsorted(hashes, wanted[some], side="left")
            last = np.searchsorted(hashes, wanted[some], side="right")
            hit = np.flatnonzero(last > first)
            candidates = rows[first[hit]].astype(np.int64)
            by_row = np.argsort(candidates)  # look at the ids in the order in which they lie
            hit, candidates = hit[by_row], candidates[by_row]
            several = last[hit] - first[hit] > 1
            for place, row, text, more in zip(
                some[hit].tolist(), candidates.tolist(), self.at(candidates), several.tolist(), strict=True
            ):
                if more:
                    found[place] = self._only(ids[place], int(wanted[place]), exact)
                elif text == ids[place] or not exact and normal_id(text) == normal_id(ids[place]):
                    found[place] = row
            self.release()
        return found

    def repeated(self) -> tuple[str, str] | None:
        """Two ids with the same normal form, or None."""
        hashes, rows = self.index()
        for place in np.flatnonzero(hashes[1:] == hashes[:-1]).tolist():
            first, second = self[int(rows[place])], self[int(rows[place + 1])]
            if normal_id(first) == normal_id(second):
                return first, second
        return None

    def _only(self, sample_id: str, value: int, exact: bool) -> int:
        """The one row among several of one hash."""
        hashes, rows = self.index()
        key = np.uint64(value)
        run = rows[np.searchsorted(hashes, key, "left") : np.searchsorted(hashes, key, "right")]
        if exact:
            return next((row for row in run.tolist() if self[row] == sample_id), -1)
        same = [row for row in run.tolist() if normal_id(self[row]) == normal_id(sample_id)]
        if len(same) > 1:
            raise DataError(
                f"The id {sample_id[:80]!r} may mean {self[same[0]]!r} or {self[same[1]]!r}, which differ only in "
                "Unicode form or slashes; rename one of the two images."
            )
        return same[0] if same else -1


def ids_at(ids: Sequence[str], places: np.ndarray) -> list[str]:
    """The ids at many places, int64 [k]."""
    if isinstance(ids, IdList):
        return ids.table.at(ids.rows[places])
    return [ids[place] for place in places.tolist()]


class IdList(Sequence[str]):
    """Ids of some rows of a table, made when they are asked for. rows: an array, or what is indexed like one."""

    def __init__(self, table: IdTable, rows: np.ndarray | RoleRows) -> None:
        self.table, self.rows = table, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place):  # type: ignore[no-untyped-def, override]
        if isinstance(place, slice):
            return self.table.at(self.rows[place])
        return self.table[int(self.rows[place])]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), WINDOW):
            yield from self.table.at(self.rows[start : start + WINDOW])

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(other) == len(self)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]
