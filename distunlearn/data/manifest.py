"""The manifest: what lies where in the shards, and the digests that prove it.

`manifest.jsonl` has one line per sample, in shard order; `summary.json` has the counts, each shard's
size and sha256, and the sha256 of manifest.jsonl itself, so that a lost line is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distunlearn.data.forget_list import check_id
from distunlearn.data.roles import ROLES
from distunlearn.errors import DataError

__all__ = ["MANIFEST", "SUMMARY", "Manifest", "Sample", "Shard", "check_shard_name"]

MANIFEST = "manifest.jsonl"
SUMMARY = "summary.json"
_VERSION = 1
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


@dataclass(frozen=True, slots=True)
class _Selection:
    """The ids of some roles in manifest order, and for each the number of its shard among `shards`."""

    ids: list[str]
    shards: list[str]
    shard_of: np.ndarray = field(compare=False)  # int64 [n]


class Manifest:
    """Samples of a folder of shards.

    Args:
        folder: where the shards lie.
        samples: in shard order; within a shard, in file order.
        shard_files: size, digest and count of every shard, by name.
        info: further facts for summary.json (sources, classes, duplicates ...).

    Attributes:
        by_id: {id: Sample}. fingerprint: sha256 of manifest.jsonl.
    """

    def __init__(
        self,
        folder: str | Path,
        samples: Iterable[Sample],
        shard_files: Mapping[str, Shard],
        info: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.samples = list(samples)
        self.shard_files = dict(shard_files)
        self.info = dict(info or {})
        self.by_id = {sample.id: sample for sample in self.samples}
        self._by_shard: dict[str, list[Sample]] = {name: [] for name in self.shard_files}
        for sample in self.samples:
            self._by_shard[sample.shard].append(sample)
        self._selections: dict[tuple[str, ...], _Selection] = {}
        self.fingerprint = hashlib.sha256(self._lines()).hexdigest()

    def __len__(self) -> int:
        return len(self.samples)

    def ids(self, roles: str | Sequence[str]) -> list[str]:
        """Ids of one role or of several, in manifest order."""
        return list(self.select(roles).ids)

    def select(self, roles: str | Sequence[str]) -> _Selection:
        """Ids of the roles with their shards (computed once, then kept)."""
        wanted = (roles,) if isinstance(roles, str) else tuple(sorted(set(roles)))
        assert set(wanted) <= set(ROLES), wanted
        if wanted not in self._selections:
            samples = [sample for sample in self.samples if sample.role in wanted]
            shards = list(dict.fromkeys(sample.shard for sample in samples))
            number = {name: i for i, name in enumerate(shards)}
            shard_of = np.array([number[sample.shard] for sample in samples], dtype=np.int64)
            self._selections[wanted] = _Selection([sample.id for sample in samples], shards, shard_of)
        return self._selections[wanted]

    def shards(self) -> list[str]:
        """Names of all shards, in order."""
        return list(self.shard_files)

    def in_shard(self, shard: str) -> list[Sample]:
        """The samples of one shard, in file order."""
        return self._by_shard[shard]

    def shard_path(self, shard: str) -> Path:
        """Path of a shard; DataError if the name is anything but a plain file name."""
        return self.folder / check_shard_name(shard)

    def labels(self, ids: Iterable[str]) -> np.ndarray:
        """Labels as int64 [n]; -1 where unknown."""
        found = (self.by_id[sample_id].label for sample_id in ids)
        return np.array([-1 if label is None else label for label in found], dtype=np.int64)

    def summary(self) -> dict[str, Any]:
        """What summary.json holds: counts per role, sizes, digests."""
        counts = dict.fromkeys(ROLES, 0)
        for sample in self.samples:
            counts[sample.role] += 1
        return {
            "version": _VERSION,
            "manifest_sha256": self.fingerprint,
            "samples": len(self.samples),
            "roles": counts,
            "bytes": sum(shard.bytes for shard in self.shard_files.values()),
            "shards": {name: asdict(shard) for name, shard in self.shard_files.items()},
            "info": self.info,
        }

    def save(self, folder: str | Path) -> None:
        """Write manifest.jsonl and summary.json, each atomically; the summary last, it vouches for the other."""
        folder = Path(folder)
        _write_atomic(folder / MANIFEST, self._lines())
        _write_atomic(folder / SUMMARY, (json.dumps(self.summary(), indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read and check a manifest.

        Raises:
            DataError: missing, damaged, or contradicting itself or its summary.
        """
        folder = Path(folder)
        summary = _read_summary(folder)
        content = _read(folder / MANIFEST)
        if hashlib.sha256(content).hexdigest() != summary["manifest_sha256"]:
            raise DataError(f"{folder / MANIFEST} does not have the sha256 that {SUMMARY} states; {_FIX}.")
        shards = {check_shard_name(name): Shard(**entry) for name, entry in summary["shards"].items()}
        samples = [
            _parse_sample(line, f"{folder / MANIFEST}, line {number}", shards)
            for number, line in enumerate(content.splitlines(), start=1)
        ]
        manifest = cls(folder, samples, shards, summary["info"])
        if len(manifest.by_id) != len(samples):
            raise DataError(f"{folder / MANIFEST} lists {len(samples) - len(manifest.by_id)} ids twice; {_FIX}.")
        for name, shard in shards.items():
            found = len(manifest.in_shard(name))
            if found != shard.samples:
                raise DataError(f"{folder / MANIFEST} lists {found} samples of {name}, not {shard.samples}; {_FIX}.")
        return manifest

    def _lines(self) -> bytes:
        """The canonical text: one JSON object a line, keys in order, ASCII."""
        lines = (json.dumps(asdict(sample), separators=(",", ":")) + "\n" for sample in self.samples)
        return "".join(lines).encode("ascii")


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


def _read_summary(folder: Path) -> dict[str, Any]:
    path = folder / SUMMARY
    try:
        summary = json.loads(_read(path))
        if summary["version"] != _VERSION:
            raise DataError(f"{path} has version {summary['version']!r}; expected {_VERSION}; {_FIX}.")
        good = (
            isinstance(summary["manifest_sha256"], str)
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


def _parse_sample(line: bytes, where: str, shards: Mapping[str, Shard]) -> Sample:
    try:
        sample = Sample(**json.loads(line))
        check_shard_name(sample.shard)
        check_id(sample.id, where)
        good = (
            sample.role in ROLES
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


def _write_atomic(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, path)
