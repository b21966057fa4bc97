"""Lines that are appended to a file, each whole or not there; `distunlearn.verify.records` reads them.

Text of people (logs) and JSON objects (ledger, metrics, jobs) alike. What a killed writer left of a line is cut off
when the file is opened, and so is what a full disk let through. The file is the user's own: a link is not followed.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from distunlearn.errors import DataError

PIECE = 1 << 16


class LineFile:
    """A file to append lines to. cut: bytes of a torn last line that were removed.

    Args:
        mode: permissions of a file that is made.

    Raises:
        DataError: it cannot be opened or written, or is a link, a pipe or a folder.
    """

    def __init__(self, path: Path, mode: int = 0o644) -> None:
        self.path = Path(path)
        self._handle: int | None = None
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self.path.parent.mkdir(exist_ok=True)
            handle = os.open(self.path, flags, mode)
            try:
                self.cut = _cut_torn_line(handle)
            except BaseException:
                os.close(handle)
                raise
        except OSError as error:
            raise self._failed(error) from None
        self._handle = handle

    def record(self, line: Mapping[str, Any]) -> None:
        """Append a JSON object; NaN and infinity are refused by `json`."""
        self.line(json.dumps(line, separators=(",", ":"), allow_nan=False))

    def line(self, text: str) -> None:
        """Append text without a line end in it; nothing of it is left if it does not fit."""
        assert self._handle is not None, "the file is closed"
        data = memoryview(f"{text}\n".encode())
        size = os.fstat(self._handle).st_size
        try:
            while data:
                data = data[os.write(self._handle, data) :]
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._handle, size)
            raise self._failed(error) from None

    def size(self) -> int:
        """Bytes so far."""
        return 0 if self._handle is None else os.fstat(self._handle).st_size

    def sync(self) -> None:
        """Make what is written durable; another thread may go on writing."""
        if self._handle is not None:
            try:
                os.fsync(self._handle)
            except OSError as error:
                raise self._failed(error) from None

    def close(self) -> None:
        """Safe to call twice."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with suppress(OSError):  # what must be durable was synced
                os.close(handle)

    def _failed(self, error: OSError) -> DataError:
        why = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror or error
        return DataError(
            f"{self.path} cannot be written ({why}); make room on the disk, or make it writable, and the same command "
            "goes on."
        )


def _cut_torn_line(handle: int) -> int:
    """Remove what stands after the last line end; returns how many bytes. OSError: it is no plain file."""
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise OSError(errno.EINVAL, "a pipe or a device, expected a plain file")
    size = end = os.fstat(handle).st_size
    while end:
        start = max(0, end - PIECE)
        found = os.pread(handle, end - start, start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        os.ftruncate(handle, end)
    return size - end
