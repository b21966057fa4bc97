"""Prepared or indexed shards as a webdataset pipeline, for training code outside this package, with every check.

webdataset (1.0.2) alone would lose images: an invalid tar header inside a shard ends that shard without an error. So
the samples, their count, each image's sha256 and label, and the sha256 of every file are compared with the manifest
while it is read. It also reads in another way, from header to header, what `shard_reader` reads by offset.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import webdataset as wds
from webdataset.compat import FluidInterface

from distunlearn.data.loading.verify import check_digest, check_shard_size
from distunlearn.data.manifest.manifest import Manifest, Sample
from distunlearn.data.manifest.records import CODES
from distunlearn.data.sources.tar_index import IMAGE_KINDS, group_samples
from distunlearn.errors import ConfigError, DataError

Record = dict[str, Any]


class CheckedShards(wds.DataPipeline, FluidInterface):
    """webdataset's pipeline with its usual methods: `decode`, `shuffle`, `map`, `to_tuple`, `batched` ..."""


def webdataset(manifest: Manifest | str | Path, role: str | Sequence[str]) -> CheckedShards:
    """The images of one role or of several, each once an epoch, as webdataset hands out samples.

    A sample has the image's bytes under its extension (png, jpg ...), `cls` (if its class is known) and
    `json` as bytes, and `__key__`, `__url__` (path of the shard), `__id__`, `__role__`. Other members of shards made by
    others are left out. Shards are dealt to ranks and, among these, to the workers of a DataLoader.

    Args:
        manifest: itself, or a run directory that holds its shards.
        role: names of roles, see `Manifest`.

    Raises:
        ConfigError: no such role. DataError: no manifest, no image of the role, shards that lie in an object store; and
            while it is read, a shard that is missing, damaged, or other than the manifest says, be it by one byte.
    """
    manifest = manifest if isinstance(manifest, Manifest) else Manifest.of_run(manifest)
    roles = (role,) if isinstance(role, str) else tuple(role)
    unknown = [name for name in roles if name not in CODES]
    if unknown or not roles:
        raise ConfigError(f"role is {', '.join(unknown) or 'empty'}; expected some of {', '.join(CODES)}.")
    if manifest.remote is not None:
        raise DataError(f"The shards lie in {manifest.place}; copy them to a local folder, beside their index.")
    shards = manifest.select(roles).shards
    if not shards:
        raise DataError(f"{manifest.folder} holds no image of the role {', '.join(roles)}; choose another.")
    read = partial(_read, manifest, frozenset(roles))
    return CheckedShards(wds.SimpleShardList(shards), wds.split_by_node, wds.split_by_worker, read)


def _read(manifest: Manifest, roles: frozenset[str], shards: Iterable[Record]) -> Iterator[Record]:
    """A stage of the pipeline: names of shards -> samples of the roles."""
    for shard in shards:
        for sample, kind, record in checked_samples(manifest, shard["url"]):
            if sample.role in roles:
                kept = {name: record[name] for name in ("__key__", "__url__", kind, "cls", "json") if name in record}
                yield kept | {"__id__": sample.id, "__role__": sample.role}


def checked_samples(manifest: Manifest, shard: str) -> Iterator[tuple[Sample, str, Record]]:
    """(what the manifest says, extension of the image, webdataset's record) of every sample of one shard, in order.

    Raises:
        DataError: missing, truncated, changed by as little as one byte, or other samples than in the manifest. What
            only the sha256 of the file tells, or the count, is raised after the last sample.
    """
    path = check_shard_size(manifest, shard)
    expected = manifest.in_shard(shard)
    found = 0
    with path.open("rb") as handle:
        stream = _HashingReader(handle)
        try:
            for record in _records(stream, shard, str(path)):
                found += 1
                if found <= len(expected):
                    sample = expected[found - 1]
                    where = f"{shard} (number {found} of {len(expected)})"
                    yield sample, _check(manifest, record, sample, where), record
        except DataError:
            raise
        except Exception as error:  # tarfile and webdataset raise many kinds on damaged bytes
            raise DataError(
                f"The shard {shard} cannot be read after {found} of {len(expected)} samples "
                f"({type(error).__name__}); run prepare again."
            ) from error
        digest = stream.finish()
    if found != len(expected):
        raise DataError(
            f"The shard {shard} gave {found} samples; expected {len(expected)}: its contents are damaged, "
            "so run prepare again."
        )
    if digest != manifest.shard_files[shard].sha256:
        raise DataError(f"The shard {shard} does not have the sha256 of the manifest; run prepare again.")


def _check(manifest: Manifest, record: Record, sample: Sample, where: str) -> str:
    """The extension of the image, after its id, digest and label were compared with the manifest."""
    kind = next(kind for kind in IMAGE_KINDS if kind in record)
    own = _record_id(record)
    if sample.id not in (own, f"{sample.shard.removesuffix('.tar')}/{own}"):
        raise DataError(
            f"The shard {where} has another or a partial sample where {sample.id!r} is expected; run prepare again."
        )
    check_digest(sample, record[kind])
    label = record["cls"].decode().strip() if "cls" in record else ""
    known = None if sample.label is None else str(sample.label)
    if known is not None and manifest.info.get("indexed"):  # numbered as they occur in the shards of others
        known = manifest.info["classes"][int(known)]
    if (None if label in ("", "-1") else label) != known:
        raise DataError(f"The shard {where} has the class {label!r}, the manifest {known!r}; run prepare again.")
    return kind


class _HashingReader:
    """A file that is only read forwards, hashing what passes."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        self._digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._handle.read(size)
        self._digest.update(data)
        return data

    def finish(self) -> str:
        """sha256 of the whole file, after reading what is left (the end-of-archive padding)."""
        while self.read(1 << 20):
            pass
        return self._digest.hexdigest()


def _records(stream: _HashingReader, shard: str, url: str) -> Iterator[Record]:
    """webdataset's own tar stage over a file we opened, grouped as `read_tar` groups it.

    Not its WebDataset class: that takes URLs (`pipe:` runs a command), may be redirected to a stale cache by an
    environment variable, and leaves files open.
    """
    strict = wds.handlers.reraise_exception
    members = wds.tariterators.tar_file_expander([{"url": url, "stream": stream}], handler=strict)
    named = ((member["fname"], member["data"]) for member in members if member)  # an empty one ends the shard
    for key, parts in group_samples(named, shard, Counter()):
        yield {"__key__": key, "__url__": url, **parts}


def _record_id(record: Record) -> str:
    """The text `id` of the sample's json, else its key: as `tar_index.read_tar` names samples."""
    content = json.loads(record.get("json", b"null"))
    named = content.get("id") if isinstance(content, dict) else None
    return named if isinstance(named, str) else record["__key__"]
