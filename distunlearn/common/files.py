"""Files that are whole or not there, and their digests."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distunlearn.common.text import printable
from distunlearn.errors import DataError
from distunlearn.verify.records import open_plain

# A new file, never one that another user has laid there, as a file or as a link to somewhere else.
NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
DISK = {
    getattr(errno, name)
    for name in (
        "EACCES", "EDQUOT", "EEXIST", "EFBIG", "EIO", "EISDIR", "ELOOP", "EMFILE", "ENAMETOOLONG", "ENFILE", "ENOENT",
        "ENOLCK", "ENOSPC", "ENOTDIR", "ENOTEMPTY", "ENXIO", "EPERM", "EROFS", "ESTALE", "ETXTBSY", "EXDEV",
    )
}  # fmt: skip


def disk_trouble(error: BaseException) -> DataError | None:
    """What an error of the file system means for a user; None: it is no such error."""
    if not isinstance(error, OSError) or error.errno not in DISK:
        return None
    where = "a file" if error.filename is None else printable(os.fsdecode(error.filename))
    return DataError(
        f"{where} cannot be read or written ({error.strerror}); see that the disk has room, answers and may be written "
        "to, and the same command goes on."
    )


def file_sha256(path: str | Path) -> str:
    """sha256 of a file, hexadecimal, read in pieces; DataError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open_plain(path) as handle:
            while piece := handle.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check the disk and the path.") from error
    return digest.hexdigest()


def sync_path(path: Path) -> None:
    """Make a file or a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A new, empty file beside `path` to write into; it takes the place of `path` when the block ends.

    If the block raises, `path` is as before and the new file is gone. The file's name is this process's own. durable:
    it is synced before.

    Raises:
        OSError: with the name of `path` where the system gives none.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a process that was killed, or laid there by somebody else
        os.close(os.open(temporary, NEW, 0o666))
        try:
            yield temporary
            if durable:
                sync_path(temporary)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        if durable:
            sync_path(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_atomic(path: Path, content: bytes | str, durable: bool = True) -> None:
    """Replace a file as a whole; text is written as UTF-8. durable: see `replacing`."""
    with replacing(path, durable) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of strict JSON (NaN and infinity are refused by `json`)."""
    write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


class HashingFile:
    """A new file that is only written forwards, hashing what passes; durable once it is closed.

    path: None writes nothing, for the digest alone. size: bytes written.
    """

    closed = False  # pyarrow asks

    def __init__(self, path: Path | None) -> None:
        self._handle = None if path is None else path.open("wb")
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> int:
        """Append; returns how many bytes."""
        data = memoryview(data)
        if self._handle is not None:
            self._handle.write(data)
        self._digest.update(data)
        self.size += data.nbytes
        return data.nbytes

    def sha256(self) -> str:
        """Of all that was written, hexadecimal."""
        return self._digest.hexdigest()

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._handle is not None:
            with self._handle:
                if kind is None:
                    self._handle.flush()
                    os.fsync(self._handle.fileno())
