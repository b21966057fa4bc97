"""Lists of images to forget that are alike, as the photographs of one person are, for benchmarks/forgetting.py.

The images come from `POOL` images drawn from the data set: one of them by chance, and those that are nearest to it in
their pixels. No encoder and no label has a say.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from distunlearn.data.schedule import permutation
from distunlearn.data.sources.decode import decode_image
from distunlearn.data.sources.sources import open_source
from distunlearn.data.views.crops import evaluation_crop

__all__ = ["alike", "write_request"]

POOL = 3000
SIDE = 28  # pixels
MAX_PIXELS = 1 << 24


@functools.cache
def alike(dataset: str, root: str | None, seed: int, count: int) -> tuple[str, ...]:
    """`count` ids, the image that was drawn first, then by distance; a function of its arguments."""
    source = open_source(dataset, root, MAX_PIXELS)
    rows = permutation(len(source.samples), seed, "pool of a request")[:POOL]
    ids = [source.samples[int(row)][0] for row in rows]
    reader = source.reader()
    photos = [decode_image(reader.read(sample_id)[0], sample_id, MAX_PIXELS, 1) for sample_id in ids]
    squares = np.stack([evaluation_crop(photo, SIDE, 1.0, "bilinear").numpy() for photo in photos])
    pixels = squares.reshape(len(ids), -1).astype(np.float32)
    order = np.square(pixels - pixels[0]).sum(1).argsort(kind="stable")[:count]
    return tuple(ids[int(row)] for row in order)


def write_request(folder: Path, dataset: str, root: str | None, seed: int, count: int) -> Path:
    """The list as a file of ids in `folder`, written if it is not there."""
    path = folder / f"{dataset}-seed{seed}-{count}.txt"
    text = "\n".join(alike(dataset, root, seed, count)) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path
