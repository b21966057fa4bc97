"""Samples and shards as records, and the files of a manifest read with every check."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distunlearn.data.manifest.columns import NO_LABEL, Columns, Row
from distunlearn.data.manifest.ids import check_id
from distunlearn.errors import DataError

__all__ = [
    "CODES",
    "ROLES",
    "Remote",
    "SUMMARY",
    "UNUSED",
    "Sample",
    "Shard",
    "check_shard_name",
    "read_lines",
    "read_summary",
    "row_of",
]

SUMMARY = "summary.json"
ROLES = ("retain", "forget", "third_party", "third_party_audit", "calibration", "holdout")
UNUSED = "unused"  # in shards that were indexed as they are: samples that have no role
CODES = (*ROLES, UNUSED)
CODE = {role: code for code, role in enumerate(CODES)}
LINES_VERSION, COLUMNS_VERSION = 1, 2
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


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file: its size in bytes, its sha256 and how many samples it holds."""

    bytes: int
    sha256: str
    samples: int


def row_of(sample: Sample, numbers: Mapping[str, int]) -> Row:
    label = NO_LABEL if sample.label is None else sample.label
    return (
        sample.id, numbers[sample.shard], sample.offset, sample.length, bytes.fromhex(sample.sha256),
        CODE[sample.role], label,
    )  # fmt: skip


def read_lines(path: Path, sha256: str, shards: Mapping[str, Shard]) -> Columns:
    """The samples of a manifest.jsonl; DataError if it is damaged or contradicts the shards."""
    content = _read(path)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path} does not have the sha256 that {SUMMARY} states; {_FIX}.")
    numbers = {name: number for number, name in enumerate(shards)}
    counts = dict.fromkeys(shards, 0)

    def rows() -> Iterator[Row]:
        last = 0
        for number, line in enumerate(content.splitlines(), start=1):
            row = row_of(_parse_sample(line, f"{path}, line {number}", shards), numbers)
            if row[1] < last:
                raise DataError(f"{path}, line {number} is not in the order of the shards; {_FIX}.")
            last = row[1]
            counts[names[last]] += 1
            yield row

    names = list(shards)
    columns = Columns.build(rows())
    for name, shard in shards.items():
        if counts[name] != shard.samples:
            raise DataError(f"{path} lists {counts[name]} samples of {name}, not {shard.samples}; {_FIX}.")
    return columns


def check_shard_name(name: object) -> str:
    """The name itself if it is a plain file name ending in .tar; DataError for URLs, commands and paths."""
    if not isinstance(name, str) or _SHARD_NAME.fullmatch(name) is None:
        raise DataError(
            f"The shard name {str(name)[:80]!r} is not a plain file name ending in .tar; only local shards are read."
        )
    return name


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); {_FIX}.") from error


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json; DataError if it is missing, damaged or of another version."""
    path = folder / SUMMARY
    try:
        summary = json.loads(_read(path))
        if summary["version"] not in (LINES_VERSION, COLUMNS_VERSION):
            raise DataError(
                f"{path} has version {summary['version']!r}; expected {LINES_VERSION} or {COLUMNS_VERSION}; {_FIX}."
            )
        columns = summary["columns"] if summary["version"] == COLUMNS_VERSION else {}
        good = (
            isinstance(summary["manifest_sha256"], str)
            and isinstance(summary["info"], dict)
            and all(isinstance(text, str) and _SHA256.fullmatch(text) for text in columns.values())
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


def _parse_sample(line: bytes, where: str, shards: Mapping[str, Shard]) -> Sample:
    try:
        sample = Sample(**json.loads(line))
        check_shard_name(sample.shard)
        check_id(sample.id, where)
        good = (
            sample.role in CODES
            and _is_count(sample.offset)
            and _is_count(sample.length)
            and (sample.label is None or type(sample.label) is int)
            and _SHA256.fullmatch(sample.sha256) is not None
            and sample.shard in shards
            and sample.offset + sample.length <= shards[sample.shard].bytes
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{where} is damaged; {_FIX}.") from error
    if not good:
        raise DataError(f"{where} is damaged; {_FIX}.")
    return sample


@dataclass(frozen=True)
class Remote:
    """Where shards lie that are not beside their manifest.

    url: of the folder. retries: of a failed request. cache: local folder for copies of whole shards, of at most
    cache_mib MiB; None: no copies.
    """

    url: str
    retries: int = 4
    cache: str | None = None
    cache_mib: int = 51_200
