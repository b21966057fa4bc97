"""What is kept as JSON, read by one rule: a plain file of bounded size, UTF-8, whole objects with the expected fields.

Of a file of lines the last one may lack its line end, for its writer was killed. Whoever writes there next cuts it off
(`distunlearn.common.records`), so that every line with a line end is whole; one that is not is an error.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from .errors import DataError

LARGEST = 1 << 30  # bytes of a file that is read as a whole
LONGEST = 64 << 20  # bytes of a line
FIX = "restore it or run that part again"
Fields = Mapping[str, "type | tuple[type, ...]"]  # those that a record must have, with their types


def open_plain(path: str | Path) -> BinaryIO:
    """A plain file, opened to be read; nothing is waited for and nothing read where it is something else.

    Raises:
        OSError: it is a pipe, a device or a folder, or cannot be opened.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = os.fstat(handle).st_mode
    if stat.S_ISREG(kind):
        return open(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "a pipe or a device, expected a plain file", str(path))


def read_plain(path: str | Path, limit: int = LARGEST) -> bytes:
    """All bytes of a plain file. OSError: see `open_plain`; also if it has more than `limit` bytes."""
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(limit + 1) if size <= limit else b""
    if size > limit or len(data) > limit:
        raise OSError(errno.EFBIG, f"more than {limit} bytes", str(path))
    return data


def read_json(path: str | Path, error: type[DataError] = DataError) -> Any:
    """The JSON value in a file.

    Raises:
        DataError (or `error`): it is not there, cannot be read, or is no whole JSON.
    """
    try:
        data = read_plain(path)
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror or problem}); {FIX}.") from None
    return _parse(data, str(path), error)


def read_record(path: str | Path, fields: Fields | None = None, error: type[DataError] = DataError) -> dict[str, Any]:
    """The JSON object in a file. DataError (or `error`): see `read_json`; it is no object, or lacks one of `fields`."""
    return _checked(read_json(path, error), str(path), fields, error)


def find_record(
    path: str | Path, fields: Fields | None = None, error: type[DataError] = DataError
) -> dict[str, Any] | None:
    """`read_record`; None where nothing is at `path`."""
    return read_record(path, fields, error) if os.path.lexists(path) else None


def parse_record(
    data: bytes, where: str, fields: Fields | None = None, error: type[DataError] = DataError
) -> dict[str, Any]:
    """The JSON object that `data` is. where: begins the message. Errors: see `read_record`."""
    return _checked(_parse(data, where, error), where, fields, error)


def _parse(data: bytes, where: str, error: type[DataError]) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise error(f"{where} is not whole JSON; {FIX}.") from None


def _checked(found: Any, where: str, fields: Fields | None, error: type[DataError]) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise error(f"{where} holds no JSON object; {FIX}.")
    for name, kind in (fields or {}).items():
        if not _is(found.get(name), kind):
            told = "/".join(part.__name__ for part in (kind if isinstance(kind, tuple) else (kind,)))
            raise error(f"{where} has no {name} ({told}), which its writer gives it; {FIX}.")
    return found


def read_records(path: str | Path, error: type[DataError] = DataError) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for messages, JSON object) of every line, in order; a last line without a line end is left out.

    Raises:
        DataError (or `error`): the file cannot be read, or a line is no JSON object.
    """
    number = 0
    try:
        with open_plain(path) as file:
            while line := file.readline(LONGEST + 1):
                number += 1
                if len(line) > LONGEST:
                    raise error(f"{path}, line {number} has more than {LONGEST} bytes; {FIX}.")
                if line.endswith(b"\n"):
                    where = f"{path}, line {number}"
                    yield where, parse_record(line, where, None, error)
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror or problem}); {FIX}.") from None


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    """As isinstance; a boolean is no number."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
