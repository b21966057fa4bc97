"""Photo-like JPEG images, made from a seed, and shards of them: what benchmarks/dataloading.py reads.

A photo's spectrum falls with the frequency, so random fields of ever finer grain and ever smaller contrast are added
up; edges and sensor noise come on top. At 500 x 400 pixels and quality 90 a file has about 70 kB, a JPEG of ImageNet
110 kB.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.prepare.write_shards import write_shards

SIZE = (500, 400)  # width, height


def photo(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """uint8 [height, width, 3]."""
    draw = np.random.default_rng(seed)
    width, height = size
    pixels = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 9):
        cells = (max(2, height * 2**octave // 512), max(2, width * 2**octave // 512))
        field_ = draw.normal(size=(*cells, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(field_[..., channel]).resize(size, Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(layer) * 90 / 2 ** (0.8 * octave)
    for _ in range(12):  # things with borders
        left, top = draw.integers(0, width - 40), draw.integers(0, height - 40)
        wide, high = draw.integers(20, 160, 2)
        pixels[top : top + high, left : left + wide] += draw.normal(0, 25, 3).astype(np.float32)
    pixels += draw.normal(0, 6, pixels.shape).astype(np.float32)
    return np.clip(pixels + 120, 0, 255).astype(np.uint8)


def jpeg(seed: int, size: tuple[int, int] = SIZE, quality: int = 90) -> bytes:
    """A photo as a JPEG file, 4:2:0 as cameras write it."""
    buffer = io.BytesIO()
    Image.fromarray(photo(seed, size)).save(buffer, "JPEG", quality=quality, subsampling=2)
    return buffer.getvalue()


@dataclass
class Photos:
    """A source of `count` ids over `distinct` photos, as `write_shards` takes it."""

    count: int
    distinct: int
    name: str = "photos"
    labels_known: bool = True
    skipped: dict[str, int] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    files: dict[int, bytes] = field(default_factory=dict)

    @property
    def samples(self) -> list[tuple[str, int | None]]:
        return [(f"photo-{n:07d}", n % 10) for n in range(self.count)]

    def stamp(self, sample_id: str) -> str:
        return sample_id

    def reader(self) -> Photos:
        return self

    def read(self, sample_id: str) -> tuple[bytes, str]:
        number = int(sample_id.removeprefix("photo-")) % self.distinct
        if number not in self.files:
            self.files[number] = jpeg(number)
        return self.files[number], "jpg"


def shards(source: Photos, folder: Path, per_shard: int, forget: float = 0.01) -> Manifest:
    """All photos as members, the first share `forget` of them to be forgotten."""
    ids = [sample_id for sample_id, _ in source.samples]
    cut = max(1, round(forget * len(ids)))
    roles = {i: "forget" if n < cut else "retain" for n, i in enumerate(ids)}
    return write_shards([source], roles, folder, per_shard, seed=0)


def image_folder(source: Photos, root: Path) -> Path:
    """The same photos as files, one folder per class, as torchvision's ImageFolder wants them."""
    for sample_id, label in source.samples:
        folder = root / f"class-{label}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{sample_id}.jpg").write_bytes(source.read(sample_id)[0])
    return root
