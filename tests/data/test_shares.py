"""A feeder whose images do not come in every epoch: as often as their shares say, the same everywhere."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from pictures import feeder, pictures, store

from distunlearn.data.manifest.manifest import Manifest

SHARES = {f"p{i}": 0.8 if i < 10 else 0.1 if i < 30 else 0.0 for i in range(40)}  # 10 images an epoch


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    return pictures(tmp_path_factory.mktemp("pictures") / "shards", bad=("p3",))


def drawn(manifest: Manifest, steps: range, rank: int = 0, world: int = 1, workers: int = 0, **options):
    """(ids, epochs, images) by step."""
    images = store(manifest, workers=workers, max_undecodable=0.1, **options)
    shares = np.array([SHARES[i] for i in manifest.ids("retain")])
    feeds = feeder(images, "retain", 5, rank, world, shares=shares)
    try:
        batches = [feeds.batch_at(step) for step in steps]
        return [(batch.ids, batch.epochs.tolist(), batch.images) for batch in batches]
    finally:
        feeds.close()
        images.close()


def test_images_come_as_often_as_their_shares_say(manifest):
    epochs = 300
    found = drawn(manifest, range(2 * epochs), cache_mib=1)
    for epoch in range(epochs):
        ids = found[2 * epoch][0] + found[2 * epoch + 1][0]
        assert found[2 * epoch][1] == [epoch] * 5
        assert len(set(ids)) >= 9  # the image that cannot be decoded is replaced by one of the epoch, maybe its own
    counts = collections.Counter(i for ids, _, _ in found for i in ids)
    often = [counts[f"p{i}"] / epochs for i in range(10) if i != 3]
    seldom = [counts[f"p{i}"] / epochs for i in range(10, 30)]
    assert counts["p3"] == 0 and not any(counts[f"p{i}"] for i in range(30, 40))
    assert all(0.7 < share < 1.0 for share in often) and all(0.03 < share < 0.25 for share in seldom)


@pytest.mark.parametrize(("world", "workers", "cache_mib"), [(1, 2, 0), (2, 0, 0), (3, 1, 0), (2, 0, 1)])
def test_every_place_draws_the_same(manifest, world, workers, cache_mib):
    expected = drawn(manifest, range(12))
    found = [drawn(manifest, range(12), rank, world, workers, cache_mib=cache_mib) for rank in range(world)]
    for step, (ids, epochs, images) in enumerate(expected):
        parts = [found[rank][step] for rank in range(world)]
        assert [i for part in parts for i in part[0]] == ids and [e for part in parts for e in part[1]] == epochs
        assert np.array_equal(np.concatenate([part[2].numpy() for part in parts]), images.numpy())
    late = drawn(manifest, range(7, 9))
    assert [step[0] for step in late] == [step[0] for step in expected[7:9]]
