"""A request: which role every image of an index has, and what is known of how the roles were drawn.

It lies in its run directory: `roles.arrow`, an Arrow IPC file of one row a sample in the order of the index, and
`request.json` with its sha256, the sha256 of the index, counts and facts. Several requests may use one index at the
same time; they only read it.
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distunlearn.common.files import HashingFile, file_sha256, replacing, write_json
from distunlearn.data.manifest.ids import WINDOW, numbers, texts
from distunlearn.data.manifest.records import CODES, VERSION
from distunlearn.errors import DataError
from distunlearn.verify.records import read_plain

REQUEST = "request.json"
ROLES_FILE = "roles.arrow"
SCHEMA = pa.schema(
    [
        pa.field("key", pa.uint64(), nullable=False),
        pa.field("role", pa.dictionary(pa.int8(), pa.large_string()), nullable=False),
        pa.field("person", pa.int32(), nullable=False),
    ]
)
_FIX = "restore it, or choose another --out"


def keys_of(sha256: np.ndarray) -> np.ndarray:
    """uint64 [n]: the first 8 bytes of each digest. sha256: uint8 [n, 32]."""
    return np.ascontiguousarray(sha256[:, :8]).view("<u8")[:, 0]


def count_codes(role: np.ndarray) -> np.ndarray:
    """How often each code of `records.CODES` occurs, int64. role: uint8 [n]; a part at a time, for NumPy widens it."""
    parts = (role[start : start + WINDOW] for start in range(0, len(role), WINDOW))
    return sum((np.bincount(part, minlength=len(CODES)) for part in parts), np.zeros(len(CODES), dtype=np.int64))


@dataclass(frozen=True)
class Request:
    """Roles of one request.

    index: sha256 of the index they are of. role: uint8 [n], codes of `records.CODES`. key: uint64 [n], see `keys_of`,
    by which the next request finds the images in another index. facts: counts and digests for plan and report. person:
    int32 [n], see `Manifest`.
    """

    index: str
    role: np.ndarray
    key: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)
    person: np.ndarray | None = None

    def counts(self) -> dict[str, int]:
        """Images by role, of the roles that occur."""
        found = count_codes(self.role).tolist()
        return {name: count for name, count in zip(CODES, found, strict=True) if count}

    def save(self, run: Path) -> None:
        """Write both files into a run directory, each atomically; `request.json` last, it vouches for the other."""
        run.mkdir(parents=True, exist_ok=True)
        roles = pa.DictionaryArray.from_arrays(numbers(pa.int8(), self.role.astype(np.int8)), texts(CODES))
        person = np.full(len(self.role), -1, dtype=np.int32) if self.person is None else self.person
        columns = [numbers(pa.uint64(), self.key), roles, numbers(pa.int32(), person)]
        batch = pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
        with replacing(run / ROLES_FILE) as partial:
            sink = HashingFile(partial)
            with sink, pa.ipc.new_file(sink, SCHEMA) as writer:
                writer.write_batch(batch)
        write_json(
            run / REQUEST,
            {
                "version": VERSION, "index_sha256": self.index, "roles_sha256": sink.sha256(), "roles": self.counts(),
                "facts": self.facts,
            },
        )  # fmt: skip

    @classmethod
    def load(cls, run: Path) -> Request:
        """The request of a run directory.

        Raises:
            DataError: it is missing or damaged.
        """
        path = run / REQUEST
        try:
            found = json.loads(read_plain(path))
            good = found["version"] == VERSION and isinstance(found["facts"], dict)
            request = (found["index_sha256"], found["roles_sha256"], found["facts"])
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror or error}); prepare the run first.") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path} is damaged; {_FIX}.") from error
        if not good:
            raise DataError(f"{path} has version {found['version']!r}; expected {VERSION}; {_FIX}.")
        index, sha256, facts = request
        if file_sha256(run / ROLES_FILE) != sha256:
            raise DataError(f"{run / ROLES_FILE} does not have the sha256 that {REQUEST} states; {_FIX}.")
        try:
            with (run / ROLES_FILE).open("rb") as handle:
                mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            reader = pa.ipc.open_file(pa.py_buffer(mapped))
            if reader.num_record_batches != 1:
                raise ValueError("more than one piece")
            batch = reader.get_batch(0)
            batch.validate(full=True)
            names = batch["role"].dictionary.to_pylist()
        except (pa.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
            raise DataError(f"{run / ROLES_FILE} is damaged; {_FIX}.") from error
        if batch.schema != SCHEMA or names != list(CODES) or batch["role"].null_count:
            raise DataError(f"{run / ROLES_FILE} should hold the columns key, role and person of every image; {_FIX}.")
        count = len(batch)
        key = np.frombuffer(batch["key"].buffers()[1] or b"", "<u8", count)
        role = np.frombuffer(batch["role"].indices.buffers()[1] or b"", "|u1", count)
        person = np.frombuffer(batch["person"].buffers()[1] or b"", "<i4", count)
        return cls(index, role, key, facts, person if person.max(initial=-1) >= 0 else None)


def has_request(run: str | Path) -> bool:
    """Whether a run directory holds a request (it may be damaged: `Request.load` tells)."""
    return (Path(run) / REQUEST).exists()
