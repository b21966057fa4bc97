"""Shards are read before their images are asked for: which, when, by whom, and when not."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from object_server import bare
from pictures import feeder, pictures, store

from distunlearn.data.loading import read_ahead
from distunlearn.data.loading.read_ahead import ReadAhead, free_memory
from distunlearn.data.loading.stream import BLOCK_SHARDS, _blocks, epoch_order
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.manifest.records import CODE
from distunlearn.errors import DataError

ROLES = ("retain",)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    """72 images of retain in 18 shards: blocks of 8, 8 and 2."""
    return pictures(tmp_path_factory.mktemp("pictures") / "shards", retain=72, forget=0, third_party=8)


@pytest.fixture
def wishes(monkeypatch) -> list[list[str]]:
    """What was to be read, wish by wish; nothing is."""
    found: list[list[str]] = []
    monkeypatch.setattr(ReadAhead, "_want", lambda self, shards: found.append(list(shards)))
    return found


def blocks(manifest: Manifest, epoch: int) -> list[list[str]]:
    return _blocks(manifest, ROLES, 0, epoch)


def reader(manifest: Manifest, roles=ROLES, rank: int = 0) -> ReadAhead:
    return ReadAhead(manifest, roles, lambda epoch: _blocks(manifest, roles, 0, epoch), rank)


def wait_for(what, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def threads() -> list[threading.Thread]:
    """Those that a test has begun."""
    return [t for t in threading.enumerate() if t.name == "read ahead" and t not in _OTHERS]


_OTHERS: list[threading.Thread] = []  # of tests before, which left their stream open


@pytest.fixture(autouse=True)
def only_own_threads() -> None:
    _OTHERS[:] = threading.enumerate()


def test_blocks_hold_the_shards_of_the_order(manifest):
    for epoch in (0, 1):
        found = blocks(manifest, epoch)
        assert [len(block) for block in found] == [8, 8, 2] and BLOCK_SHARDS == 8
        order = list(epoch_order(manifest, ROLES, 0, epoch))
        start = 0
        for block in found:
            stop = start + sum(len(manifest.in_shard(shard)) for shard in block)
            assert {manifest.by_id[i].shard for i in order[start:stop]} == set(block)
            start = stop
        assert start == len(order) == 72
    assert blocks(manifest, 0) != blocks(manifest, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_asks_for_each_block_once_and_one_block_early(manifest, wishes, workers):
    images = store(manifest, workers=workers, prefetch=1)
    feeds = feeder(images, ROLES, 8)
    try:
        for step in range(18):  # two epochs
            feeds.batch_at(step)
    finally:
        feeds.close()
        images.close()
    first, second, third = (blocks(manifest, epoch) for epoch in (0, 1, 2))
    expected = [first[0] + first[1], first[2], second[0], second[1], second[2], third[0]]
    assert wishes[:6] == expected
    assert wishes[6:] in ([], [third[1]])  # what is decoded ahead may have begun the third epoch


def test_no_image_is_asked_for_before_its_shard_was(manifest, monkeypatch):
    """In the order of events; the control is a reader that knows of no next block."""

    def early(lead: int) -> float:
        events: list[tuple[str, str]] = []
        monkeypatch.setattr(ReadAhead, "_want", lambda self, shards: events.extend(("wish", s) for s in shards[:lead]))
        images = store(manifest)
        feeds = feeder(images, ROLES, 8)
        for step in range(9):
            events += [("image", manifest.by_id[i].shard) for i in feeds.batch_at(step).ids]
        feeds.close()
        images.close()
        known, count = set(), 0
        for kind, shard in events:
            if kind == "wish":
                known.add(shard)
            count += kind == "image" and shard in known
        return count / 72

    assert early(100) == 1
    assert early(4) < 0.8


def test_a_jump_asks_for_the_block_and_the_next(manifest, wishes):
    ahead = reader(manifest)
    first = blocks(manifest, 0)
    ahead.at(0, 40)
    ahead.at(0, 41)
    assert wishes == [first[1] + first[2]]
    ahead.at(0, 3)
    assert wishes[1:] == [first[0] + first[1]]
    ahead.at(3, 70)
    assert wishes[2:] == [blocks(manifest, 3)[2] + blocks(manifest, 4)[0]]


def test_shards_are_read_from_end_to_end(manifest, monkeypatch):
    read: dict[str, int] = {}
    real = os.preadv

    def noted(handle: int, buffers, place: int) -> int:
        count = real(handle, buffers, place)
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        assert place == read.get(name, 0)
        read[name] = place + count
        return count

    monkeypatch.setattr(read_ahead.os, "preadv", noted)
    monkeypatch.setattr(read_ahead, "CHUNK", 1000)
    ahead = reader(manifest)
    ahead.at(0, 0)
    first = blocks(manifest, 0)
    wanted = {shard: manifest.shard_files[shard].bytes for shard in first[0] + first[1]}
    wait_for(lambda: read == wanted)
    assert len(threads()) == 1
    ahead.close()
    ahead.close()
    assert threads() == []


def test_ranks_begin_with_different_shards(manifest, monkeypatch):
    orders = []
    for rank in (0, 3):
        seen: list[str] = []
        monkeypatch.setattr(read_ahead, "_read", lambda path, buffer, ended, seen=seen: seen.append(path.name))
        ahead = reader(manifest, rank=rank)
        ahead.at(0, 0)
        wait_for(lambda seen=seen: len(seen) == 16)
        ahead.close()
        orders.append(seen)
    assert orders[1] == orders[0][3:] + orders[0][:3]


def test_a_forget_set_is_not_read_ahead(tmp_path, wishes):
    """3 of 45 images, which lie among others in their shards; the control are the others."""
    mixed = pictures(tmp_path / "mixed", retain=45, forget=0, third_party=0, per_shard=5)
    mixed.columns.role[::15] = CODE["forget"]
    reader(mixed, "forget").at(0, 0)
    assert wishes == []
    reader(mixed, "retain").at(0, 0)
    assert len(wishes) == 1


def test_nothing_is_read_where_memory_is_short(manifest, monkeypatch):
    size = sum(manifest.shard_files[shard].bytes for block in blocks(manifest, 0)[:2] for shard in block)
    for free, expected in ((4 * size - 4, 0), (4 * size, 1)):
        monkeypatch.setattr(read_ahead, "free_memory", lambda free=free: free)
        ahead = reader(manifest)
        ahead.at(0, 0)
        assert len(threads()) == expected
        ahead.close()


def test_free_memory_is_the_machine_s_or_the_container_s(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(read_ahead, "CGROUP", limit)
    machine = free_memory()
    with open("/proc/meminfo", encoding="ascii") as text:
        total = 1024 * int(text.readline().split()[1])
    assert 0 < machine <= total
    limit.write_text("max\n")
    assert abs(free_memory() - machine) < total / 4
    limit.write_text("12345678\n")
    assert free_memory() == 12345678


def test_shards_in_an_object_store_are_left_alone(manifest, tmp_path, wishes):
    remote = bare(manifest, tmp_path, "http://localhost:9")
    reader(remote).at(0, 0)
    assert wishes == []


def test_a_disk_that_does_not_answer_keeps_nobody_waiting(manifest, monkeypatch):
    """Nor does the thread that was left go on when it answers in the end."""
    asked, answer, read = threading.Event(), threading.Event(), []

    def silent(handle: int, buffers, place: int) -> int:
        asked.set()
        answer.wait(20)
        read.append(place)
        return 1

    monkeypatch.setattr(read_ahead.os, "preadv", silent)
    monkeypatch.setattr(read_ahead, "PATIENCE", 0.1)
    ahead = reader(manifest)
    ahead.at(0, 0)
    assert asked.wait(20)
    (stuck,) = threads()
    start = time.monotonic()
    ahead.close()
    assert time.monotonic() - start < 5 and stuck.is_alive()
    answer.set()
    stuck.join(20)
    assert not stuck.is_alive() and len(read) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_cannot_be_read_is_named_by_the_reads_that_count(tmp_path, workers):
    broken = pictures(tmp_path / "broken", retain=72, forget=0, third_party=8)
    shard = blocks(broken, 0)[1][3]
    broken.shard_path(shard).unlink()
    images = store(broken, workers=workers)
    feeds = feeder(images, ROLES, 8)
    with pytest.raises(DataError, match=rf"The shard {shard} is missing"):
        for step in range(9):
            feeds.batch_at(step)
    feeds.close()
    images.close()
    assert threads() == []
