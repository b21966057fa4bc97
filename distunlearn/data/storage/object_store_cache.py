"""Copies on a local disk of shards that lie in an object store, shared by the processes of a machine.

A copy is named by its sha256, so that it serves every run whose manifest asks for these bytes. It is checked while it
is fetched, appears as a whole or not at all, and goes when room is needed, the one used longest ago first.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distunlearn.common.files import file_sha256
from distunlearn.common.progress import progress_of
from distunlearn.common.text import printable
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.manifest.records import Remote
from distunlearn.data.storage.object_store import FIX, ObjectStore
from distunlearn.data.storage.retry import Counts
from distunlearn.errors import ConfigError, DataError

STALE = 3600.0  # seconds after which a copy that is still incomplete belongs to nobody
_PARTIAL = ".partial"


def check_sizes(store: ObjectStore, manifest: Manifest, shards: list[str], counts: Counts) -> None:
    """DataError unless each of these shards is in the store, as long as the manifest says; see `ObjectStore.sizes`."""
    for shard, found in zip(shards, store.sizes(shards, counts), strict=True):
        expected = manifest.shard_files[shard].bytes
        if found != expected:
            raise DataError(
                f"The shard {shard} in {printable(store.url)} has {found} bytes; expected {expected}; {FIX}."
            )


def verify_objects(manifest: Manifest, deep: bool) -> None:
    """Check that the store has the manifest's shards in full length; deep: also with the sha256 of each.

    Where there is a cache, the copies are what is checked, and those that are missing are fetched.

    Raises:
        DataError: the first shard that is missing, of another length or changed; the store or the cache fails.
        ConfigError: as `ObjectStore` and `ShardCache`.
    """
    remote, counts = manifest.remote, Counts()
    assert remote is not None, "the shards are local"
    store = ObjectStore(remote.url, remote.retries)
    check_sizes(store, manifest, manifest.shards(), counts)
    cache = ShardCache(store, manifest, remote) if remote.cache else None
    shards = list(manifest.shards()) if deep else []
    with progress_of("checking shards") as show:
        for number, shard in enumerate(shards, start=1):
            if cache is None:
                _digested(store, manifest, shard, counts)
            else:
                cache.discard_damaged(shard)
                os.close(cache.open(shard, counts))
            show(number, len(shards))


def _digested(store: ObjectStore, manifest: Manifest, shard: str, counts: Counts, handle: int | None = None) -> None:
    """Read a whole shard, into a file if one is given; DataError unless it has the sha256 of the manifest."""
    wanted, digest = manifest.shard_files[shard], hashlib.sha256()
    for piece in store.stream(shard, wanted.bytes, counts):
        digest.update(piece)
        while handle is not None and piece:
            piece = piece[os.write(handle, piece) :]
    if digest.hexdigest() != wanted.sha256:
        raise DataError(f"The shard {shard} in {printable(store.url)} does not have the sha256 of the manifest; {FIX}.")


class ShardCache:
    """Local copies of the shards of one manifest.

    Raises:
        ConfigError: the largest shard does not fit.
    """

    def __init__(self, store: ObjectStore, manifest: Manifest, remote: Remote) -> None:
        assert remote.cache is not None, "there is no cache"
        self._store, self._manifest = store, manifest
        self._folder, self._budget = Path(remote.cache), remote.cache_mib << 20
        largest = max((shard.bytes for shard in manifest.shard_files.values()), default=0)
        if largest > self._budget:
            raise ConfigError(
                f"data.store_cache_mib={remote.cache_mib} has no room for a shard of {largest} bytes; set it to "
                f"{-(-largest >> 20)} or more, better to that for each shard that is read at once."
            )

    def open(self, shard: str, counts: Counts) -> int:
        """A file descriptor of a whole copy, fetched if there is none; it stays readable if the copy goes.

        Raises:
            DataError: the shard in the store is missing or not as the manifest says; the folder cannot be written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle = self._use(shard)
            if handle is None:
                with self._locked(self._manifest.shard_files[shard].sha256[:2]):
                    handle = self._use(shard)  # another process may have fetched it while this one waited
                    handle = self._fetch(shard, counts) if handle is None else handle
            return handle
        except OSError as error:
            raise DataError(
                f"The cache {printable(self._folder)} cannot take the shard {shard} ({error.strerror or error}); check "
                "the disk, or set data.store_cache to another folder."
            ) from error

    def discard_damaged(self, shard: str) -> bool:
        """Remove the copy if its bytes are not those of the manifest; False where there is none or it is whole."""
        path = self._path(shard)
        with suppress(DataError):
            if path.exists() and file_sha256(path) != self._manifest.shard_files[shard].sha256:
                path.unlink(missing_ok=True)
                return True
        return False

    def _path(self, shard: str) -> Path:
        return self._folder / f"{self._manifest.shard_files[shard].sha256}.tar"

    def _use(self, shard: str) -> int | None:
        """Open the copy and note that it was used; None if there is none of the right length."""
        with suppress(FileNotFoundError):
            handle = os.open(self._path(shard), os.O_RDONLY | os.O_CLOEXEC)
            if os.fstat(handle).st_size == self._manifest.shard_files[shard].bytes:
                os.utime(handle)
                return handle
            os.close(handle)
        return None

    def _fetch(self, shard: str, counts: Counts) -> int:
        """Fetch a copy under the lock of its name; while incomplete it counts with its full size."""
        check_sizes(self._store, self._manifest, [shard], counts)
        path, size = self._path(shard), self._manifest.shard_files[shard].bytes
        partial = path.with_name(f".{path.stem}{_PARTIAL}")
        with self._locked("room"):
            self._make_room(size)
            handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            os.truncate(handle, size)
        try:
            _digested(self._store, self._manifest, shard, counts, handle)
            os.replace(partial, path)
        except BaseException:
            os.close(handle)
            partial.unlink(missing_ok=True)
            raise
        return handle

    def _make_room(self, size: int) -> None:
        """Remove the copies used longest ago, and what killed processes left, until `size` bytes fit.

        What other processes are fetching stays, even if it leaves no room.
        """
        found = []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):
                found.append((path.stat().st_mtime, path.stat().st_size, path))
        used = sum(length for _, length, _ in found)
        for changed, length, path in sorted(found):
            stale = path.suffix == _PARTIAL and time.time() - changed > STALE
            if stale or (path.suffix == ".tar" and used + size > self._budget):
                path.unlink(missing_ok=True)
                used -= length

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        handle = os.open(self._folder / f".lock-{name}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
