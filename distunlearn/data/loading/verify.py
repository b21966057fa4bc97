"""Shards that are there: read by offset, and verified against the manifest.

They are written by `data.prepare`, or by others and then indexed by `data.index`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from distunlearn.common.files import file_sha256
from distunlearn.common.progress import progress_of
from distunlearn.data.manifest.manifest import SUMMARY, Manifest, Sample
from distunlearn.data.sources.tar_index import walk_tar
from distunlearn.errors import DataError

_FIX = "run prepare again"


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


def check_digest(sample: Sample, data: bytes, fix: str = _FIX) -> None:
    """DataError unless the bytes have the sha256 that the manifest states; fix: what to do then."""
    if hashlib.sha256(data).hexdigest() != sample.sha256:
        raise DataError(
            f"The image {sample.id!r} in shard {sample.shard} does not have the sha256 of the manifest; {fix}."
        )


def check_shard_size(manifest: Manifest, shard: str) -> Path:
    """The shard's path; DataError if it is missing, not a regular file, or not as long as it was written."""
    path = manifest.shard_path(shard)
    expected = manifest.shard_files[shard].bytes
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise DataError(f"The shard {shard} is missing from {manifest.folder}; {_FIX}.") from error
    except OSError as error:
        raise DataError(f"The shard {shard} cannot be read ({error.strerror or error}); check the disk.") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"The shard {shard} in {manifest.folder} is no plain file; {_FIX}.")
    found = status.st_size
    if found != expected:
        raise DataError(f"The shard {shard} has {found} bytes; expected {expected}; {_FIX}.")
    return path


def verify_shards(manifest: Manifest, deep: bool, sizes: bool = True, share: slice = slice(None)) -> None:
    """Check that the folder holds exactly the manifest's shards in full length; deep: also with the sha256 of each.

    Args:
        sizes: False: another process of this machine looks at names and lengths.
        share: of the shards, whose sha256 this process finds.

    Raises:
        DataError: the first shard that is missing, truncated, changed or not in the manifest.
    """
    for name in manifest.shard_files if sizes else ():
        check_shard_size(manifest, name)
    mine = list(manifest.shard_files)[share] if deep else []
    with progress_of("checking shards") as show:
        for number, name in enumerate(mine, start=1):
            if file_sha256(manifest.shard_path(name)) != manifest.shard_files[name].sha256:
                raise DataError(
                    f"The shard {name} does not have the sha256 of {SUMMARY}: {_what_changed(manifest, name)}; {_FIX}."
                )
            show(number, len(mine))
    listed = manifest.folder.glob("*.tar") if sizes else ()
    extra = sorted(path.name for path in listed if path.name not in manifest.shard_files)
    if extra:
        raise DataError(f"{manifest.folder} holds {extra[0]!r}, which the manifest does not list; remove it or {_FIX}.")


def _what_changed(manifest: Manifest, shard: str) -> str:
    """The first place where a shard differs from the manifest, and how many of its images a reader would find."""
    samples = manifest.in_shard(shard)
    path = manifest.shard_path(shard)
    data_at = {sample.offset for sample in samples}
    found = 0
    try:
        for member in walk_tar(path):
            found += member.offset in data_at
    except DataError as error:
        return f"{str(error).rstrip('.').split(';')[0]} (images found: {found}, expected: {len(samples)})"
    if found != len(samples):
        return f"images found at their places: {found}, expected: {len(samples)}"
    for sample in samples:
        try:
            read_sample(manifest, sample.id)
        except DataError:
            return f"the image {sample.id[:80]!r} at byte {sample.offset} has other bytes"
    return f"all {len(samples)} images are as they were, but other bytes changed"
