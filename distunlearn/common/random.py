"""Random streams: SplitMix64, and one register of the numbers that keep the draws of one seed apart.

A draw is a function of the seed and of its stream, never of a generator's state. Three kinds of streams:

* `STREAMS`: second entry of the key of `numpy.random.default_rng([seed, stream, ...])`;
* `PHILOX`: last word of the counter of a Philox generator with the key (seed, step);
* `VIEW_EPOCHS`: epochs in the key of an image's views that no training reaches; (first, after the last).
"""

from __future__ import annotations

import numpy as np

from distunlearn.verify.reference_groups import STREAM
from distunlearn.verify.statistics import BOOTSTRAP, DOSE_UTILITY

# SplitMix64: increment and multipliers of Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
# OOPSLA 2014, figure 15.
GAMMA = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB

STREAMS = {
    "calibration sample": 17, "audit sample": 0x5A, "attack halves": 0xE4, "relearning order": 0x4E1,
    "gradient sketch signs": 0x51C2, "shadow members": 0x5AD0, "shadow chance": 0x900D, "two-sample": 0xC257,
    "bootstrap": BOOTSTRAP, "dose sample": 0xD05E, "dose utility": DOSE_UTILITY,
    "reference groups": STREAM,
}  # fmt: skip
PHILOX = {"mmd": 0x6D6D64, "probes": 0x70726F6265, "sketch": 0x736B65746368, "sliced": 0x736C69636564}
VIEW_EPOCHS = {
    "training": (0, 1 << 32),
    "calibration": (1 << 32, (1 << 32) + (1 << 16)),
    "dose": ((1 << 32) + (1 << 17), (1 << 32) + (1 << 17) + 1),
    "audit": (1 << 33, (1 << 33) + 1),
    "audit gradients": ((1 << 33) + 1, (1 << 33) + 2),
    "relearning, measured": ((1 << 33) + 2, (1 << 33) + 3),
    "relearning, trained": ((1 << 33) + 3, 3 << 32),
    "part crops": (3 << 32, (3 << 32) + 1),
}


def generator_of(stream: str, seed: int, step: int, index: int = 0) -> np.random.Generator:
    """The generator of a stream of `PHILOX`: a pure function of the arguments, hence alike on all ranks.

    seed, step, index: whole numbers in 0 .. 2^64 - 1.
    """
    bits = np.random.Philox(key=np.array([seed, step], dtype=np.uint64), counter=[0, 0, index, PHILOX[stream]])
    return np.random.Generator(bits)


def finalise(words: np.ndarray) -> np.ndarray:
    """SplitMix64's mixing of uint64 values, a bijection."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(MIX_1)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(MIX_2)
    return words ^ (words >> np.uint64(31))
