"""Samples, shards and roles as records, and summary.json read with every check."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distunlearn.errors import DataError
from distunlearn.verify.records import read_plain

SUMMARY = "summary.json"
ROLES = ("retain", "forget", "third_party", "third_party_audit", "calibration", "holdout", "watch")
UNUSED = "unused"  # in the shards, but without a role in this request
FORGOTTEN = "forgotten"  # by an earlier request: in no loss, looked at by audits
CODES = (*ROLES, UNUSED, FORGOTTEN)
CODE = {role: code for code, role in enumerate(CODES)}
VERSION = 4  # of summary.json and index.arrow, and of a request
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIX = "run prepare again"


@dataclass(frozen=True, slots=True)
class Sample:
    """One image: `offset` and `length` are those of its encoded bytes in the tar file `shard`."""

    id: str
    shard: str
    offset: int
    length: int
    sha256: str  # of the encoded bytes
    role: str
    label: int | None
    width: int = 0  # pixels, by the header; 0: it cannot be used
    height: int = 0


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file: its size in bytes, its sha256 and how many samples it holds."""

    bytes: int
    sha256: str
    samples: int


def check_shard_name(name: object) -> str:
    """The name itself if it is a plain file name ending in .tar; DataError for URLs, commands and paths."""
    if not isinstance(name, str) or _SHARD_NAME.fullmatch(name) is None:
        raise DataError(
            f"The shard name {str(name)[:80]!r} is not a plain file name ending in .tar; only local shards are read."
        )
    return name


def _read(path: Path) -> bytes:
    try:
        return read_plain(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); {_FIX}.") from error


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json; DataError if it is missing, damaged or of another version."""
    path = folder / SUMMARY
    try:
        summary = json.loads(_read(path))
        if summary["version"] != VERSION:
            raise DataError(f"{path} has version {summary['version']!r}; expected {VERSION}; {_FIX}.")
        good = (
            isinstance(summary["index_sha256"], str)
            and isinstance(summary["info"], dict)
            and all(_good_shard(entry) for entry in summary["shards"].values())
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged; {_FIX}.") from error
    if not good:
        raise DataError(f"{path} is damaged; {_FIX}.")
    return summary


def _good_shard(entry: dict[str, Any]) -> bool:
    return (
        entry.keys() == {"bytes", "sha256", "samples"}
        and _is_count(entry["bytes"])
        and _is_count(entry["samples"])
        and _SHA256.fullmatch(entry["sha256"]) is not None
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


@dataclass(frozen=True)
class Remote:
    """Where shards lie that are not beside their index.

    url: of the folder. retries: of a failed request. cache: local folder for copies of whole shards, of at most
    cache_mib MiB; None: no copies.
    """

    url: str
    retries: int = 4
    cache: str | None = None
    cache_mib: int = 51_200
