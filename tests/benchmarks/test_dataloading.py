"""benchmarks/dataloading.py: its photos repeat, its contenders do the same work, its figures are what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import loaders  # noqa: E402
import photos  # noqa: E402
from dataloading import forget_bytes, shuffle_quality  # noqa: E402


@pytest.fixture(scope="module")
def source() -> photos.Photos:
    return photos.Photos(120, 3)


@pytest.fixture(scope="module")
def manifest(source, tmp_path_factory):
    return photos.shards(source, tmp_path_factory.mktemp("photos") / "shards", 40)


def test_photos_repeat_and_look_like_photos():
    assert photos.jpeg(1) == photos.jpeg(1) != photos.jpeg(2)
    picture = photos.photo(1)
    assert picture.shape == (400, 500, 3) and 30_000 < len(photos.jpeg(1)) < 130_000
    power = np.abs(np.fft.rfft(picture.mean(-1) - picture.mean(), axis=1)).mean(0)
    assert power[1:6].mean() > 5 * power[40:60].mean() > 5 * power[200:].mean()  # falls with the frequency


def test_every_contender_runs(manifest, source, tmp_path):
    root = photos.image_folder(source, tmp_path / "files")
    found = loaders.race(manifest, root, 32, 1, 64, 1, start=32)
    assert len(found) == 5 and all(len(rounds) == 1 and np.isfinite(rounds).all() for rounds in found.values())


def test_forget_bytes_are_counted(manifest):
    found = forget_bytes(manifest, 0.1)
    assert found["images"] == 12 and found["against needed"] >= 1
    total = sum(shard.bytes for shard in manifest.shard_files.values())
    assert found["share"] == found["bytes"] / total < 0.15


def test_shuffle_figures_know_their_extremes():
    quality = shuffle_quality(16, 32, 64)
    blocks, full, none = quality.values()
    assert none["shards in a batch"] == 2 and none["near"] > 0.9 and none["again"] == pytest.approx(511 / 63, rel=1e-6)
    assert full["again"] == pytest.approx(1, abs=0.1) and full["near"] < 0.1
    assert 7 < blocks["shards in a batch"] <= 8 and 1 < blocks["again"] < 3
