"""Read a list of sample ids from untrusted text: .txt, .csv or .jsonl.

txt: one id a line; empty lines and lines that start with # are skipped. csv: a header with `id`, and
optionally `role` (forget or retain; empty means forget). jsonl: one object a line, {"id": ...} and
optionally "role". UTF-8, with or without a byte order mark, LF or CRLF. Ids are compared in their
normal form (`manifest.ids`): Unicode form and the kind of slash do not matter, case does.

A list is read as a stream: its ids become row numbers, 8 bytes each, as they come.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distunlearn.data.manifest.ids import WINDOW, IdTable, check_id, hash_ids, normal_id
from distunlearn.errors import DataError

_MAX_LINE = 65_536  # bytes; an id is a short relative name
_LISTED_ROLES = ("forget", "retain")
LOOKED_UP = 4 * WINDOW  # ids that are held as texts and looked up together
_MISSING_KEPT = 10_000  # ids that the images lack and that are named; all of them are counted


@dataclass(frozen=True)
class Resolved:
    """A list against a table of ids.

    forget, retain: int64 rows, in the order of the list, each once. entries: lines with an id. missing: ids that the
    table lacks, the first few. num_missing: how many. sha256: of the file.
    """

    forget: np.ndarray
    retain: np.ndarray
    entries: int
    missing: list[str] = field(default_factory=list)
    num_missing: int = 0
    sha256: str = ""

    def facts(self) -> dict[str, Any]:
        """Counts and digest as plain JSON."""
        found = len(self.forget) + len(self.retain)
        return {
            "sha256": self.sha256,
            "entries": self.entries,
            "forget": len(self.forget),
            "retain": len(self.retain),
            "duplicates": self.entries - found - self.num_missing,
            "missing": self.num_missing,
            "missing_ids": self.missing,
        }


def resolve_list(path: str | Path, table: IdTable) -> Resolved:
    """Rows of the ids that a list names, in memory bounded by 16 bytes an id and the table's own.

    Raises:
        DataError: as `read_ids`; an id that names two images, or one to forget and to retain.
    """
    path = Path(path)
    digest = hashlib.sha256()
    rows: dict[str, list[np.ndarray]] = {role: [] for role in _LISTED_ROLES}
    lost: list[np.ndarray] = []
    missing: dict[str, None] = {}
    entries = 0
    waiting: dict[str, list[str]] = {role: [] for role in _LISTED_ROLES}

    def look_up(role: str) -> None:
        ids = waiting[role]
        found = table.find(ids)
        rows[role].append(found[found >= 0])
        absent = [ids[place] for place in np.flatnonzero(found < 0).tolist()]
        lost.append(hash_ids(absent))
        for sample_id in absent:
            if len(missing) < _MISSING_KEPT:
                missing[normal_id(sample_id)] = None
        waiting[role] = []

    for _, sample_id, role in _entries(path, digest):
        entries += 1
        waiting[role].append(sample_id)
        if len(waiting[role]) == LOOKED_UP:
            look_up(role)
    for role in _LISTED_ROLES:
        look_up(role)
    if not entries:
        raise DataError(f"The list {path} holds no ids, so there is nothing to forget; list at least one id.")
    forget, retain = (_each_once(np.concatenate(rows[role])) for role in _LISTED_ROLES)
    both = np.intersect1d(forget, retain)
    if len(both):
        named = some(table.at(both[:6]), len(both))
        raise DataError(f"{path} lists {named} both to forget and to retain; keep each id once.")
    return Resolved(forget, retain, entries, list(missing), len(np.unique(np.concatenate(lost))), digest.hexdigest())


def _each_once(rows: np.ndarray) -> np.ndarray:
    """Without repetitions, in order of first appearance."""
    _, first = np.unique(rows, return_index=True)
    return rows[np.sort(first)]


def some(ids: Collection[str], count: int | None = None, most: int = 5) -> str:
    """'3 ids ('a', 'b', 'c')', sorted, cut after a few, escaped. count: of all, if `ids` are only the first."""
    count = len(ids) if count is None else count
    shown = ", ".join(repr(sample_id) for sample_id in sorted(ids)[:most])
    more = ", ..." if count > most else ""
    return f"{count} id{'s' if count > 1 else ''} ({shown}{more})"


def list_sha256(path: str | Path) -> str:
    """sha256 of the file; DataError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as handle:
            while piece := handle.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"The list of ids {path} cannot be read ({reason}); check the path.") from error
    return digest.hexdigest()


def read_ids(path: str | Path) -> dict[str, list[str]]:
    """Read a list file into {"forget": [ids], "retain": [ids]}, each in file order without duplicates.

    Raises:
        DataError: the file is missing, of another kind, not UTF-8 (with the byte offset), malformed
            (with the line), holds an id that cannot be a sample id, or lists nothing at all.
    """
    path = Path(path)
    ids: dict[str, dict[str, None]] = {role: {} for role in _LISTED_ROLES}
    for _, sample_id, role in _entries(path):
        ids[role][normal_id(sample_id)] = None
    if not any(ids.values()):
        raise DataError(f"The list {path} holds no ids, so there is nothing to forget; list at least one id.")
    return {role: list(found) for role, found in ids.items()}


def _entries(path: Path, digest: Any = None) -> Iterator[tuple[int, str, str]]:
    """(line number, id, role) of every entry, checked. digest: a hash that is fed the bytes of the file."""
    readers = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"The list {path} ends in {path.suffix!r}; expected a .txt, .csv or .jsonl file of ids.")
    for number, sample_id, role in reader(path, _lines(path, digest)):
        role = role or "forget"
        if role not in _LISTED_ROLES:
            raise DataError(f"{path}, line {number}: role is {role[:40]!r}; expected forget or retain.")
        check_id(sample_id, f"{path}, line {number}")
        yield number, sample_id, role


def _lines(path: Path, digest: Any = None) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its line end), decoded strictly, in bounded memory."""
    try:
        with path.open("rb") as handle:
            offset = 0
            for number in range(1, 2**63):
                raw = handle.readline(_MAX_LINE + 1)
                if not raw:
                    return
                if digest is not None:
                    digest.update(raw)
                if len(raw) > _MAX_LINE:
                    raise DataError(f"{path}, line {number} is longer than {_MAX_LINE} bytes; expected one id a line.")
                skip = 3 if number == 1 and raw.startswith(b"\xef\xbb\xbf") else 0
                try:
                    text = raw[skip:].decode("utf-8")
                except UnicodeDecodeError as error:
                    where = offset + skip + error.start
                    raise DataError(f"{path} is not UTF-8 at byte {where}; save the list as UTF-8.") from error
                offset += len(raw)
                yield number, text.removesuffix("\n").removesuffix("\r")
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"The list of ids {path} cannot be read ({reason}); check the path.") from error


def _read_txt(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str, str]]:
    for number, line in lines:
        line = line.strip(" \t")
        if line and not line.startswith("#"):
            yield number, line, ""


def _read_csv(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str, str]]:
    header: list[str] | None = None
    for number, line in lines:
        if not line.strip():
            continue
        try:
            # One line at a time: ids hold no line breaks, so an open quote is an error, not a long field.
            row = [field.strip(" \t") for field in next(csv.reader([line], strict=True))]
        except csv.Error as error:
            raise DataError(f"{path}, line {number} is not valid csv ({error}); correct the line.") from error
        if header is None:
            header = [name.lower() for name in row]
            if header.count("id") != 1 or header.count("role") > 1:
                raise DataError(f"{path}, line {number}: the header is {line[:80]!r}; expected one column named id.")
        elif len(row) != len(header):
            raise DataError(f"{path}, line {number} has {len(row)} fields; the header has {len(header)}.")
        else:
            fields = dict(zip(header, row, strict=True))
            yield number, fields["id"], fields.get("role", "").lower()


def _read_jsonl(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str, str]]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is not valid JSON; expected one object a line.") from error
        sample_id = record.get("id") if isinstance(record, dict) else None
        role = record.get("role") or "" if isinstance(record, dict) else ""
        if not isinstance(sample_id, str) or not isinstance(role, str):
            raise DataError(f'{path}, line {number} has no text "id"; expected {{"id": "..."}}.')
        yield number, sample_id, role.lower()
