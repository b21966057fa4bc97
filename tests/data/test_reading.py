"""Reads by offset: coalesced, checked, and repeated when they fail."""

from __future__ import annotations

import errno
import os
import time

import numpy as np
import pytest
from pictures import feeder, pictures, store

from distunlearn.data.loading import shard_reader
from distunlearn.data.loading.shard_reader import GAP, LONGEST, Reader, runs
from distunlearn.data.loading.verify import read_sample
from distunlearn.data.manifest.manifest import Manifest, Sample
from distunlearn.data.storage import retry
from distunlearn.errors import DataError

REAL_PREAD = os.pread


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    return pictures(tmp_path_factory.mktemp("pictures") / "shards")


class Disk:
    """os.pread that fails `times` times with an errno, and remembers what was asked for."""

    def __init__(self, monkeypatch, times: int = 0, code: int = errno.EIO, most: int | None = None, stall: float = 0):
        self.times, self.code, self.most, self.stall = times, code, most, stall
        self.calls: list[tuple[int, int]] = []
        self.waits: list[float] = []
        monkeypatch.setattr(shard_reader.os, "pread", self)
        monkeypatch.setattr(retry.time, "sleep", self.waits.append)

    def __call__(self, handle: int, length: int, offset: int) -> bytes:
        self.calls.append((offset, length))
        if len(self.calls) <= self.times:
            raise OSError(self.code, os.strerror(self.code))
        if self.stall:
            threading_wait(self.stall)
        return REAL_PREAD(handle, min(length, self.most or length), offset)


def threading_wait(seconds: float) -> None:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        pass


def samples(manifest: Manifest, *roles: str) -> list[Sample]:
    return [manifest.by_id[i] for i in manifest.ids(roles)]


def test_reads_give_what_single_reads_give(manifest):
    wanted = samples(manifest, "retain", "forget")
    order = np.random.default_rng(0).permutation(len(wanted))
    shuffled = [wanted[i] for i in order]
    assert Reader(manifest).read(shuffled) == [read_sample(manifest, s.id) for s in shuffled]
    assert Reader(manifest).read([]) == []


def test_neighbours_share_a_read(manifest):
    reader = Reader(manifest)
    reader.read(samples(manifest, "retain", "forget"))
    members = [name for name in manifest.shards() if name.startswith("members")]
    assert reader.counts.reads == len(members) < len(samples(manifest, "retain", "forget"))
    assert reader.counts.bytes < sum(manifest.shard_files[name].bytes for name in members)


def test_far_and_large_images_are_read_apart():
    """The three rules, on a made-up shard: same file, a gap below GAP, not above LONGEST."""

    def at(offset: int, length: int, shard: str = "a.tar") -> Sample:
        return Sample(f"{shard}{offset}", shard, offset, length, "0" * 64, "forget", None)

    near = [at(1000, 500), at(1500 + GAP - 1, 10)]
    assert [r.rows for r in runs(near)] == [(0, 1)]
    assert [r.rows for r in runs([near[0], at(1500 + GAP, 10)])] == [(0,), (1,)]
    assert [r.rows for r in runs([near[0], at(1600, 10, "b.tar")])] == [(0,), (1,)]
    assert [r.rows for r in runs([at(0, LONGEST), at(LONGEST, 1)])] == [(0,), (1,)]
    assert [r.rows for r in runs([at(LONGEST - 1, 1), at(0, LONGEST - 1)])] == [(1, 0)]
    assert [(r.start, r.stop) for r in runs([at(5, 10), at(5, 10)])] == [(5, 15)]  # the same image twice


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_read_that_fails_for_a_while_is_repeated(manifest, monkeypatch, code):
    wanted = samples(manifest, "forget")[:1]
    expected = [read_sample(manifest, wanted[0].id)]
    disk = Disk(monkeypatch, times=3, code=code)
    reader = Reader(manifest, retries=4)
    assert reader.read(wanted) == expected
    assert disk.waits == [0.25, 0.5, 1.0] and reader.counts.repeated == 3 and len(disk.calls) == 4


def test_a_read_that_fails_for_good_ends_the_run(manifest, monkeypatch):
    wanted = samples(manifest, "forget")[:1]
    disk = Disk(monkeypatch, times=100)
    with pytest.raises(DataError, match=f"{wanted[0].shard} with image '{wanted[0].id}' .* 3 times .Input/output") as e:
        Reader(manifest, retries=2).read(wanted)
    assert len(disk.calls) == 3 and e.value.exit_code == 3 and len(disk.waits) == 2
    with pytest.raises(DataError):
        Reader(manifest, retries=0).read(wanted)
    assert len(disk.calls) == 4


def test_an_error_that_cannot_pass_is_not_repeated(manifest, monkeypatch):
    disk = Disk(monkeypatch, times=100, code=errno.EACCES)
    with pytest.raises(DataError, match="Permission denied"):
        Reader(manifest).read(samples(manifest, "forget"))
    assert len(disk.calls) == 1 and disk.waits == []


def test_short_and_slow_reads_lose_nothing(manifest, monkeypatch):
    """A network file system may return less than was asked for, and take its time."""
    wanted = samples(manifest, "forget")
    expected = [read_sample(manifest, s.id) for s in wanted]
    disk = Disk(monkeypatch, most=100, stall=0.002)
    assert Reader(manifest).read(wanted) == expected
    assert len(disk.calls) > 3 * len(wanted)


def test_errors_reach_a_feeder_of_any_worker_count(manifest, monkeypatch):
    disk = Disk(monkeypatch, times=2)
    images = store(manifest)
    first = feeder(images).batch_at(0)
    assert images.counts.repeated == 2 and len(disk.calls) > 2
    for workers in (0, 2):
        Disk(monkeypatch, times=2)
        images = store(manifest, workers=workers)
        assert feeder(images).batch_at(0).ids == first.ids
        # The disk of every worker that read fails twice; one that starts late may find nothing left to read.
        assert images.counts.repeated in ({2} if workers < 2 else {2, 4})
        images.close()
        Disk(monkeypatch, times=10**6)
        images = store(manifest, workers=workers, retries=1)
        with pytest.raises(DataError, match="2 times .Input/output error"):
            feeder(images).batch_at(0)
        images.close()


def test_a_shard_that_shrinks_or_changes_while_it_is_open(tmp_path):
    manifest = pictures(tmp_path / "shards")
    shard = manifest.shards()[0]
    first, *_, last = manifest.in_shard(shard)
    reader = Reader(manifest)
    reader.read([first])
    path = manifest.shard_path(shard)
    content = path.read_bytes()
    os.truncate(path, last.offset + 3)
    with pytest.raises(DataError, match=f"ends at byte {last.offset + 3}, within image '{last.id}'"):
        reader.read([last])
    with pytest.raises(DataError, match=f"{last.offset + 3} bytes; expected {len(content)}"):
        Reader(manifest).read([last])
    damaged = bytearray(content)
    damaged[first.offset + 20] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=f"'{first.id}' .* sha256"):
        reader.read([first])


def test_few_shards_stay_open(manifest, monkeypatch):
    monkeypatch.setattr(shard_reader, "OPEN_SHARDS", 2)
    before = len(os.listdir("/proc/self/fd"))
    reader = Reader(manifest)
    reader.read(samples(manifest, "retain"))
    assert len(manifest.shards()) > 4 and len(os.listdir("/proc/self/fd")) == before + 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_hundredth_of_the_images_costs_a_hundredth_of_the_bytes(tmp_path):
    manifest = pictures(tmp_path / "shards", retain=792, forget=8, third_party=0, per_shard=100)
    images = store(manifest, cache_mib=1)
    images.plain(manifest.ids("forget"))
    members = sum(s.bytes for name, s in manifest.shard_files.items() if name.startswith("members"))
    assert images.counts.images == 8
    assert images.counts.bytes <= 0.015 * members  # images of 1 KiB in tar blocks; larger ones come closer to 1 %
