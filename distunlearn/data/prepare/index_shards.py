"""The index of WebDataset shards that exist, such as those of img2dataset, which are read and left as they are.

Every sample of every shard is listed. What an interrupted index had read is kept in `.index.partial` for the next one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distunlearn.common.files import file_sha256, write_atomic
from distunlearn.config.schema import DataConfig
from distunlearn.data.manifest.columns import NO_HASH, NO_LABEL, Columns
from distunlearn.data.manifest.manifest import Manifest, Shard, check_shard_name, has_index
from distunlearn.data.manifest.records import Remote
from distunlearn.data.prepare.duplicates import perceptual_hash
from distunlearn.data.prepare.process_pool import num_workers, run_jobs
from distunlearn.data.prepare.write_shards import Progress
from distunlearn.data.sources.decode import image_size
from distunlearn.data.sources.tar_folder import file_names, other_files, tar_names
from distunlearn.data.sources.tar_index import number_labels, read_tar, unique_ids
from distunlearn.data.storage.object_store import ObjectStore
from distunlearn.data.storage.retry import Counts
from distunlearn.errors import DataError

_WORK = ".index.partial"
_STAMPS = ("ETag", "etag", "generation", "md5Hash", "content_md5", "Last-Modified", "LastModified", "mtime")
_NAMED = 100  # undecodable images that are named; all of them are counted


@dataclass(frozen=True)
class _Shared:
    folder: Path
    max_pixels: int
    hashes: bool
    remote: Remote | None
    by: str

    def facts(self) -> dict[str, Any]:
        """What decides the columns, beside the shards."""
        return {"hashes": self.hashes, "max_pixels": self.max_pixels, "named_by": self.by}


def index_shards(cfg: DataConfig, folder: str | Path, progress: Progress | None = None) -> Manifest:
    """The index of a folder of shards; all shards are read once, and not again where the folder has it already.

    Shards that lie in an object store (`cfg.store`) are fetched into the folder one at a time, for as long as they are
    read; index and summary stay in the folder. No image has a role, see `selection.draw_request`.

    Args:
        cfg: the store, limits, and `forget_by`, the names of images that are kept for lists.
        progress: called with (shards read, shards in all).

    Raises:
        DataError: `read_tar` refuses a shard, two samples have one id, the folder has the index of other shards or of
            other settings, cannot be written, or another index works on it; see also `ObjectStore.sizes`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} is no folder; give a local folder that holds the shards or their index.")
    remote = Remote(cfg.store, cfg.read_retries) if cfg.store else None
    store = ObjectStore(remote.url, remote.retries) if remote else None
    listed = store.names(Counts()) if store else [*tar_names(folder), *file_names(folder)]
    names = [check_shard_name(n) for n in dict.fromkeys(listed) if n.endswith(".tar") and n[0] != "."]
    with _work_folder(folder) as work:
        shared = _Shared(folder, cfg.max_pixels, cfg.near_distance is not None, remote, cfg.forget_by)
        sizes = store.sizes(names, Counts()) if store else [(folder / name).stat().st_size for name in names]
        manifest = _known(folder, shared, dict(zip(names, sizes, strict=True)))
        if manifest is None:
            workers = num_workers(cfg.prepare_workers, sum(sizes) >> 14, len(names))  # 16 KiB: an image and its parts
            found = _Found(other_files(listed))
            for name, note in zip(names, run_jobs(_scan, shared, names, workers), strict=True):
                found.add(name, note)
                if progress is not None:
                    progress(len(found.files), len(names))
            manifest = found.manifest(shared)
            manifest.save(folder)
        manifest.remote = remote
        shutil.rmtree(work)
    return manifest


def _known(folder: Path, shared: _Shared, sizes: Mapping[str, int]) -> Manifest | None:
    """The index that the folder has, if it is of these shards; None if it has none. Bytes are checked by each run."""
    if not has_index(folder):
        return None
    manifest = Manifest.load(folder)
    known = {name: shard.bytes for name, shard in manifest.shard_files.items()}
    if known != sizes or manifest.info.get("indexed", shared.facts()) != shared.facts():
        raise DataError(
            f"{folder} has an index of other shards or of other settings (data.near_distance, max_pixels, forget_by); "
            "remove index.arrow and summary.json there first, if no run needs them."
        )
    return manifest


class _Found:
    """What was read of all shards so far."""

    def __init__(self, skipped: Counter[str]) -> None:
        self.skipped, self.left_out = skipped, Counter[str]()
        self.files: dict[str, Shard] = {}
        self.samples: list[list[Any]] = []
        self.shards: list[str] = []

    def add(self, name: str, note: dict[str, Any]) -> None:
        self.files[name] = Shard(note["bytes"], note["sha256"], len(note["samples"]))
        self.left_out.update(note["left_out"])
        self.samples += note["samples"]
        self.shards += [name] * len(note["samples"])

    def manifest(self, shared: _Shared) -> Manifest:
        number = {name: at for at, name in enumerate(self.files)}
        named = [(shard, sample[0], sample[1]) for shard, sample in zip(self.shards, self.samples, strict=True)]
        labels, classes = number_labels([sample[2] for sample in self.samples])
        columns = Columns.build(
            (sample_id, number[shard], sample[3], sample[4], bytes.fromhex(sample[5]),
             NO_LABEL if label is None else label, *sample[6:])
            for sample_id, shard, sample, label in zip(unique_ids(named), self.shards, self.samples, labels,
                                                       strict=True)
        )  # fmt: skip
        bad = np.flatnonzero(columns.width == 0)
        info = {
            "sources": ["webdataset"],
            "classes": classes,
            "labels_known": bool((columns.label != NO_LABEL).all()),
            "skipped_files": dict(self.skipped),
            "left_out": dict(self.left_out),
            "indexed": shared.facts(),
            "undecodable": len(bad),
            "undecodable_ids": columns.ids.at(bad[:_NAMED]),
        }
        return Manifest(shared.folder, columns, self.files, info)


def _scan(shared: _Shared, name: str) -> dict[str, Any]:
    """Samples, size and digest of one shard.

    A sample is [id, whether it is from its .json, class as written, offset, length, sha256, width, height, perceptual
    hash, by what else a list may name it].
    """
    note_path = shared.folder / _WORK / f"{name}.note"
    plan = _plan(shared, name)
    with suppress(OSError, ValueError):
        known = json.loads(note_path.read_bytes()) if plan and note_path.exists() else {}
        if known.get("plan") == plan:
            return known
    with _at_hand(shared, name) as path:
        left: Counter[str] = Counter()
        note = {"plan": plan, "samples": _samples(shared, path, left), "bytes": path.stat().st_size}
        note["left_out"] = dict(left)
        note["sha256"] = file_sha256(path)
    write_atomic(note_path, json.dumps(note).encode())
    return note


def _plan(shared: _Shared, name: str) -> str:
    """What tells that a shard was read before, in the same way; "" if nothing does."""
    if shared.remote is None:
        try:
            status = (shared.folder / name).stat()
        except OSError:
            return ""
        stamp = f"{status.st_size}:{status.st_mtime_ns}"
    else:
        info = ObjectStore(shared.remote.url, shared.remote.retries).infos([name], Counts())[0]
        stamps = [str(info[key]) for key in _STAMPS if info.get(key)]
        if not stamps:
            return ""
        stamp = ":".join([shared.remote.url, str(info["size"]), *stamps])
    return f"{stamp}:{shared.hashes}:{shared.max_pixels}:{shared.by}"


@contextmanager
def _at_hand(shared: _Shared, name: str) -> Iterator[Path]:
    """A shard as a local file: itself, or while it is needed a copy of the one in the store."""
    if shared.remote is None:
        yield shared.folder / name
        return
    store, counts, path = ObjectStore(shared.remote.url, shared.remote.retries), Counts(), shared.folder / _WORK / name
    try:
        with path.open("wb") as handle:
            for piece in store.stream(name, store.sizes([name], counts)[0], counts):
                handle.write(piece)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _samples(shared: _Shared, path: Path, left: Counter[str]) -> list[list[Any]]:
    samples: list[list[Any]] = []
    found = read_tar(path, left)
    if not found:
        raise DataError(f"{path.name} holds no sample; remove it.")
    try:
        with path.open("rb") as handle:
            for sample in found:
                data = os.pread(handle.fileno(), sample.image.size, sample.image.offset)
                digest = hashlib.sha256(data).hexdigest()
                named = {"key": sample.key, **sample.facts}.get(shared.by) if shared.by != "id" else None
                samples.append([sample.id, sample.named, sample.label, sample.image.offset, len(data), digest,
                                *_look(shared, data, sample.id), None if named is None else str(named)])  # fmt: skip
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check the disk.") from error
    return samples


def _look(shared: _Shared, data: bytes, sample_id: str) -> tuple[int, int, int]:
    """(width, height, perceptual hash or NO_HASH) of an image; no pixels for one that cannot be used."""
    try:
        size = image_size(data, sample_id, shared.max_pixels)
        return *size, perceptual_hash(data, sample_id, shared.max_pixels) if shared.hashes and size[0] else NO_HASH
    except DataError:
        return 0, 0, NO_HASH


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """`.index.partial` in the folder, locked; what an interrupted index left in it stays."""
    work = folder / _WORK
    try:
        work.mkdir(exist_ok=True)
        handle = os.open(work, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error.strerror or error}); check its permissions.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"Another index works on {folder}; wait for it to end.") from error
        try:
            yield work
        except DataError:
            shutil.rmtree(work, ignore_errors=True)
            raise
        except OSError as error:
            raise DataError(f"{folder} cannot be indexed ({error.strerror or error}); check the disk.") from error
    finally:
        os.close(handle)
