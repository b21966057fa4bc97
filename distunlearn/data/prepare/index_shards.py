"""A manifest for WebDataset shards that exist, such as those of img2dataset, which are read and left as they are.

Every sample of every shard is listed; one that has no role is `unused`. What an interrupted index had read is kept in
`.index.partial` for the next one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distunlearn.common.files import file_sha256, write_atomic
from distunlearn.config.schema import DataConfig
from distunlearn.data.manifest.columns import NO_LABEL, Columns
from distunlearn.data.manifest.manifest import Manifest, Shard, check_shard_name, has_manifest
from distunlearn.data.manifest.records import CODE, UNUSED, Remote
from distunlearn.data.prepare.duplicates import perceptual_hash
from distunlearn.data.prepare.process_pool import num_workers, run_jobs
from distunlearn.data.prepare.roles import draw_roles
from distunlearn.data.prepare.write_shards import Progress, duplicate_facts
from distunlearn.data.sources.decode import check_header
from distunlearn.data.sources.image_folder import left_out
from distunlearn.data.sources.tar_folder import file_names, other_files, tar_names
from distunlearn.data.sources.tar_index import number_labels, read_tar, unique_ids
from distunlearn.data.storage.object_store import ObjectStore
from distunlearn.data.storage.retry import Counts
from distunlearn.errors import ConfigError, DataError

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


def index_shards(
    cfg: DataConfig, seed: int, folder: str | Path, progress: Progress | None = None, *, foreign: bool = False
) -> Manifest:
    """Read all shards of a folder once, draw the roles, and write manifest and summary beside the shards.

    Shards that lie in an object store (`cfg.store`) are fetched into the folder one at a time, for as long as they are
    read; manifest and summary stay in the folder.

    Args:
        cfg: sizes of the roles, what to forget, policies; its source is not used.
        progress: called with (shards read, shards in all). foreign: see `draw_roles`.

    Raises:
        DataError: `read_tar` refuses a shard, two samples have one id, roles or copies are refused, the folder has
            another manifest, cannot be written, or another index works on it; see also `ObjectStore.sizes`.
        ConfigError: a third-party source of its own is asked for.
    """
    if cfg.third_party_source is not None or cfg.holdout_source is not None or cfg.holdout_root is not None:
        raise ConfigError(
            "data.third_party_source and data.holdout_source cannot be indexed with other shards; use prepare, or name "
            "the non-members by roles in a list."
        )
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} is no folder; give a local folder that holds the shards or their manifest.")
    remote = Remote(cfg.store, cfg.read_retries) if cfg.store else None
    store = ObjectStore(remote.url, remote.retries) if remote else None
    listed = store.names(Counts()) if store else [*tar_names(folder), *file_names(folder)]
    names = [check_shard_name(n) for n in dict.fromkeys(listed) if n.endswith(".tar") and n[0] != "."]
    with _work_folder(folder) as work:
        shared = _Shared(folder, cfg.max_pixels, cfg.near_distance is not None, remote, cfg.forget_by)
        total = sum(store.sizes(names, Counts()) if store else ((folder / name).stat().st_size for name in names))
        workers = num_workers(cfg.prepare_workers, total >> 14, len(names))  # 16 KiB: a small image and its parts
        found = _Found(other_files(listed))
        for name, note in zip(names, run_jobs(_scan, shared, names, workers), strict=True):
            found.add(name, note)
            if progress is not None:
                progress(len(found.files), len(names))
        manifest = _manifest(cfg, seed, folder, found, foreign)
        if has_manifest(folder) and Manifest.load(folder).fingerprint != manifest.fingerprint:
            raise DataError(
                f"{folder} has a manifest of another selection; remove manifest* and summary.json there first."
            )
        manifest.save(folder)
        manifest.remote = remote
        shutil.rmtree(work)
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

    def columns(self) -> tuple[Columns, list[str]]:
        """(one row a sample without a role yet, names of the classes by number)."""
        number = {name: at for at, name in enumerate(self.files)}
        named = [(shard, sample[0], sample[1]) for shard, sample in zip(self.shards, self.samples, strict=True)]
        labels, classes = number_labels([sample[2] for sample in self.samples])
        return Columns.build(
            (sample_id, number[shard], sample[3], sample[4], bytes.fromhex(sample[5]), CODE[UNUSED],
             NO_LABEL if label is None else label)
            for sample_id, shard, sample, label in zip(unique_ids(named), self.shards, self.samples, labels,
                                                       strict=True)
        ), classes  # fmt: skip


def role_codes(
    columns: Columns,
    cfg: DataConfig,
    seed: int,
    classes: Sequence[str],
    names: Sequence[Sequence[str]] | None = None,
    *,
    foreign: bool = False,
    skipped: str = "",
) -> tuple[np.ndarray, dict[str, Any]]:
    """(roles uint8 [n] drawn among all samples of indexed shards, facts for the summary). See `draw_roles`."""
    labels = (None if label == NO_LABEL else label for label in columns.label.tolist())
    samples = list(zip(columns.ids, labels, strict=True))
    drawn = draw_roles(samples, cfg, seed, names=names, classes=classes, foreign=foreign, skipped=skipped)
    unused = CODE[UNUSED]
    codes = (CODE[drawn.roles[i]] if i in drawn.roles else unused for i in columns.ids)
    return np.fromiter(codes, dtype=np.uint8, count=len(columns)), drawn.facts


def _manifest(cfg: DataConfig, seed: int, folder: Path, scanned: _Found, foreign: bool) -> Manifest:
    columns, classes = scanned.columns()
    names = None
    if cfg.forget_by != "id":
        names = [[name for name in (sample[7], sample[5] if cfg.forget_by == "sha256" else None) if name]
                 for sample in scanned.samples]  # fmt: skip
    skipped = scanned.skipped + scanned.left_out
    role, facts = role_codes(columns, cfg, seed, classes, names, foreign=foreign, skipped=left_out(skipped))
    hashes = [sample[6] for sample in scanned.samples]
    known = np.array([value is not None for value in hashes], dtype=bool)
    words = np.array([value or 0 for value in hashes], dtype=np.uint64) if cfg.near_distance is not None else None
    role, found = duplicate_facts(replace(columns, role=role), words, cfg.copies, cfg.near_distance, known)
    bad = np.flatnonzero(~known)
    info = {
        "sources": ["webdataset"],
        "classes": classes,
        "labels_known": bool((columns.label != NO_LABEL).all()),
        "skipped_files": dict(scanned.skipped),
        "left_out": dict(scanned.left_out),
        "indexed": True,
        "undecodable": len(bad),
        "undecodable_ids": columns.ids.at(bad[:_NAMED]),
        **found,
        **facts,
    }
    return Manifest(folder, columns.with_roles(role), scanned.files, info)


def _scan(shared: _Shared, name: str) -> dict[str, Any]:
    """Samples, size and digest of one shard.

    A sample is [id, whether it is from its .json, class as written, offset, length, sha256, perceptual hash, by what a
    list may name it].
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
                near = _hash(shared, data, sample.id)
                named = {"key": sample.key, **sample.facts}.get(shared.by) if shared.by != "id" else None
                samples.append([sample.id, sample.named, sample.label, sample.image.offset, len(data), digest, near,
                                None if named is None else str(named)])  # fmt: skip
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check the disk.") from error
    return samples


def _hash(shared: _Shared, data: bytes, sample_id: str) -> int | None:
    """Perceptual hash (0 where none is wanted); None for an image that cannot be used."""
    try:
        if shared.hashes:
            return perceptual_hash(data, sample_id, shared.max_pixels)
        check_header(data, sample_id, shared.max_pixels)
    except DataError:
        return None
    return 0


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
