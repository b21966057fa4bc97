"""Every draw of a view is a pure function of (seed, epoch, sample id, view).

Draws come from a counter-based generator (the idea of Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011) built on the SplitMix64 finaliser (Steele, Lea and Flood, OOPSLA 2014, figure 15): no
global generator, no state to save. Which batch, order, rank, worker or attempt a sample sits in changes no bit
of its view.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from distunlearn.common.random import GAMMA, finalise

TRIES = 10  # crops that are drawn until one fits, as torchvision does
# One draw each per view, whatever is switched on: turning one operation on leaves the draws of the others alone.
COLOUR = ("flip", "jitter", "order", "brightness", "contrast", "saturation", "hue", "grayscale", "blur", "sigma",
          "solarize")  # fmt: skip
CROP = slice(len(COLOUR), len(COLOUR) + 2 * TRIES + 2)  # area and aspect of each try, then top and left


@lru_cache(maxsize=1 << 18)
def _id_hash(sample_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "little", signed=True)


def id_hashes(ids: Sequence[str]) -> np.ndarray:
    """64-bit hashes (BLAKE2b) of sample ids, int64 [n]; the same in every process and version."""
    return np.fromiter(map(_id_hash, ids), dtype=np.int64, count=len(ids))


def uniforms(seed: int, epochs: np.ndarray, ids: Sequence[str], view: int, draws: int) -> np.ndarray:
    """Uniform numbers in [0, 1), multiples of 2^-24, float64 [n, draws].

    Row i is a function of (seed, epochs[i], ids[i], view) alone, and its first k numbers do not depend on
    `draws`.

    Args:
        seed, view: integers >= 0.
        epochs: integers >= 0, [n].
        ids: n sample ids.
        draws: numbers per sample, >= 0.

    Raises:
        ValueError: wrong lengths, types or signs.
    """
    if draws < 0:
        raise ValueError(f"draws is {draws}, it must be >= 0")
    counters = np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(GAMMA)
    bits = finalise(keys(seed, epochs, ids, view)[:, None] + counters)
    return (bits >> np.uint64(40)).astype(np.float64) * 2.0**-24


def keys(seed: int, epochs: np.ndarray, ids: Sequence[str], view: int) -> np.ndarray:
    """uint64 [n], one well-mixed stream start per (seed, epoch, id, view); see `uniforms`."""
    epochs = np.asarray(epochs)
    if epochs.shape != (len(ids),) or (epochs.size and epochs.dtype.kind not in "iu"):
        raise ValueError(f"epochs must be {len(ids)} integers, one per id, got {epochs.dtype} {list(epochs.shape)}")
    if seed < 0 or view < 0 or (epochs.size and epochs.min() < 0):
        raise ValueError(f"seed ({seed}), view ({view}) and epochs must not be negative")
    found = np.full(len(ids), seed & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    for part in (epochs.astype(np.uint64), id_hashes(ids).view(np.uint64), np.uint64(view)):
        found = finalise(found + np.uint64(GAMMA)) ^ part
    return finalise(found + np.uint64(GAMMA))
