"""Shards without the images that were forgotten: a new folder is built, proven, and exchanged for the old one.

Samples that stay keep their bytes: members are copied as they are, headers included, and shards that hold no forgotten
image are linked, not copied. Whoever opens the folder at any moment, a kill included, finds the old set or the new one.

What purging does not reach: the source of the images, other copies of the shards, encoders trained on them, and what a
file system or a disk keeps of deleted files.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distunlearn.common.files import file_sha256, sync_path
from distunlearn.data.loading.verify import read_sample, verify_shards
from distunlearn.data.manifest.manifest import INDEX, SUMMARY, Manifest, Shard
from distunlearn.data.sources.tar_index import group_samples, open_tar, read_tar
from distunlearn.errors import DataError

_END = 2 * tarfile.BLOCKSIZE  # zeros that end an archive
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_AT_CWD = -100


@dataclass(frozen=True)
class Purged:
    """What a purge removes, or removed.

    images: forgotten images in the shards. copies: other images with the very bytes of one of them, which stay.
    shards: shards to rewrite. emptied: shards that vanish because nothing is left in them. bytes_before, bytes_after:
    of all shards. before, after: sha256 of the index (`after` None before it is done).
    """

    images: int
    copies: int
    shards: int
    emptied: int
    bytes_before: int
    bytes_after: int | None
    before: str
    after: str | None = None

    def facts(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def plan_purge(manifest: Manifest, ids: Collection[str]) -> Purged:
    """What `purge_shards` would do; nothing is written.

    Raises:
        DataError: no id is in the shards (they may have been purged before), nothing would be left, or the folder
            holds other things, which would go with it.
    """
    strange = sorted(path.name for path in manifest.folder.iterdir() if path.name not in _ours(manifest))
    if strange:
        raise DataError(
            f"{manifest.folder} holds {strange[0]!r}, which is none of its shards: it would be lost with the old "
            "folder, or it names images that are to be forgotten; move it away or delete it first."
        )
    gone = {i for i in ids if i in manifest.by_id}
    if not gone:
        purged = manifest.info.get("purged")
        known = f"; {purged['images']} images were purged from them before" if purged else ""
        raise DataError(
            f"none of the {len(ids)} images to purge is in {manifest.folder}{known}; there is nothing to do."
        )
    if len(gone) == len(manifest):
        raise DataError(f"all {len(gone)} images of {manifest.folder} are to be purged; delete the folder instead.")
    digests = {manifest.by_id[i].sha256 for i in gone}
    touched = {manifest.by_id[i].shard for i in gone}
    return Purged(
        images=len(gone),
        copies=sum(s.sha256 in digests and s.id not in gone for s in manifest.samples),
        shards=len(touched),
        emptied=sum(all(s.id in gone for s in manifest.in_shard(name)) for name in touched),
        bytes_before=sum(shard.bytes for shard in manifest.shard_files.values()),
        bytes_after=None,
        before=manifest.index_sha256,
    )


def _ours(manifest: Manifest) -> set[str]:
    return {INDEX, SUMMARY, *manifest.shard_files}


def purged_before(folder: str | Path) -> Purged | None:
    """The record of the last purge, if there was one; what a kill after it left beside the folder goes.

    Raises:
        DataError: another process works on the folder.
    """
    manifest = Manifest.load(folder)
    history = manifest.info.get("purged")
    if history is None:
        return None
    with _work_folder(Path(folder).resolve()):
        size = sum(shard.bytes for shard in manifest.shard_files.values())
        return Purged(history["images"], history["copies"], 0, 0, size, size, history["steps"][-1]["index"],
                     manifest.index_sha256)  # fmt: skip


def purge_shards(folder: str | Path, ids: Collection[str]) -> Purged:
    """Replace the shards and the index in `folder` by ones without the images `ids`; all of it or nothing.

    Raises:
        DataError: as `plan_purge`; a shard differs from the manifest; another process works on the folder; or the
            result still holds one of the images (nothing is replaced then).
    """
    folder = Path(folder).resolve()
    try:
        with _work_folder(folder) as work:
            manifest = Manifest.load(folder)
            planned = plan_purge(manifest, ids)
            verify_shards(manifest, deep=True)
            gone = {i for i in ids if i in manifest.by_id}
            made = _write(manifest, gone, work, planned)
            _prove(made, manifest, gone)
            _exchange(work, folder)
    except OSError as error:
        raise DataError(
            f"the shards in {folder} cannot be purged ({error.strerror or error}); they are as they were."
        ) from error
    return replace(planned, bytes_after=sum(s.bytes for s in made.shard_files.values()), after=made.index_sha256)


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """A locked, empty folder beside `folder`. What a killed purge left, which may be the old set, is removed."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder of shards; give the run directory of a finished run.")
    work = folder.with_name(f".{folder.name}.purging")
    lock = folder.with_name(f".{folder.name}.purge-lock")
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another purge works on {folder}; wait for it to end.") from error
        if work.exists():
            shutil.rmtree(work)
        work.mkdir()
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(handle)


def _write(manifest: Manifest, gone: set[str], work: Path, planned: Purged) -> Manifest:
    """The new shards and their manifest, durable, in `work`."""
    columns, files = manifest.columns, dict[str, Shard]()
    offset, numbers = columns.offset.copy(), list(manifest.shard_files)
    rows = np.array([row for row, sample_id in enumerate(columns.ids) if sample_id not in gone], dtype=np.int64)
    for name, shard in manifest.shard_files.items():
        inside = manifest.in_shard(name)
        kept = [sample for sample in inside if sample.id not in gone]
        source, target = manifest.shard_path(name), work / name
        if len(kept) == len(inside):
            _link(source, target)
            files[name] = shard
        elif kept:
            moved = _rewrite(source, target, {s.offset for s in inside if s.id in gone})
            own = rows[columns.shard[rows] == numbers.index(name)]
            offset[own] = [moved[at] for at in columns.offset[own].tolist()]
            files[name] = Shard(target.stat().st_size, file_sha256(target), len(kept))
    left = np.cumsum([name in files for name in numbers]) - 1  # numbers of the shards that are left
    shard_of = left.astype(np.uint32)[columns.shard]
    before = manifest.info.get("purged", {"images": 0, "steps": []})
    away = np.setdiff1d(np.arange(len(columns)), rows, assume_unique=True).tolist()
    history = {
        "images": before["images"] + planned.images,
        "copies": planned.copies,
        "steps": [*before["steps"], {"index": manifest.index_sha256, "rows": away}],
    }
    staying = replace(columns, offset=offset, shard=shard_of).take(rows)
    made = Manifest(work, staying, files, {**manifest.info, "purged": history})
    made.save(work)
    sync_path(work)
    return made


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
        sync_path(target)


def _rewrite(source: Path, target: Path, gone: set[int]) -> dict[int, int]:
    """Copy a tar file without the samples whose image data starts at one of `gone`; returns {old: new} data offsets.

    With them go the AppleDouble files (`._x.jpg`) of their members.
    """
    with source.open("rb") as handle, open_tar(handle) as tar:
        members = tar.getmembers()
    files = ((member.name, member) for member in members if member.isreg())
    dropped: set[str] = set()
    for _, parts in group_samples(files, source.name, Counter()):
        if any(member.offset_data in gone for member in parts.values()):
            dropped.update(member.name for member in parts.values())
    moved: dict[int, int] = {}
    with source.open("rb") as old, target.open("wb") as new:
        for member in members:
            folder, slash, last = member.name.rpartition("/")
            if member.name in dropped or f"{folder}{slash}{last.removeprefix('._')}" in dropped:
                continue
            moved[member.offset_data] = new.tell() + member.offset_data - member.offset
            old.seek(member.offset)
            blocks = -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            _copy(old, new, member.offset_data - member.offset + blocks)
        new.write(bytes(_END))
        new.write(bytes(-new.tell() % tarfile.RECORDSIZE))
        new.flush()
        os.fsync(new.fileno())
    return moved


def _copy(old: Any, new: Any, count: int) -> None:
    while count:
        piece = old.read(min(count, 1 << 20))
        if not piece:
            raise DataError(f"{old.name} ends within a member; run prepare again.")
        new.write(piece)
        count -= len(piece)


def _prove(made: Manifest, old: Manifest, gone: set[str]) -> None:
    """The new set, read from the disk: the samples that stay, with their bytes and nothing of the others.

    Raises:
        DataError: it is not so.
    """
    found = Manifest.load(made.folder)
    expected = [s.id for s in old.samples if s.id not in gone]
    if [s.id for s in found.samples] != expected:
        raise DataError(f"the purged manifest of {old.folder} does not list what should stay; nothing was changed.")
    verify_shards(found, deep=True)
    for name in found.shard_files:
        if found.shard_files[name] == old.shard_files[name]:
            continue  # the very file
        for sample in found.in_shard(name):
            read_sample(found, sample.id)  # the digest is that of before
        left = gone & _ids_in(found.shard_path(name))
        if left:
            raise DataError(f"the purged shard {name} still names {len(left)} purged images; nothing was changed.")
    if len(found.samples) + len(gone) != len(old.samples):
        raise DataError(f"the purge of {old.folder} lost images that should stay; nothing was changed.")


def _ids_in(path: Path) -> set[str]:
    """Ids that a tar file names: in its json members, and as the keys of its samples."""
    shard = path.name.removesuffix(".tar")
    return {name for sample in read_tar(path) for name in (sample.key, sample.id, f"{shard}/{sample.id}")}


def _exchange(work: Path, folder: Path) -> None:
    """Let both names change places in one step; `work` then holds the old set, which the caller removes."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_CWD, os.fsencode(work), _AT_CWD, os.fsencode(folder), _EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{os.strerror(code)}: the file system cannot exchange two folders in one step")
    sync_path(folder.parent)
