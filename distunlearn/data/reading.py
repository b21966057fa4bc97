"""Encoded images out of shards, by offset: neighbours in one read, each image's digest checked, failed reads repeated.

A tar is never walked: the manifest says where each image lies, so damaged headers and a missing end of archive
cannot shorten what is read, and a hundredth of the images costs about a hundredth of the bytes.
"""

from __future__ import annotations

import errno
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from distunlearn.data.manifest import Manifest, Sample
from distunlearn.data.shards import check_digest, check_shard_size
from distunlearn.errors import DataError

__all__ = ["Counts", "Reader", "runs"]

GAP = 16 << 10  # bytes between two images that are read along rather than asked for twice
LONGEST = 8 << 20  # bytes of one read
OPEN_SHARDS = 32  # kept open by one reader
FIRST_WAIT = 0.25  # seconds before a failed read is repeated; doubled each time
# What may pass: a disk or a network file system that fails for a moment.
TRANSIENT = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.EREMOTEIO, errno.ENOLINK,
    errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ECONNRESET, errno.ECONNABORTED,
}  # fmt: skip



@dataclass
class Counts:
    """What reading and decoding cost so far: `images` decoded, `reads`, `bytes` read, failed reads `repeated`."""

    images: int = 0
    reads: int = 0
    bytes: int = 0
    repeated: int = 0

    def add(self, other: Counts) -> None:
        for name in ("images", "reads", "bytes", "repeated"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


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
    """Reads images of one manifest; not for several threads at once.

    Args:
        retries: how often a read that failed is repeated, after 0.25 s, 0.5 s, 1 s and so on.
    """

    def __init__(self, manifest: Manifest, retries: int = 4) -> None:
        self.manifest = manifest
        self.retries = retries
        self.counts = Counts()
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, samples: Sequence[Sample]) -> list[bytes]:
        """The encoded bytes of each sample, in the order given.

        Raises:
            DataError: a shard is missing, has another length than the manifest says, or cannot be read after all
                retries; or an image lacks its sha256.
        """
        found: list[bytes] = [b""] * len(samples)
        for run in runs(samples):
            block = memoryview(self._patiently(run, samples[run.rows[0]]))
            for row in run.rows:
                sample = samples[row]
                data = bytes(block[sample.offset - run.start :][: sample.length])
                check_digest(sample, data)
                found[row] = data
        return found

    def close(self) -> None:
        """Close the shards; safe to call twice, and `read` opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _patiently(self, run: Run, first: Sample) -> bytes:
        wait = FIRST_WAIT
        for attempt in range(self.retries + 1):
            try:
                return self._read(run, first)
            except OSError as error:
                self._forget(run.shard)
                if error.errno not in TRANSIENT or attempt == self.retries:
                    times = f" {attempt + 1} times" if attempt else ""
                    raise DataError(
                        f"The shard {run.shard} with image {first.id!r} could not be read{times} "
                        f"({error.strerror or error}); check the disk or the network that holds {self.manifest.folder}."
                    ) from error
                self.counts.repeated += 1
                time.sleep(wait)
                wait *= 2
        raise AssertionError("the last attempt returns or raises")

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
        with suppress(FileNotFoundError):
            os.stat(self.manifest.shard_path(shard))  # a failure that may pass is raised as it is
        handle = os.open(check_shard_size(self.manifest, shard), os.O_RDONLY | os.O_CLOEXEC)
        while len(self._open) >= OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = handle
        return handle

    def _forget(self, shard: str) -> None:
        handle = self._open.pop(shard, None)
        if handle is not None:
            os.close(handle)
