"""WebDataset tar shards: written deterministically, read by offset, verified.

Each sample is `<key>.<png|jpg|webp>`, `<key>.cls` (the label, if known) and `<key>.json` ({"id": ...}),
with a running number as the key. Three groups: `members-*` (retain and forget mixed, in an order drawn
by seed, so a shard's name says nothing about what is to be forgotten), `third_party-*`, `reserve-*`
(calibration and holdout). The same input gives the same bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from distunlearn.config import DataConfig
from distunlearn.data.manifest import MANIFEST, SUMMARY, Manifest, Sample, Shard
from distunlearn.data.roles import assign_roles
from distunlearn.data.schedule import permutation
from distunlearn.data.sources import Source, open_sources
from distunlearn.errors import DataError

__all__ = ["file_sha256", "prepare_shards", "read_sample", "sync_path", "verify_shards", "write_shards"]

_GROUPS = {
    "members": ("retain", "forget"),
    "third_party": ("third_party", "third_party_audit"),
    "reserve": ("calibration", "holdout"),
}
_OUR_FILES = re.compile(rf"({'|'.join(_GROUPS)})-\d{{6}}\.tar|{re.escape(MANIFEST)}|{re.escape(SUMMARY)}")
_FIX = "run prepare again"
_Progress = Callable[[int, int], None]


def prepare_shards(
    cfg: DataConfig, seed: int, folder: str | Path, *, replace: bool = False, progress: _Progress | None = None
) -> Manifest:
    """Sources to shards in one call: open, draw roles, write. See `write_shards`."""
    members, guest = open_sources(cfg)
    roles = assign_roles(members.samples, cfg, seed, None if guest is None else guest.samples)
    sources = [members] if guest is None else [members, guest]
    return write_shards(
        sources, roles, folder, cfg.samples_per_shard, seed=seed, replace=replace, progress=progress
    )


def write_shards(
    sources: Sequence[Source],
    roles: Mapping[str, str],
    folder: str | Path,
    samples_per_shard: int,
    *,
    seed: int,
    replace: bool = False,
    progress: _Progress | None = None,
) -> Manifest:
    """Write every image that has a role, the manifest and the summary; all of it or nothing.

    Args:
        sources: where the ids of `roles` are read from; ids are unique over all sources.
        roles: {id: role}.
        folder: created, or replaced as a whole by a rename once everything is on disk. Shards of the
            same selection are replaced (which repairs them), those of another only with `replace`.
        seed: decides the order within each group.
        progress: called with (images written, images in all).

    Raises:
        DataError: an image cannot be read, the folder holds other things or cannot be written, or another
            prepare writes there.
    """
    folder = Path(folder)
    try:
        with _partial_folder(folder) as partial:
            manifest = _write_all(sources, roles, partial, samples_per_shard, seed, progress)
            manifest.save(partial)
            sync_path(partial)
            _put_in_place(partial, folder, manifest, replace)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"Shards cannot be written to {folder} ({reason}); choose another folder.") from error
    manifest.folder = folder
    return manifest


def read_sample(manifest: Manifest, sample_id: str, verify: bool = True) -> bytes:
    """The encoded bytes of one image, read at its offset without touching the rest of the shard.

    Raises:
        DataError: the shard is missing or too short, or (verify) the bytes lack the manifest's sha256.
    """
    sample = manifest.by_id[sample_id]
    path = manifest.shard_path(sample.shard)
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            data = os.pread(handle, sample.length, sample.offset)
        finally:
            os.close(handle)
    except OSError as error:
        raise DataError(
            f"The shard {sample.shard} with image {sample_id!r} cannot be read ({error.strerror}); {_FIX}."
        ) from error
    if len(data) != sample.length:
        raise DataError(
            f"The shard {sample.shard} ends within image {sample_id!r}: {len(data)} of {sample.length} bytes; {_FIX}."
        )
    if verify:
        check_digest(sample, data)
    return data


def check_digest(sample: Sample, data: bytes) -> None:
    """DataError unless the bytes have the sha256 that the manifest states."""
    if hashlib.sha256(data).hexdigest() != sample.sha256:
        raise DataError(
            f"The image {sample.id!r} in shard {sample.shard} does not have the sha256 of the manifest; {_FIX}."
        )


def check_shard_size(manifest: Manifest, shard: str) -> Path:
    """The shard's path; DataError if it is missing, not a regular file, or not as long as it was written."""
    path = manifest.shard_path(shard)
    expected = manifest.shard_files[shard].bytes
    if not path.is_file():
        raise DataError(f"The shard {shard} is missing from {manifest.folder}; {_FIX}.")
    found = path.stat().st_size
    if found != expected:
        raise DataError(f"The shard {shard} has {found} bytes; expected {expected}; {_FIX}.")
    return path


def verify_shards(manifest: Manifest, deep: bool) -> None:
    """Check that the folder holds exactly the manifest's shards in full length; deep: also with the sha256 of each.

    Raises:
        DataError: the first shard that is missing, truncated, changed or not in the manifest.
    """
    for name, shard in manifest.shard_files.items():
        path = check_shard_size(manifest, name)
        if deep and file_sha256(path) != shard.sha256:
            raise DataError(f"The shard {name} does not have the sha256 of {SUMMARY}; {_FIX}.")
    extra = sorted(path.name for path in manifest.folder.glob("*.tar") if path.name not in manifest.shard_files)
    if extra:
        raise DataError(f"{manifest.folder} holds {extra[0]!r}, which the manifest does not list; remove it or {_FIX}.")


def file_sha256(path: str | Path) -> str:
    """sha256 of a file, hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _write_all(
    sources: Sequence[Source],
    roles: Mapping[str, str],
    folder: Path,
    samples_per_shard: int,
    seed: int,
    progress: _Progress | None,
) -> Manifest:
    home = {sample_id: (source, label) for source in sources for sample_id, label in source.samples}
    samples: list[Sample] = []
    files: dict[str, Shard] = {}
    for group, group_roles in _GROUPS.items():
        ids = [sample_id for sample_id, role in roles.items() if role in group_roles]
        order = [ids[i] for i in permutation(len(ids), seed, "shards", group)]
        for number, start in enumerate(range(0, len(order), samples_per_shard)):
            name = f"{group}-{number:06d}.tar"
            entries = order[start : start + samples_per_shard]
            with (folder / name).open("wb") as handle:
                with tarfile.open(fileobj=handle, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                    for sample_id in entries:
                        source, label = home[sample_id]
                        data, kind = source.read(sample_id)
                        key = f"{len(samples):08d}"
                        offset = _add(tar, handle, f"{key}.{kind}", data)
                        if label is not None:
                            _add(tar, handle, f"{key}.cls", str(label).encode())
                        _add(tar, handle, f"{key}.json", json.dumps({"id": sample_id}).encode())
                        digest = hashlib.sha256(data).hexdigest()
                        samples.append(Sample(sample_id, name, offset, len(data), digest, roles[sample_id], label))
                        if progress is not None:
                            progress(len(samples), len(roles))
                handle.flush()
                os.fsync(handle.fileno())
                size = handle.tell()
            files[name] = Shard(size, file_sha256(folder / name), len(entries))
    return Manifest(folder, samples, files, _facts(sources, samples))


def _add(tar: tarfile.TarFile, handle: io.BufferedWriter, name: str, data: bytes) -> int:
    """Append one member with neutral metadata; returns the offset of its data."""
    member = tarfile.TarInfo(name)  # mtime, uid and gid are 0, owner names empty
    member.size = len(data)
    offset = handle.tell() + tarfile.BLOCKSIZE  # a short USTAR name takes exactly one header block
    tar.addfile(member, io.BytesIO(data))
    return offset


def _facts(sources: Sequence[Source], samples: Sequence[Sample]) -> dict[str, object]:
    """For summary.json. Copies of a forgotten image among the retained ones would keep it alive: count them."""
    retained = {sample.sha256 for sample in samples if sample.role == "retain"}
    copies = sum(sample.role == "forget" and sample.sha256 in retained for sample in samples)
    return {
        "sources": [source.name for source in sources],
        "classes": list(sources[0].classes),
        "labels_known": sources[0].labels_known,
        "skipped_files": sum(source.skipped for source in sources),
        "forget_with_copy_in_retain": copies,
    }


@contextmanager
def _partial_folder(folder: Path) -> Iterator[Path]:
    """A locked, empty folder beside `folder`; unless it was renamed in the end, it and new parents are removed."""
    partial = folder.with_name(f".{folder.name}.partial")
    new_parents = [parent for parent in folder.parents if not parent.exists()]  # innermost first
    with ExitStack() as on_exit:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir(exist_ok=True)
            handle = os.open(partial, os.O_RDONLY)
            on_exit.callback(os.close, handle)
            _lock(handle, folder)
            for left_over in partial.iterdir():  # of a prepare that was killed
                left_over.unlink()
            yield partial
        except _BusyError:
            raise
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            for parent in new_parents:
                with suppress(OSError):
                    parent.rmdir()
            raise


class _BusyError(DataError):
    """The partial folder is another process's: leave it alone."""


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _BusyError(f"Another prepare is writing {folder}; wait for it to end.") from error


def _put_in_place(partial: Path, folder: Path, manifest: Manifest, replace: bool) -> None:
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        _check_replaceable(folder, manifest, replace)
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    try:
        os.rename(partial, folder)
    except BaseException:
        if old.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
    sync_path(folder.parent)


def _check_replaceable(folder: Path, manifest: Manifest, replace: bool) -> None:
    """Only what an earlier prepare wrote may be replaced, and another selection only if asked to."""
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; expected a folder for the shards.")
    strange = sorted(path.name for path in folder.iterdir() if _OUR_FILES.fullmatch(path.name) is None)
    if strange:
        raise DataError(f"{folder} holds {strange[0]!r}, which prepare did not write; give an empty or a new folder.")
    try:
        found = Manifest.load(folder).fingerprint
    except DataError:
        return  # damaged shards, or an empty folder
    if found != manifest.fingerprint and not replace:
        raise DataError(f"{folder} holds shards of another selection; give another folder or remove that one.")


def sync_path(path: Path) -> None:
    """Make a file or a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
