"""Encoded images out of shards, by offset: neighbours in one read, each image's digest checked, failed reads repeated.

A tar is never walked: the manifest says where each image lies, so damaged headers and a missing end of archive
cannot shorten what is read, and a hundredth of the images costs about a hundredth of the bytes.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from distunlearn.data.loading.verify import check_digest, check_shard_size
from distunlearn.data.manifest.manifest import Manifest, Sample
from distunlearn.data.storage.object_store import FIX, ObjectStore, Span
from distunlearn.data.storage.object_store_cache import ShardCache, check_sizes
from distunlearn.data.storage.retry import Counts, patiently, reason
from distunlearn.errors import DataError

GAP = 16 << 10  # bytes between two images that are read along rather than asked for twice
LONGEST = 8 << 20  # bytes of one read
OPEN_SHARDS = 32  # kept open by one reader


@dataclass(frozen=True)
class Run:
    """Images of one shard that one read of the bytes [start, stop) covers; `rows` are their places in the request."""

    shard: str
    start: int
    stop: int
    rows: tuple[int, ...]


def runs(samples: Sequence[Sample]) -> Iterator[Run]:
    """The reads that fetch these samples: images with less than GAP bytes between them share one, up to LONGEST."""
    rows = sorted(range(len(samples)), key=lambda row: (samples[row].shard, samples[row].offset))
    group: list[int] = []
    start = stop = 0
    for row in rows:
        sample = samples[row]
        end = sample.offset + sample.length
        joins = (
            bool(group)
            and sample.shard == samples[group[0]].shard
            and sample.offset - stop < GAP
            and end - start <= LONGEST
        )
        if group and not joins:
            yield Run(samples[group[0]].shard, start, stop, tuple(group))
            group = []
        if not group:
            start = stop = sample.offset
        group.append(row)
        stop = max(stop, end)
    if group:
        yield Run(samples[group[0]].shard, start, stop, tuple(group))


class Reader:
    """Reads images of one manifest, out of files or out of an object store; not for several threads at once.

    Args:
        manifest: with `remote`, if the shards lie in a store.
        retries: how often a read that failed is repeated, after 0.25 s, 0.5 s, 1 s and so on.
    """

    def __init__(self, manifest: Manifest, retries: int = 4) -> None:
        self.manifest = manifest
        self.retries = retries
        self.counts = Counts()
        self._open: OrderedDict[str, int] = OrderedDict()
        remote = manifest.remote
        self._store = ObjectStore(remote.url, retries) if remote else None
        self._cache = ShardCache(self._store, manifest, remote) if self._store and remote and remote.cache else None
        self._sized: set[str] = set()  # shards in the store whose length was compared

    def read(self, samples: Sequence[Sample]) -> list[bytes]:
        """The encoded bytes of each sample, in the order given.

        Raises:
            DataError: a shard is missing, has another length than the manifest says, or cannot be read after all
                retries; or an image lacks its sha256.
        """
        found: list[bytes] = [b""] * len(samples)
        wanted = list(runs(samples))
        for run, block in zip(wanted, self._blocks(wanted, samples), strict=True):
            try:
                self._take_apart(run, block, samples, found)
            except DataError:
                if self._cache is None or not self._cache.discard_damaged(run.shard):
                    raise
                self._forget(run.shard)
                self._take_apart(run, self._patiently(run, samples[run.rows[0]]), samples, found)
        if self._cache is not None:
            self.close()  # a copy that goes for want of room holds its room as long as it is open
        return found

    def _blocks(self, wanted: Sequence[Run], samples: Sequence[Sample]) -> Iterator[bytes]:
        """The bytes of each run."""
        if self._store is None:
            self._announce(wanted)
        if self._store is None or self._cache is not None:
            yield from (self._patiently(run, samples[run.rows[0]]) for run in wanted)
            return
        new = sorted({run.shard for run in wanted} - self._sized)
        check_sizes(self._store, self.manifest, new, self.counts)
        self._sized.update(new)
        spans = [Span(r.shard, r.start, r.stop, f"image {samples[r.rows[0]].id!r}") for r in wanted]
        yield from self._store.read(spans, self.counts)

    def _announce(self, wanted: Sequence[Run]) -> None:
        """Have the disk begin with all reads before the first is waited for; a hint, whose failures the reads tell."""
        if 1 < len(wanted) and len({run.shard for run in wanted}) <= OPEN_SHARDS:
            with suppress(OSError):
                for run in wanted:
                    os.posix_fadvise(self._handle(run.shard), run.start, run.stop - run.start, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the shards; safe to call twice, and `read` opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _take_apart(self, run: Run, block: bytes, samples: Sequence[Sample], found: list[bytes]) -> None:
        """Write the images of a run to their places in `found`; DataError for one that lacks its sha256."""
        view = memoryview(block)
        for row in run.rows:
            sample = samples[row]
            data = bytes(view[sample.offset - run.start :][: sample.length])
            check_digest(sample, data, *([FIX] if self._store else []))
            found[row] = data

    def _patiently(self, run: Run, first: Sample) -> bytes:
        def ask(_: list[Run]) -> list[bytes | OSError]:
            try:
                return [self._read(run, first)]
            except OSError as error:
                self._forget(run.shard)
                return [error]

        def refuse(_: Run, error: Exception, times: str) -> DataError:
            return DataError(
                f"The shard {run.shard} with image {first.id!r} could not be read{times} "
                f"({reason(error)}); check the disk or the network that holds {self.manifest.place}."
            )

        return patiently([run], ask, self.retries, self.counts, refuse)[0]

    def _read(self, run: Run, first: Sample) -> bytes:
        handle = self._handle(run.shard)
        parts: list[bytes] = []
        place = run.start
        while place < run.stop:
            part = os.pread(handle, run.stop - place, place)
            self.counts.reads += 1
            self.counts.bytes += len(part)
            if not part:
                raise DataError(
                    f"The shard {run.shard} ends at byte {place}, within image {first.id!r} or one after it; "
                    "run prepare again."
                )
            parts.append(part)
            place += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _handle(self, shard: str) -> int:
        """An open file of the shard, whose length was compared with the manifest when it was opened."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        handle = self._cache.open(shard, self.counts) if self._cache else self._open_file(shard)
        while len(self._open) >= OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = handle
        return handle

    def _open_file(self, shard: str) -> int:
        with suppress(FileNotFoundError):
            os.stat(self.manifest.shard_path(shard))  # a failure that may pass is raised as it is
        return os.open(check_shard_size(self.manifest, shard), os.O_RDONLY | os.O_CLOEXEC)

    def _forget(self, shard: str) -> None:
        handle = self._open.pop(shard, None)
        if handle is not None:
            os.close(handle)
