"""What a search may change of a method's settings: a range or a list for each key, declared beside the method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

DIGITS = 4  # of a drawn number: enough for a setting, and the same text on every machine


@dataclass(frozen=True)
class Log:
    """Numbers from low to high, drawn evenly in their logarithm; a grid takes both ends and the middle."""

    low: float
    high: float

    def draw(self, rng: np.random.Generator) -> float:
        return _short(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))

    def levels(self) -> list[float]:
        return [_short(v) for v in (self.low, math.sqrt(self.low * self.high), self.high)]


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    values: tuple[float | int | str, ...]

    def draw(self, rng: np.random.Generator) -> float | int | str:
        return self.values[int(rng.integers(len(self.values)))]

    def levels(self) -> list[float | int | str]:
        return list(self.values)


Space = Mapping[str, Log | Choice]


def random(space: Space, count: int, seed: int, method: str) -> list[dict[str, float | int | str]]:
    """`count` settings, each key drawn by itself; a function of the arguments, and the first k are those of count k."""
    rng = np.random.default_rng([seed, *method.encode()])
    return [{key: span.draw(rng) for key, span in space.items()} for _ in range(count)]


def grid(space: Space, count: int, seed: int, method: str) -> list[dict[str, float | int | str]]:
    """At most `count` points of the product of all levels; where it has more, a draw of them without repetition."""
    points = [dict(zip(space, values, strict=True)) for values in product(*(s.levels() for s in space.values()))]
    if len(points) <= count:
        return points
    rng = np.random.default_rng([seed, *method.encode()])
    return [points[i] for i in sorted(rng.choice(len(points), count, replace=False).tolist())]


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
