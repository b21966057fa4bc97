"""The batches of a phase out of several feeders: each draw gets its own, whatever is ahead or cached."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from pictures import pictures, store

from distunlearn.data.loading import shard_reader
from distunlearn.data.loading.stream import Batches, RoleFeeder
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.schedule import Batch
from distunlearn.errors import DataError

CPU = torch.device("cpu")
ROLES = {"retain": ("retain",), "forget": ("forget",), "third_party": ("third_party",)}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    return pictures(tmp_path_factory.mktemp("pictures") / "shards")


def open_batches(manifest: Manifest, last: int, **options) -> Batches:
    images = store(manifest, **options)
    return Batches({name: RoleFeeder(images, manifest, roles, 0, 6) for name, roles in ROLES.items()}, CPU, last)


def loader(batches: Batches):
    return batches._feeders["retain"].store.loader


def assert_same(found: dict[str, Batch], expected: dict[str, Batch]) -> None:
    assert list(found) == list(expected)
    for one, other in zip(found.values(), expected.values(), strict=True):
        assert (one.ids, one.replaced) == (other.ids, other.replaced)
        assert torch.equal(one.crops, other.crops) and np.array_equal(one.epochs, other.epochs)


@pytest.fixture(scope="module")
def expected(manifest) -> list[dict[str, Batch]]:
    """Each batch by itself."""
    feeders = {name: RoleFeeder(store(manifest), manifest, roles, 0, 6) for name, roles in ROLES.items()}
    return [{name: feeder.batch_at(draw) for name, feeder in feeders.items()} for draw in range(12)]


# Photos are 40 x 30 pixels: 1 MiB holds all of them.
@pytest.mark.parametrize(("workers", "cached"), [(0, 0), (0, 10), (0, 100), (1, 100), (3, 100)])
def test_every_draw_gets_its_own_batches(manifest, expected, workers, cached, monkeypatch):
    """On and on, and jumps, as after a resume. The control: no two draws are alike."""
    batches = open_batches(manifest, 12, workers=workers, cache_mib=1)
    images = batches._feeders["retain"].store
    dataset = images.loader.dataset
    dataset._room = min(dataset._room, cached * 40 * 30 * 3)
    with batches:
        for draw in (0, 1, 2, 5, 6, 3, 10, 11):
            assert_same(batches.at(draw), expected[draw])
    seen = {i for draw in (0, 1, 2, 5, 6, 3, 10, 11) for batch in expected[draw].values() for i in batch.ids}
    assert len(dataset._photos) == (0 if workers else min(cached, len(seen)))
    images.close()
    assert len({tuple(draw["retain"].ids) for draw in expected}) == 12


def test_nothing_beyond_the_last_draw_is_decoded(manifest):
    batches = open_batches(manifest, 3, workers=2, prefetch=4)
    with batches:
        for draw in range(3):
            batches.at(draw)
        assert loader(batches).is_idle and loader(batches).counts.images == 3 * 18
        with pytest.raises(AssertionError):
            batches.at(3)
    loader(batches).close()


def test_each_worker_is_so_many_batches_ahead(manifest):
    batches = open_batches(manifest, 100, workers=2, prefetch=3)
    with batches:
        batches.at(0)
        assert len(batches._planned) == 2 * 3
    assert loader(batches).is_idle, "the end of a phase gives up what is ahead"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_waits_for_the_draw_that_needs_the_image(tmp_path, workers, expected):
    """Workers read the damaged image long before; the draws until then are served."""
    damaged = pictures(tmp_path / "shards")
    first = next(n for n, draw in enumerate(expected) if n >= 3 and draw["retain"].ids[2] not in
                 {i for earlier in expected[:n] for i in earlier["retain"].ids})  # fmt: skip
    sample = damaged.by_id[expected[first]["retain"].ids[2]]
    with open(damaged.shard_path(sample.shard), "r+b") as file:
        file.seek(sample.offset)
        file.write(b"other bytes")
    batches = open_batches(damaged, 12, workers=workers, prefetch=4)
    with batches:
        for draw in range(first):
            batches.at(draw)
        with pytest.raises(DataError, match=f"{sample.id!r}.*sha256|sha256.*{sample.id!r}"):
            batches.at(first)


def test_the_reads_of_a_batch_are_announced_before_the_first_is_waited_for(manifest, monkeypatch):
    """So that a disk has all of them to do; and no byte more is announced than is read."""
    events: list[tuple[str, int, int]] = []
    advise, read = os.posix_fadvise, os.pread

    def advised(handle: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        events.append(("announced", start, length))
        advise(handle, start, length, advice)

    def noted(handle: int, length: int, start: int) -> bytes:
        events.append(("read", start, length))
        return read(handle, length, start)

    monkeypatch.setattr(shard_reader.os, "posix_fadvise", advised)
    monkeypatch.setattr(shard_reader.os, "pread", noted)
    RoleFeeder(store(manifest), manifest, "retain", 0, 8).batch_at(0)
    count = sum(kind == "announced" for kind, _, _ in events)
    assert count > 2 and [e[1:] for e in events[:count]] == [e[1:] for e in events[count:]]
    assert {kind for kind, _, _ in events[count:]} == {"read"}
