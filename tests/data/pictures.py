"""Small shards of JPEG images, some of which are none, written as prepare writes them; nothing is downloaded."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from distunlearn.config.schema import DataConfig
from distunlearn.data.loading.image_store import ImageStore
from distunlearn.data.loading.stream import Batches, RoleFeeder
from distunlearn.data.loading.webdataset_pipeline import checked_samples
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.prepare.index_shards import index_shards
from distunlearn.data.prepare.selection import draw_request
from distunlearn.data.prepare.write_shards import Progress, write_shards
from distunlearn.data.schedule import Batch
from distunlearn.data.views.crops import Cutter


def jpeg(seed: int, width: int = 40, height: int = 30) -> bytes:
    """A smooth picture of random colours."""
    corners = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@dataclass
class Pictures:
    """A source as `write_shards` takes it."""

    samples: list[tuple[str, int | None]]
    bad: frozenset[str] = frozenset()
    name: str = "pictures"
    classes: tuple[str, ...] = ("a", "b", "c")
    labels_known: bool = True
    skipped: dict[str, int] = field(default_factory=dict)

    def stamp(self, sample_id: str) -> str:
        return sample_id

    def reader(self) -> Pictures:
        return self

    def read(self, sample_id: str) -> tuple[bytes, str]:
        whole = jpeg(int(sample_id.removeprefix("p")))
        return (whole[: len(whole) // 2] if sample_id in self.bad else whole), "jpg"


def indexed(cfg: DataConfig, seed: int, folder: Path, progress: Progress | None = None) -> Manifest:
    """Shards that exist, with the roles that the settings give."""
    return draw_request(cfg, seed, index_shards(cfg, folder, progress))


def pictures(
    folder: Path, retain: int = 40, forget: int = 8, third_party: int = 6, bad: tuple[str, ...] = (), per_shard: int = 4
) -> Manifest:
    """Shards of so many images of each role; ids are p0, p1 ..., retain first, then forget, then third party."""
    names = [f"p{i}" for i in range(retain + forget + third_party)]
    roles = {i: "retain" if n < retain else "forget" if n < retain + forget else "third_party"
             for n, i in enumerate(names)}  # fmt: skip
    source = Pictures([(i, n % 3) for n, i in enumerate(names)], frozenset(bad))
    made = write_shards([source], roles, folder, per_shard, seed=0)
    made.save_request(_run(folder))
    return made


def _run(folder: Path) -> Path:
    return Path(folder).with_name(f"{Path(folder).name}-run")


def reloaded(folder: Path, like: Path | None = None) -> Manifest:
    """What `pictures` wrote, read again; like: the folder of which this one is a copy."""
    return Manifest.load(folder, run=_run(like or folder))


def store(manifest: Manifest, **options) -> ImageStore:
    """Nothing is cached unless asked for, so that everything is streamed."""
    return ImageStore(manifest, Cutter(16), 3, options.pop("cache_mib", 0), 1_000_000, **options)


def feeder(images: ImageStore, roles="retain", batch: int = 8, rank: int = 0, world: int = 1, seed: int = 0):
    return Feeder(RoleFeeder(images, images.manifest, roles, seed, batch, rank, world))


class Feeder:
    """One feeder's batches as a phase gets them: ahead of their step where there are workers."""

    def __init__(self, feeder: RoleFeeder) -> None:
        self.feeder = feeder
        self.batches = Batches({"all": feeder}, torch.device("cpu"), 10**6)

    def batch_at(self, step: int) -> Batch:
        return self.batches.at(step)["all"]

    def close(self) -> None:
        self.batches.close()


def by_webdataset(manifest: Manifest, shard: str) -> dict[str, bytes]:
    """{id: encoded bytes} of one shard, read through webdataset and checked."""
    return {sample.id: record[kind] for sample, kind, record in checked_samples(manifest, shard)}
