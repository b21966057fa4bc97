"""One whole shard through webdataset, with every check: the independent way to read what `reading` reads by offset.

webdataset (1.0.2) alone would lose images: an invalid tar header inside a shard ends that shard without
an error. So the ids, their count, each image's sha256 and the sha256 of the whole file are compared with the manifest
before any image is handed out.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from functools import cache
from types import ModuleType
from typing import Any, BinaryIO

from distunlearn.data.loading.verify import check_digest, check_shard_size
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.sources.tar_index import IMAGE_KINDS
from distunlearn.errors import DataError

__all__ = ["read_shard"]


def read_shard(manifest: Manifest, shard: str, wanted: Collection[str]) -> dict[str, bytes]:
    """{id: encoded bytes} of the wanted images of one shard, read through webdataset and fully checked.

    Raises:
        DataError: missing, truncated, changed by as little as one byte, or other samples than in the manifest.
    """
    path = check_shard_size(manifest, shard)
    expected = manifest.in_shard(shard)
    kept: dict[str, bytes] = {}
    found = 0
    with path.open("rb") as handle:
        stream = _HashingReader(handle)
        try:
            for record in _samples(stream, shard):
                found += 1
                if found > len(expected):
                    continue
                sample = expected[found - 1]
                data = next((record[kind] for kind in IMAGE_KINDS if kind in record), None)
                if data is None or _record_id(record) != sample.id:
                    raise DataError(
                        f"The shard {shard} has another or a partial sample where {sample.id!r} is expected "
                        f"(number {found} of {len(expected)}); run prepare again."
                    )
                check_digest(sample, data)
                if sample.id in wanted:
                    kept[sample.id] = data
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
    return kept


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


@cache
def _webdataset() -> ModuleType:
    """webdataset with its secure mode on: it is read at import and forbids commands as URLs and unpickling."""
    os.environ["WDS_SECURE"] = "1"
    import webdataset

    webdataset.utils.enforce_security = True  # if somebody imported it before us
    return webdataset


def _samples(stream: _HashingReader, shard: str) -> Iterator[dict[str, Any]]:
    """webdataset's own tar and grouping stages over a file we opened.

    Not its WebDataset class: that takes URLs, draws from the global random generator, may be redirected
    to a stale cache by an environment variable, and leaves files open.
    """
    wds = _webdataset()
    expand = wds.filters.pipelinefilter(wds.tariterators.tar_file_expander)
    group = wds.filters.pipelinefilter(wds.tariterators.group_by_keys)
    strict = wds.handlers.reraise_exception
    opened = [{"url": shard, "stream": stream}]
    return iter(wds.DataPipeline(lambda: iter(opened), expand(handler=strict), group(handler=strict)))


def _record_id(record: dict[str, Any]) -> str:
    """The text `id` of the sample's json, else its key: as `tars.read_tar` names samples."""
    content = json.loads(record.get("json", b"null"))
    named = content.get("id") if isinstance(content, dict) else None
    return named if isinstance(named, str) else record["__key__"]
