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

__all__ = ["alike", "hard", "write_request"]

POOL = 3000
SIDE = 28  # pixels
MAX_PIXELS = 1 << 24


@functools.cache
def alike(dataset: str, root: str | None, seed: int, count: int) -> tuple[str, ...]:
    """`count` ids, the image that was drawn first, then by distance; a function of its arguments."""
    ids, pixels = _pool(dataset, root, seed)
    order = np.square(pixels - pixels[0]).sum(1).argsort(kind="stable")[:count]
    return tuple(ids[int(row)] for row in order)


@functools.cache
def hard(dataset: str, root: str | None, seed: int, count: int) -> tuple[str, ...]:
    """`count` ids of images that are like no other: those farthest from their nearest one, of a third of the pool."""
    ids, pixels = (found[: POOL // 3] for found in _pool(dataset, root, seed))
    squares = np.square(pixels).sum(1)
    apart = squares[:, None] + squares - 2 * pixels @ pixels.T
    np.fill_diagonal(apart, np.inf)
    order = (-apart.min(1)).argsort(kind="stable")[:count]
    return tuple(ids[int(row)] for row in order)


def _pool(dataset: str, root: str | None, seed: int) -> tuple[list[str], np.ndarray]:
    """Ids in an order by chance, and their pixels, float32 [n, SIDE * SIDE * channels]."""
    source = open_source(dataset, root, MAX_PIXELS)
    rows = permutation(len(source.samples), seed, "pool of a request")[:POOL]
    ids = [source.samples[int(row)][0] for row in rows]
    reader = source.reader()
    photos = [decode_image(reader.read(sample_id)[0], sample_id, MAX_PIXELS, 1) for sample_id in ids]
    squares = np.stack([evaluation_crop(photo, SIDE, 1.0, "bilinear").numpy() for photo in photos])
    return ids, squares.reshape(len(ids), -1).astype(np.float32)


def write_request(folder: Path, dataset: str, root: str | None, seed: int, count: int, kind: str = "alike") -> Path:
    """The list as a file of ids in `folder`, written if it is not there. kind: alike or hard."""
    path = folder / f"{dataset}-seed{seed}-{'hard-' if kind == 'hard' else ''}{count}.txt"
    text = "\n".join({"alike": alike, "hard": hard}[kind](dataset, root, seed, count)) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path
