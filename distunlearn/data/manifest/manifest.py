"""The manifest: what lies where in the shards, and the digests that prove it.

`manifest.arrow` is an Arrow IPC file of one row a sample, in shard order, which is mapped, not read. Beside it,
`summary.json` has the counts, each shard's size and sha256, and the sha256 of manifest.arrow.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distunlearn.common.files import write_atomic
from distunlearn.common.text import printable
from distunlearn.data.manifest.columns import NO_LABEL, Columns, Row
from distunlearn.data.manifest.ids import IdList
from distunlearn.data.manifest.records import (
    CODE,
    CODES,
    ROLES,
    SUMMARY,
    VERSION,
    Sample,
    Shard,
    check_shard_name,
    read_summary,
)
from distunlearn.errors import DataError

if TYPE_CHECKING:
    from distunlearn.data.manifest.records import Remote

MANIFEST = "manifest.arrow"
SMALL = 200_000  # samples up to which they are kept as Python objects
_FIX = "run prepare again"


def has_manifest(folder: str | Path) -> bool:
    """Whether a prepared folder of shards is there (it may be damaged: `Manifest.load` tells)."""
    return any((Path(folder) / name).exists() for name in (MANIFEST, SUMMARY))


@dataclass(frozen=True, slots=True)
class _Selection:
    """The ids of some roles in manifest order, and for each the number of its shard among `shards`."""

    ids: Sequence[str]
    shards: list[str]
    shard_of: np.ndarray = field(compare=False)  # int64 [n]


class Manifest:
    """Samples of a folder of shards.

    Args:
        folder: of the manifest, and of the shards unless `remote` says otherwise.
        samples: in shard order; within a shard, in file order. Or their columns.
        shard_files: size, digest and count of every shard, by name, in order.
        info: further facts for summary.json (sources, classes, duplicates ...).
        remote: the object store that holds the shards; None: they lie in `folder`.

    Attributes:
        columns: of all samples. fingerprint: sha256 of the manifest.
    """

    def __init__(
        self,
        folder: str | Path,
        samples: Iterable[Sample] | Columns,
        shard_files: Mapping[str, Shard],
        info: Mapping[str, Any] | None = None,
        remote: Remote | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.remote = remote
        self.shard_files = dict(shard_files)
        self.info = dict(info or {})
        self._names = list(self.shard_files)
        self._number = {name: number for number, name in enumerate(self._names)}
        if isinstance(samples, Columns):
            self.columns = samples
        else:
            self.columns = Columns.build(_row(sample, self._number) for sample in samples)
        borders = np.searchsorted(self.columns.shard, np.arange(len(self._names) + 1))
        assert borders[-1] == len(self.columns) and (np.diff(borders) >= 0).all(), "samples are not in shard order"
        self._borders = borders.tolist()
        self._selections: dict[tuple[str, ...], _Selection] = {}

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def place(self) -> str:
        """Where the shards lie, for messages."""
        return printable(self.remote.url if self.remote else self.folder)

    @property
    def is_small(self) -> bool:
        """Whether its samples are kept as Python objects."""
        return len(self) <= SMALL

    @cached_property
    def samples(self) -> Sequence[Sample]:
        """All samples, in order: a list, or above SMALL a view that makes them when they are asked for."""
        return self._at(np.arange(len(self))) if self.is_small else _Samples(self)

    @cached_property
    def by_id(self) -> Mapping[str, Sample]:
        """{id: Sample}, or above SMALL a view that looks ids up in the columns."""
        return {sample.id: sample for sample in self.samples} if self.is_small else _ById(self)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of manifest.arrow."""
        return self.columns.digest(self._names)

    def ids(self, roles: str | Sequence[str]) -> list[str]:
        """Ids of one role or of several, in manifest order."""
        return list(self.select(roles).ids)

    def select(self, roles: str | Sequence[str]) -> _Selection:
        """Ids of the roles with their shards (computed once, then kept)."""
        wanted = (roles,) if isinstance(roles, str) else tuple(sorted(set(roles)))
        assert set(wanted) <= set(CODES), wanted
        if wanted not in self._selections:
            rows = self.rows(wanted)
            ids = IdList(self.columns.ids, rows)
            numbers, shard_of = np.unique(self.columns.shard[rows], return_inverse=True)
            shards = [self._names[number] for number in numbers.tolist()]
            self._selections[wanted] = _Selection(list(ids) if self.is_small else ids, shards, shard_of)
        return self._selections[wanted]

    def lookup(self, ids: Sequence[str]) -> list[Sample]:
        """The samples of these ids, in this order; KeyError for an id that is none."""
        return [self.by_id[i] for i in ids] if self.is_small else self._at(self._rows_of(ids))

    def rows(self, roles: Sequence[str]) -> np.ndarray:
        """Row numbers of the roles, int64 [n], ascending."""
        return np.flatnonzero(np.isin(self.columns.role, [CODE[role] for role in roles]))

    def shards(self) -> list[str]:
        """Names of all shards, in order."""
        return list(self.shard_files)

    def in_shard(self, shard: str) -> list[Sample]:
        """The samples of one shard, in file order."""
        number = self._number[shard]
        first, last = self._borders[number : number + 2]
        return list(self.samples[first:last])

    def shard_path(self, shard: str) -> Path:
        """Path of a shard; DataError if the name is anything but a plain file name."""
        return self.folder / check_shard_name(shard)

    def labels(self, ids: Iterable[str]) -> np.ndarray:
        """Labels as int64 [n]; -1 where unknown."""
        if self.is_small:
            found = (self.by_id[sample_id].label for sample_id in ids)
            return np.array([-1 if label is None else label for label in found], dtype=np.int64)
        labels = self.columns.label[self._rows_of(list(ids))].astype(np.int64)
        return np.where(labels == NO_LABEL, -1, labels)

    def count_roles(self) -> dict[str, int]:
        """Samples per role; `unused` only if there are any."""
        counts = dict(zip(CODES, np.bincount(self.columns.role, minlength=len(CODES)).tolist(), strict=True))
        return {role: count for role, count in counts.items() if count or role in ROLES}

    def summary(self) -> dict[str, Any]:
        """What summary.json holds: counts per role, sizes, digests."""
        return {
            "version": VERSION,
            "manifest_sha256": self.fingerprint,
            "samples": len(self),
            "roles": self.count_roles(),
            "bytes": sum(shard.bytes for shard in self.shard_files.values()),
            "shards": {name: asdict(shard) for name, shard in self.shard_files.items()},
            "info": self.info,
        }

    def save(self, folder: str | Path) -> None:
        """Write manifest and summary, each atomically; the summary last, it vouches for the other."""
        folder = Path(folder)
        self.fingerprint = self.columns.save(folder / MANIFEST, self._names)
        write_atomic(folder / SUMMARY, (json.dumps(self.summary(), indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: str | Path, remote: Remote | None = None) -> Manifest:
        """Read and check a manifest; remote: where its shards lie, if not beside it.

        Raises:
            DataError: missing, damaged, or contradicting itself or its summary.
        """
        folder = Path(folder)
        summary = read_summary(folder)
        shards = {check_shard_name(name): Shard(**entry) for name, entry in summary["shards"].items()}
        columns = Columns.load(folder / MANIFEST, summary["manifest_sha256"], shards)
        manifest = cls(folder, columns, shards, summary["info"], remote)
        manifest.fingerprint = summary["manifest_sha256"]
        manifest._check_ids()
        return manifest

    def _check_ids(self) -> None:
        hashes, rows = self.columns.ids.index()
        for place in np.flatnonzero(hashes[1:] == hashes[:-1]).tolist():
            first, second = (self.columns.ids[int(row)] for row in rows[place : place + 2])
            if first == second:
                raise DataError(f"The manifest in {self.folder} lists the id {first[:80]!r} twice; {_FIX}.")
        self.columns.ids.release()

    def _rows_of(self, ids: Sequence[str]) -> np.ndarray:
        rows = self.columns.ids.find(ids, exact=True)
        if len(rows) and rows.min() < 0:
            raise KeyError(ids[int(np.argmin(rows))])
        return rows

    def _at(self, rows: np.ndarray) -> list[Sample]:
        """The samples of these rows."""
        c = self.columns
        digests = [row.tobytes().hex() for row in c.sha256[rows]]
        shards, roles = c.shard[rows].tolist(), c.role[rows].tolist()
        labels = (None if label == NO_LABEL else label for label in c.label[rows].tolist())
        parts = (c.ids.at(rows), shards, c.offset[rows].tolist(), c.length[rows].tolist(), digests, roles, labels)
        return [Sample(i, self._names[s], o, n, d, CODES[r], k) for i, s, o, n, d, r, k in zip(*parts, strict=True)]


class _Samples(Sequence[Sample]):
    """Samples made from the columns when they are asked for."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def __len__(self) -> int:
        return len(self._manifest)

    def __getitem__(self, place):  # type: ignore[no-untyped-def, override]
        if isinstance(place, slice):
            return self._manifest._at(np.arange(*place.indices(len(self))))
        return self._manifest._at(np.array([range(len(self))[place]]))[0]

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self), 1 << 12):
            yield from self[start : start + (1 << 12)]


class _ById(Mapping[str, Sample]):
    """Look-ups by id in the columns."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def __getitem__(self, sample_id: str) -> Sample:
        return self._manifest._at(self._manifest._rows_of([sample_id]))[0]

    def __contains__(self, sample_id: object) -> bool:
        return isinstance(sample_id, str) and int(self._manifest.columns.ids.find([sample_id], exact=True)[0]) >= 0

    def __len__(self) -> int:
        return len(self._manifest)

    def __iter__(self) -> Iterator[str]:
        return iter(self._manifest.columns.ids)


def _row(sample: Sample, numbers: Mapping[str, int]) -> Row:
    label = NO_LABEL if sample.label is None else sample.label
    return (
        sample.id, numbers[sample.shard], sample.offset, sample.length, bytes.fromhex(sample.sha256),
        CODE[sample.role], label,
    )  # fmt: skip
