"""The manifest: the index of the shards, and the roles that a request gives to the images.

The index says what lies where, and the digests that prove it. It lies with the shards: `index.arrow` is an Arrow IPC
file of one row a sample, in shard order, which is mapped, not read; `summary.json` has size and sha256 of each shard
and the sha256 of index.arrow. The roles lie in a run directory, see `request`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distunlearn.common.files import write_atomic
from distunlearn.common.text import printable
from distunlearn.data.manifest.columns import NO_HASH, NO_LABEL, Columns, Row
from distunlearn.data.manifest.ids import WINDOW, IdList
from distunlearn.data.manifest.records import (
    CODE,
    CODES,
    ROLES,
    SUMMARY,
    UNUSED,
    VERSION,
    Sample,
    Shard,
    check_shard_name,
    read_summary,
)
from distunlearn.data.manifest.request import Request, count_codes, keys_of
from distunlearn.data.manifest.role_rows import RoleRows
from distunlearn.errors import DataError

if TYPE_CHECKING:
    from distunlearn.data.manifest.records import Remote

INDEX = "index.arrow"
LOST = "purged"  # among the facts of a request
SMALL = 200_000  # samples up to which they are kept as Python objects
_FIX = "run prepare again"


def has_index(folder: str | Path) -> bool:
    """Whether a folder of shards has an index (it may be damaged: `Manifest.load` tells)."""
    return any((Path(folder) / name).exists() for name in (INDEX, SUMMARY))


@dataclass(frozen=True, slots=True)
class _Selection:
    """The ids of some roles in manifest order, the shards that hold some, and where the ids of each begin."""

    ids: Sequence[str]
    shards: list[str]
    starts: np.ndarray = field(compare=False)  # int64 [S + 1], the last is the number of ids


class Manifest:
    """Samples of a folder of shards, with the roles of one request.

    Args:
        folder: of the index, and of the shards unless `remote` says otherwise.
        samples: in shard order; within a shard, in file order. Or their columns.
        shard_files: size, digest and count of every shard, by name, in order.
        info: further facts for summary.json (sources, classes, images left out ...).
        remote: the object store that holds the shards; None: they lie in `folder`.
        facts: of the request. person: int32 [n], number of the person on each image, -1 where unknown; None: none is.

    Attributes:
        columns: of all samples. index_sha256: of index.arrow. fingerprint: of the index and the roles.
    """

    def __init__(
        self,
        folder: str | Path,
        samples: Iterable[Sample] | Columns,
        shard_files: Mapping[str, Shard],
        info: Mapping[str, Any] | None = None,
        remote: Remote | None = None,
        facts: Mapping[str, Any] | None = None,
        person: np.ndarray | None = None,
    ) -> None:
        self.person = person
        self.folder = Path(folder)
        self.remote = remote
        self.shard_files = dict(shard_files)
        self.info = dict(info or {})
        self.facts = dict(facts or {})
        self._names = list(self.shard_files)
        self._number = {name: number for number, name in enumerate(self._names)}
        if isinstance(samples, Columns):
            self.columns = samples
        else:
            listed = list(samples)
            roles = np.array([CODE[sample.role] for sample in listed], dtype=np.uint8)
            self.columns = Columns.build(_row(sample, self._number) for sample in listed).with_roles(roles)
        numbers = np.arange(len(self._names) + 1, dtype=self.columns.shard.dtype)  # else NumPy copies all of them
        borders = np.searchsorted(self.columns.shard, numbers)
        assert borders[-1] == len(self.columns) and (np.diff(borders) >= 0).all(), "samples are not in shard order"
        self._borders = borders.tolist()
        self._digests: dict[tuple[str, ...], str] = {}
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
    def index_sha256(self) -> str:
        """Of index.arrow."""
        return self.columns.digest(self._names)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what tells the images, their places and their roles."""
        digest = hashlib.sha256(self.index_sha256.encode())
        digest.update(np.ascontiguousarray(self.columns.role).data)
        return digest.hexdigest()

    def with_roles(self, role: np.ndarray, facts: Mapping[str, Any], person: np.ndarray | None = None) -> Manifest:
        """The same index with the roles of another request. role: uint8 [n]; person: None: as they are."""
        columns, person = self.columns.with_roles(role), self.person if person is None else person
        made = Manifest(self.folder, columns, self.shard_files, self.info, self.remote, facts, person)
        made.index_sha256 = self.index_sha256
        return made

    def ids(self, roles: str | Sequence[str]) -> Sequence[str]:
        """Ids of one role or of several, in manifest order: a list, or above SMALL a view that makes them."""
        return self.select(roles).ids

    def samples_digest(self, roles: Sequence[str]) -> str:
        """sha256 of the ids, image digests and labels of all samples of some roles, wherever they lie; kept."""
        if (wanted := tuple(roles)) not in self._digests:
            self._digests[wanted] = self.columns.samples_digest([CODE[role] for role in wanted])
        return self._digests[wanted]

    def label_range(self, roles: Sequence[str]) -> tuple[int, int] | None:
        """Smallest and largest label of some roles, NO_LABEL where one is unknown; None: no sample has such a role."""
        wanted, found = np.zeros(256, dtype=bool), []
        wanted[[CODE[role] for role in roles]] = True
        for start in range(0, len(self), WINDOW):
            part = slice(start, start + WINDOW)
            labels = self.columns.label[part][wanted[self.columns.role[part]]]
            found += [labels.min(), labels.max()] if len(labels) else []
        return (int(min(found)), int(max(found))) if found else None

    def select(self, roles: str | Sequence[str]) -> _Selection:
        """Ids of the roles with their shards (computed once, then kept)."""
        wanted = (roles,) if isinstance(roles, str) else tuple(sorted(set(roles)))
        assert set(wanted) <= set(CODES), wanted
        if wanted not in self._selections:
            rows = RoleRows(self.columns.role, [CODE[role] for role in wanted], np.array(self._borders))
            ids = IdList(self.columns.ids, rows)
            numbers = np.flatnonzero(np.diff(rows.starts))
            shards = [self._names[number] for number in numbers.tolist()]
            starts = np.append(rows.starts[numbers], len(rows))
            self._selections[wanted] = _Selection(list(ids) if self.is_small else ids, shards, starts)
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

    def persons(self, ids: Sequence[str]) -> np.ndarray | None:
        """Numbers of the persons, int32 [n], -1 where unknown; None: the request has no persons."""
        return None if self.person is None else self.person[self._rows_of(ids)]

    def count_roles(self) -> dict[str, int]:
        """Samples per role; `unused` and `forgotten` only if there are any."""
        counts = dict(zip(CODES, count_codes(self.columns.role).tolist(), strict=True))
        return {role: count for role, count in counts.items() if count or role in ROLES}

    def summary(self) -> dict[str, Any]:
        """What summary.json holds: sizes, digests, facts of the shards."""
        return {
            "version": VERSION,
            "index_sha256": self.index_sha256,
            "samples": len(self),
            "bytes": sum(shard.bytes for shard in self.shard_files.values()),
            "shards": {name: asdict(shard) for name, shard in self.shard_files.items()},
            "info": self.info,
        }

    def save(self, folder: str | Path) -> None:
        """Write index and summary, each atomically; the summary last, it vouches for the other."""
        folder = Path(folder)
        self.index_sha256 = self.columns.save(folder / INDEX, self._names)
        write_atomic(folder / SUMMARY, (json.dumps(self.summary(), indent=2) + "\n").encode())

    def save_request(self, run: str | Path) -> None:
        """Write the roles into a run directory."""
        columns = self.columns
        Request(self.index_sha256, columns.role, keys_of(columns.sha256), self.facts, self.person).save(Path(run))

    @classmethod
    def load(cls, folder: str | Path, remote: Remote | None = None, run: str | Path | None = None) -> Manifest:
        """Read and check an index, and the roles of a request.

        Args:
            remote: where the shards lie, if not beside the index.
            run: directory of the run whose request it is; None: all images are `unused`.

        Raises:
            DataError: missing, damaged, or contradicting itself or its summary; the request is of another index.
        """
        folder = Path(folder)
        summary = read_summary(folder)
        shards = {check_shard_name(name): Shard(**entry) for name, entry in summary["shards"].items()}
        columns = Columns.load(folder / INDEX, summary["index_sha256"], shards)
        manifest = cls(folder, columns, shards, summary["info"], remote)
        manifest.index_sha256 = summary["index_sha256"]
        manifest._check_ids()
        return manifest if run is None else manifest.requested(Path(run))

    @classmethod
    def of_run(cls, run: str | Path) -> Manifest:
        """That of a run directory which holds its shards."""
        return cls.load(Path(run) / "shards", run=run)

    def has_been(self, index: str) -> bool:
        """Whether this is the index of that sha256, or what a purge has left of it."""
        return index == self.index_sha256 or any(step["index"] == index for step in self._purges())

    def _purges(self) -> list[dict[str, Any]]:
        return self.info.get("purged", {}).get("steps", [])

    def requested(self, run: Path) -> Manifest:
        """The same images with the roles of the request in a run directory; errors: see `load`."""
        request, steps = Request.load(run), self._purges()
        since = next((k for k, step in enumerate(steps) if step["index"] == request.index), None)
        if not self.has_been(request.index):
            raise DataError(
                f"{run} gives roles to the images of another index than that in {self.folder}; give the shards that it "
                "was prepared with, or choose another --out."
            )
        role, person, lost = request.role, request.person, Counter(request.facts.get(LOST, {}))
        for step in steps[since:] if since is not None else ():
            lost.update(CODES[code] for code in role[step["rows"]].tolist())
            role = np.delete(role, step["rows"])
            person = None if person is None else np.delete(person, step["rows"])
        lost.pop(UNUSED, None)
        if len(role) != len(self):
            raise DataError(f"{run} has the roles of {len(role)} images, but the index has {len(self)}; {_FIX}.")
        return self.with_roles(role, {**request.facts, **({LOST: dict(lost)} if lost else {})}, person)

    @property
    def lost(self) -> dict[str, int]:
        """Images of this request that were purged from the shards since, by role."""
        return self.facts.get(LOST, {})

    def _check_ids(self) -> None:
        hashes, rows = self.columns.ids.index()
        for start in range(0, len(hashes), WINDOW):
            part = hashes[start : start + WINDOW + 1]
            for place in (np.flatnonzero(part[1:] == part[:-1]) + start).tolist():
                first, second = (self.columns.ids[int(row)] for row in rows[place : place + 2])
                if first == second:
                    raise DataError(f"The index in {self.folder} lists the id {first[:80]!r} twice; {_FIX}.")
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
        numeric = (values[rows].tolist() for values in (c.offset, c.length, c.width, c.height))
        parts = (c.ids.at(rows), shards, digests, roles, labels, *numeric)
        return [
            Sample(i, self._names[s], o, n, d, CODES[r], k, w, h)
            for i, s, d, r, k, o, n, w, h in zip(*parts, strict=True)
        ]


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
        sample.id, numbers[sample.shard], sample.offset, sample.length, bytes.fromhex(sample.sha256), label,
        sample.width, sample.height, NO_HASH, None,
    )  # fmt: skip
