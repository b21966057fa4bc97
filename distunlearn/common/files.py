"""Files that are whole or not there, and their digests."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from distunlearn.errors import DataError

__all__ = ["file_sha256", "sync_path", "write_atomic", "write_json"]


def file_sha256(path: str | Path) -> str:
    """sha256 of a file, hexadecimal, read in pieces; DataError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as handle:
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


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file as a whole."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Atomic, synced, strict JSON (NaN and infinity are refused by `json`)."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    sync_path(temporary)
    os.replace(temporary, path)
    sync_path(path.parent)
