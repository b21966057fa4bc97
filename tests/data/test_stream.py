"""A batch is a function of its step: the same ids and bits for any number of ranks and workers, and on resuming."""

from __future__ import annotations

import collections
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import by_webdataset, feeder, pictures, reloaded, store
from torchvision.transforms.v2 import functional as tv

from distunlearn.config.schema import ViewsConfig
from distunlearn.data.loading.epoch_order import epoch_order
from distunlearn.data.loading.verify import read_sample
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.schedule import Batch
from distunlearn.data.sources.decode import decode_image
from distunlearn.errors import CoverageError, DataError, UndecodableError
from distunlearn.objectives.forward import random_views

MEMBERS = ("retain", "forget")
PLACES = [(world, workers) for world in (1, 2, 4) for workers in (0, 1, 3)]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    return pictures(tmp_path_factory.mktemp("pictures") / "shards")


@pytest.fixture(scope="module")
def with_bad(tmp_path_factory) -> Manifest:
    """2 of 40 retained images and one of 6 third-party images are no images."""
    folder = tmp_path_factory.mktemp("bad") / "shards"
    return pictures(folder, bad=("p3", "p17", "p50"))


def stream(manifest: Manifest, steps, world: int = 1, workers: int = 0, roles=MEMBERS, batch: int = 6, seed: int = 0,
           **options) -> list[list[Batch]]:  # fmt: skip
    """[step][rank]: the batches of all ranks, one rank after the other."""
    found: list[list[Batch]] = [[] for _ in steps]
    for rank in range(world):
        images = store(manifest, workers=workers, **options)
        feeds = feeder(images, roles, batch, rank, world, seed)
        try:
            for batches, step in zip(found, steps, strict=True):
                batches.append(feeds.batch_at(step))
        finally:
            feeds.close()
            images.close()
    return found


def whole(parts: list[Batch]) -> Batch:
    return Batch(
        [i for part in parts for i in part.ids],
        np.concatenate([part.epochs for part in parts]),
        torch.cat([part.labels for part in parts]),
        parts[0].cut,
        torch.cat([part.crops for part in parts]),
        [i for part in parts for i in part.replaced],
    )


def assert_same(found: Batch, expected: Batch) -> None:
    assert (found.ids, found.replaced) == (expected.ids, expected.replaced)
    assert torch.equal(found.crops, expected.crops) and torch.equal(found.labels, expected.labels)
    assert np.array_equal(found.epochs, expected.epochs)


@pytest.fixture(scope="module")
def reference(manifest) -> list[Batch]:
    return [whole(parts) for parts in stream(manifest, range(20))]


def test_the_images_are_those_of_the_manifest(manifest, reference):
    """Against webdataset reading the same shards, and a decode of its own."""
    for batch in reference[:3]:
        for sample_id, image in zip(batch.ids, store(manifest).plain(batch.ids), strict=True):
            data = by_webdataset(manifest, manifest.by_id[sample_id].shard)[sample_id]
            photo = decode_image(data, sample_id, 10_000, 3)
            assert torch.equal(image, tv.center_crop(tv.resize(photo, [16], antialias=True), [16, 16]))


@pytest.mark.parametrize(("world", "workers"), PLACES)
def test_every_world_and_worker_count_gives_the_same_batches(manifest, reference, world, workers):
    seen = collections.Counter()
    for parts, expected in zip(stream(manifest, range(20), world, workers), reference, strict=True):
        sizes = [len(part) for part in parts]
        assert sum(sizes) == 6 and max(sizes) - min(sizes) <= 1
        assert_same(whole(parts), expected)
        seen.update(zip(whole(parts).epochs.tolist(), whole(parts).ids, strict=True))
    members = set(manifest.ids(MEMBERS))
    for epoch in (0, 1):  # 20 steps of 6 are two epochs of 48 and a half: batches run across both borders
        assert {i: n for (e, i), n in seen.items() if e == epoch} == dict.fromkeys(members, 1)


def test_another_seed_is_another_order(manifest, reference):
    """Negative control of every comparison of this file."""
    other = [whole(parts) for parts in stream(manifest, range(20), seed=1)]
    assert all(a.ids != b.ids for a, b in zip(other, reference, strict=True))
    assert {i for b in other for i in b.ids} == {i for b in reference for i in b.ids}


def test_cached_and_streamed_batches_are_the_same(manifest, reference):
    for workers in (0, 2):
        for parts, expected in zip(stream(manifest, range(20), 2, workers, cache_mib=1), reference, strict=True):
            assert_same(whole(parts), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_fewer_images_than_ranks_times_rows(manifest, workers):
    """8 forget images, 32 rows: every rank has its rows, every image comes four times, each time in another epoch."""
    parts = stream(manifest, range(3), 4, workers, roles="forget", batch=32)
    for step in parts:
        assert [len(part) for part in step] == [8] * 4
        rows = collections.Counter(zip(whole(step).epochs.tolist(), whole(step).ids, strict=True))
        assert set(rows.values()) == {1} and collections.Counter(whole(step).ids) == dict.fromkeys(
            manifest.ids("forget"), 4
        )


@pytest.mark.parametrize("workers", [0, 1])
def test_fewer_forget_rows_than_ranks(manifest, workers):
    """Three rows on four ranks: one has none, and nothing hangs or is lost."""
    parts = stream(manifest, range(8), 4, workers, roles="forget", batch=3)
    assert [len(part) for part in parts[0]] == [0, 1, 1, 1]
    assert parts[0][0].crops.shape == (0, 2, 3, 16, 16)
    seen = collections.Counter(i for step in parts for part in step for i in part.ids)
    assert seen == dict.fromkeys(manifest.ids("forget"), 3)


def test_no_image_of_a_role_is_refused(tmp_path):
    manifest = pictures(tmp_path / "shards", third_party=0)
    with pytest.raises(DataError, match="no image of role third_party"):
        feeder(store(manifest), "third_party")


VIEWS = ViewsConfig(crop_scale_min=0.3, flip=0.5, saturation=0.4, hue=0.1, grayscale=0.2, blur=0.5)


def augmented(batch: Batch, seed: int) -> torch.Tensor:
    return torch.cat(random_views(batch.crops, VIEWS, seed=seed, epochs=batch.epochs, ids=batch.ids, views=(0, 1)))


@pytest.mark.parametrize("seed", range(20))
def test_resumed_anywhere_and_on_other_processes(manifest, seed):
    """The state is a step, a seed and the manifest; whoever goes on gets the same ids and augmented bits."""
    draw = np.random.default_rng(seed)
    straight = [whole(parts) for parts in stream(manifest, range(16), seed=seed)]
    step = 0
    while step < 16:
        stop = min(16, step + int(draw.integers(1, 8)))
        world, workers = int(draw.choice([1, 2, 3, 4])), int(draw.choice([0, 1, 3]))
        parts = stream(reloaded(manifest.folder), range(step, stop), world, workers, seed=seed)
        for part, expected in zip(parts, straight[step:stop], strict=True):
            assert_same(whole(part), expected)
            views = [augmented(rows, seed) for rows in part]
            halves = [torch.cat([v[: len(v) // 2] for v in views]), torch.cat([v[len(v) // 2 :] for v in views])]
            assert torch.equal(torch.cat(halves), augmented(expected, seed))
        step = stop


def test_skipping_decodes_nothing(manifest):
    images = store(manifest)
    feeds = feeder(images)
    feeds.batch_at(1000)
    assert images.counts.images == 8
    feeds.batch_at(3)
    assert images.counts.images == 16
    images = store(manifest, workers=1, prefetch=2)
    feeds = feeder(images)
    for step in (1000, 1001, 7):
        feeds.batch_at(step)
    feeds.close()
    images.close()
    assert images.counts.images <= 8 * (2 + 2 + 1 + 2)  # taken, and asked for ahead


@pytest.mark.parametrize(("world", "workers", "cache_mib"), [(1, 0, 0), (2, 1, 0), (4, 3, 0), (1, 0, 1), (2, 2, 1)])
def test_an_undecodable_image_is_replaced_the_same_way_everywhere(with_bad, world, workers, cache_mib):
    for bad in ("p3", "p17", "p50"):  # the fault is there: the bytes have the manifest's digest and are no image
        with pytest.raises(UndecodableError, match=bad):
            decode_image(read_sample(with_bad, bad), bad, 10_000, 3)
    options = {"max_undecodable": 0.2, "roles": ("retain", "forget", "third_party"), "batch": 8}
    expected = [whole(parts) for parts in stream(with_bad, range(14), **options)]
    found = stream(with_bad, range(14), world, workers, cache_mib=cache_mib, **options)
    for parts, one in zip(found, expected, strict=True):
        together = whole(parts)
        assert (together.ids, sorted(together.replaced)) == (one.ids, sorted(one.replaced))
        assert torch.equal(together.crops, one.crops)
    scheduled = [i for epoch in (0, 1) for i in epoch_order(with_bad, options["roles"], 0, epoch)]
    came = [i for batch in expected for i in batch.ids][: len(scheduled)]
    assert [a for a, b in zip(scheduled, came, strict=True) if a != b] == [
        i for i in scheduled if i in ("p3", "p17", "p50")
    ]
    role = {i: with_bad.by_id[i].role for i in came}
    for planned, other in zip(scheduled, came, strict=True):
        assert other not in ("p3", "p17", "p50") and role[other] == with_bad.by_id[planned].role


@pytest.mark.parametrize("cache_mib", [0, 1])
def test_too_many_undecodable_images_end_the_run(with_bad, cache_mib):
    with pytest.raises(DataError, match=r"2 of 40 retain images cannot be decoded: 'p17', 'p3' .*max_undecodable"):
        stream(with_bad, range(10), roles="retain", cache_mib=cache_mib, max_undecodable=0.03)
    assert stream(with_bad, range(10), roles="retain", cache_mib=cache_mib, max_undecodable=0.05)
    with pytest.raises(DataError, match="1 of 40 retain images|2 of 40 retain images"):  # by default one in a thousand
        stream(with_bad, range(10), roles="retain", cache_mib=cache_mib)


def test_nothing_but_undecodable_images(tmp_path):
    manifest = pictures(tmp_path / "shards", 4, 2, 2, bad=("p0", "p1", "p2", "p3"))
    with pytest.raises(DataError, match="No image of role retain can be decoded"):
        stream(manifest, [0], roles="retain", batch=2, max_undecodable=1.0)


@pytest.mark.parametrize("roles", ["forget", MEMBERS])
@pytest.mark.parametrize(("workers", "cache_mib"), [(0, 0), (2, 0), (0, 1)])
def test_an_undecodable_forget_image_is_never_passed_over(tmp_path, roles, workers, cache_mib):
    manifest = pictures(tmp_path / "shards", bad=("p41", "p44"))
    with pytest.raises(CoverageError, match=r"forget images cannot be decoded.*'p4[14]'.*take them off the list"):
        stream(manifest, range(8), workers=workers, roles=roles, cache_mib=cache_mib, max_undecodable=1.0)


def test_images_for_an_audit_leave_out_what_is_none(with_bad):
    images = store(with_bad, max_undecodable=0.05)
    ids = images.decodable(with_bad.ids("retain"))
    assert set(with_bad.ids("retain")) - set(ids) == {"p3", "p17"} and set(images.undecodable.found) == {"p3", "p17"}
    count = images.counts.images
    assert images.decodable(with_bad.ids("retain")) == ids and images.counts.images == count
    with pytest.raises(DataError, match="'p3'"):
        images.plain(["p2", "p3"])


def test_a_damaged_header_loses_nothing(manifest, tmp_path):
    """webdataset ends such a shard without an error; the stream does not read headers at all."""
    folder = Path(shutil.copytree(manifest.folder, tmp_path / "shards"))
    name = manifest.shards()[0]
    inside = manifest.in_shard(name)
    with open(folder / name, "r+b") as file:
        file.seek(inside[2].offset - 512 + 148)  # the checksum of the third image's header
        file.write(b"9999999\0")
    damaged = reloaded(folder, manifest.folder)
    with pytest.raises(DataError, match=f"gave 2 samples; expected {len(inside)}: its contents are damaged"):
        by_webdataset(damaged, name)
    expected = stream(manifest, range(8))
    for found, one in zip(stream(damaged, range(8)), expected, strict=True):
        assert_same(whole(found), whole(one))


def test_shuffling_crosses_shards(manifest):
    """A batch does not come from one shard, and the neighbours of an epoch are not those of the next."""
    where = [manifest.by_id[i].shard for i in epoch_order(manifest, MEMBERS, 0, 0)]
    assert sum(a == b for a, b in zip(where, where[1:], strict=False)) < len(where) / 3
    first, second = (list(epoch_order(manifest, MEMBERS, 0, epoch)) for epoch in (0, 1))
    assert len(set(zip(first, first[1:], strict=False)) & set(zip(second, second[1:], strict=False))) < 5
