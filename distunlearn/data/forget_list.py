"""Read a list of sample ids from untrusted text: .txt, .csv or .jsonl.

txt: one id a line; empty lines and lines that start with # are skipped. csv: a header with `id`, and
optionally `role` (forget or retain; empty means forget). jsonl: one object a line, {"id": ...} and
optionally "role". UTF-8, with or without a byte order mark, LF or CRLF. Ids are compared exactly:
case and Unicode form matter.
"""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from distunlearn.errors import DataError

__all__ = ["check_id", "read_ids"]

_MAX_LINE = 65_536  # bytes; an id is a short relative name
_MAX_ID = 1_024  # characters
_LISTED_ROLES = ("forget", "retain")
# Control characters, and line or paragraph separators: they would break logs, manifests and reports.
_UNPRINTABLE = {"Cc", "Zl", "Zp", "Cs"}


def read_ids(path: str | Path) -> dict[str, list[str]]:
    """Read a list file into {"forget": [ids], "retain": [ids]}, each in file order without duplicates.

    Raises:
        DataError: the file is missing, of another kind, not UTF-8 (with the byte offset), malformed
            (with the line), holds an id that cannot be a sample id, or lists nothing at all.
    """
    path = Path(path)
    readers = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"The list {path} ends in {path.suffix!r}; expected a .txt, .csv or .jsonl file of ids.")
    ids: dict[str, dict[str, None]] = {role: {} for role in _LISTED_ROLES}
    for number, sample_id, role in reader(path):
        role = role or "forget"
        if role not in ids:
            raise DataError(f"{path}, line {number}: role is {role[:40]!r}; expected forget or retain.")
        check_id(sample_id, f"{path}, line {number}")
        ids[role][sample_id] = None
    if not any(ids.values()):
        raise DataError(f"The list {path} holds no ids, so there is nothing to forget; list at least one id.")
    return {role: list(found) for role, found in ids.items()}


def check_id(sample_id: str, where: str) -> None:
    """Refuse an id that is empty, too long, unprintable, absolute or climbs out of its folder (DataError)."""
    if not sample_id or len(sample_id) > _MAX_ID:
        raise DataError(f"{where}: an id of {len(sample_id)} characters; expected 1 to {_MAX_ID}.")
    if any(unicodedata.category(character) in _UNPRINTABLE for character in sample_id):
        raise DataError(f"{where}: the id {sample_id[:80]!r} holds a control character; remove it.")
    parts = re.split(r"[/\\]", sample_id)
    if not parts[0] or ".." in parts or re.match(r"[A-Za-z]:[/\\]", sample_id):
        raise DataError(
            f"{where}: the id {sample_id[:80]!r} is absolute or climbs with '..'; expected a relative sample id."
        )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its line end), decoded strictly, in bounded memory."""
    try:
        with path.open("rb") as handle:
            offset = 0
            for number in range(1, 2**63):
                raw = handle.readline(_MAX_LINE + 1)
                if not raw:
                    return
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


def _read_txt(path: Path) -> Iterator[tuple[int, str, str]]:
    for number, line in _lines(path):
        line = line.strip(" \t")
        if line and not line.startswith("#"):
            yield number, line, ""


def _read_csv(path: Path) -> Iterator[tuple[int, str, str]]:
    header: list[str] | None = None
    for number, line in _lines(path):
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


def _read_jsonl(path: Path) -> Iterator[tuple[int, str, str]]:
    for number, line in _lines(path):
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
