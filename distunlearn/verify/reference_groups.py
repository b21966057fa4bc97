"""Groups of held-out images chosen as a request was: what images that no encoder saw show of themselves.

Without a retrained encoder, forgotten images are compared with held-out ones. They may differ from these for reasons
that are no trace: they are hard, or so alike that they count as few. A reference group is as hard and as alike as the
request, by how the original encoder sees its images, and stands against the other held-out images as the request does.
How far such groups lie from chance, and how much they scatter, widens the interval of the gate.

Shapes: n = forget, m = holdout, G = groups, k = images of a group, A = axes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from .statistics import Comparison, Part, auc

GROUPS = 120
FEWEST_IN_GROUP, MOST_IN_GROUP = 10, 300
PER_GROUP = 4  # held-out images for each one of a group, so that hard ones do not run out
FAIR_HARDNESS, FAIR_SPREAD = 0.03, 0.8  # a request is a fair sample: at most so far off, at least of so much spread
STREAM = 0x6E0F  # of the draws, see `common/random.py`
WINDOW = 0.1  # share of the images to choose from that are as hard as one of the request


@dataclass(frozen=True, eq=False)
class Placed:
    """How the original encoder sees the images of a request and of the holdout.

    hardness: float64 [n], [m] in [0, 1], mean over signals of the share of the images of their own kind (the retained
    ones; the other held-out ones) that look more like members. places: float64 [n, A], [m, A], of the embeddings.
    """

    hardness: tuple[np.ndarray, np.ndarray]
    places: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Groups:
    """members: bool [G, m]. spread, hardness: of the request and, on the mean, of the groups. alike: whether held-out
    images form groups as alike as the request. fair: whether the request is spread and hard as held-out images are.
    """

    members: np.ndarray
    spread: tuple[float, float]
    hardness: tuple[float, float]
    alike: bool
    fair: bool

    def told(self) -> dict[str, object]:
        """Plain data; the digest stands for which images are in which group."""
        return {
            "groups": len(self.members), "images": int(self.members[0].sum()), "alike": self.alike, "fair": self.fair,
            "spread": dict(zip(("request", "groups"), self.spread, strict=True)),
            "hardness": dict(zip(("request", "groups"), self.hardness, strict=True)),
            "drawn_sha256": hashlib.sha256(np.packbits(self.members, axis=1).tobytes()).hexdigest(),
        }  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """What the groups show of one attack: the mean of AUC - 0.5 over groups, and by how much their scatter exceeds that
    of images which are drawn one by one, carried over to a group of the request's size (>= 1).
    """

    mean: float
    widening: float

    def widened(self, value: float, low: float, high: float) -> tuple[float, float]:
        """The interval of a difference to chance, stretched by the scatter and towards where the groups lie."""
        return (
            value - self.widening * (value - low) - max(0.0, self.mean),
            value + self.widening * (high - value) + max(0.0, -self.mean),
        )


def draw_groups(placed: Placed, seed: int) -> Groups | None:
    """A pure function of the arguments; None where there are too few images.

    A group grows around a held-out image that is about as hard as the request, among so many of its neighbours as are
    together as spread as the request is, and takes one of them for every image of the request that is about as hard.
    """
    (asked, held), (here, there) = placed.hardness, placed.places
    n, m = len(asked), len(held)
    if min(n, m // PER_GROUP) < FEWEST_IN_GROUP:
        return None
    generator = np.random.default_rng([seed, STREAM])
    middle = np.flatnonzero((held >= np.quantile(asked, 0.25)) & (held <= np.quantile(asked, 0.75)))
    anchors = generator.choice(middle if len(middle) else np.arange(m), GROUPS)
    target = _spread(here)
    orders = np.argsort(np.square(there[anchors][:, None] - there).sum(2), axis=1, kind="stable")
    grown = np.stack([_growing(there[order]) for order in orders])
    size = min(n, m // PER_GROUP, MOST_IN_GROUP)
    while size > FEWEST_IN_GROUP and grown[:, size - 1].mean() > target:
        size = max(FEWEST_IN_GROUP, size // 2)
    members = np.zeros((GROUPS, m), dtype=bool)
    for group, order, spread in zip(members, orders, grown, strict=True):
        wide = np.flatnonzero(spread <= target)
        near = order[: max(size, wide[-1] + 1 if len(wide) else 0)]
        group[_as_hard(near, held, generator.permutation(asked)[:size], generator)] = True
    spreads = float(np.mean([_spread(there[group]) for group in members]))
    hardness = float(np.mean([held[group].mean() for group in members]))
    alike = bool(grown[:, size - 1].mean() <= target)
    apart = abs(float(asked.mean()) - float(held.mean()))
    fair = apart <= FAIR_HARDNESS + 2 * float(held.std()) / n**0.5 and target >= FAIR_SPREAD * _spread(there)
    return Groups(members, (target, spreads), (float(asked.mean()), hardness), alike, bool(fair))


def reference(comparison: Comparison, groups: Groups, images: int) -> Reference:
    """How reference groups stand against the other held-out images. images: of the request.

    The scatter of groups of k is turned into a correlation of images within a group (Kish, "Survey Sampling", 1965,
    section 5.4: 1 + (k - 1) rho) and that into the scatter of a group of `images`.
    """
    k, m = int(groups.members[0].sum()), groups.members.shape[1]
    found = np.array([auc(_against_others(comparison, group)) for group in groups.members]) - 0.5
    alone = (m + 1) / (12 * k * (m - k))  # variance of the AUC of k images drawn one by one (Mann and Whitney)
    correlation = max(0.0, float(np.nanvar(found, ddof=1)) / alone - 1) / (k - 1)
    mean = float(np.nanmean(found)) * (1 - k / m)  # a request is compared with all of them: images as hard among these
    return Reference(mean, float(np.sqrt(1 + (images - 1) * correlation)))


def _against_others(comparison: Comparison, group: np.ndarray) -> Comparison:
    parts = []
    for part in comparison.parts:
        inside = group[part.rows]
        parts.append(Part(part.negatives[inside], part.negatives[~inside], part.rows[~inside]))
    return Comparison(tuple(parts))


def _as_hard(near: np.ndarray, held: np.ndarray, wanted: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One image of `near` for each that is wanted, none twice: by chance, of those that are about as hard."""
    window, chosen = max(1, round(WINDOW * len(near))), []
    free = near[np.argsort(held[near], kind="stable")]
    for value in wanted:
        at = np.searchsorted(held[free], value)
        around = np.arange(max(0, at - window), min(len(free), at + window))
        closest = around[np.argsort(np.abs(held[free[around]] - value), kind="stable")[:window]]
        taken = generator.choice(closest)
        chosen.append(free[taken])
        free = np.delete(free, taken)
    return np.array(chosen)


def _spread(places: np.ndarray) -> float:
    """Mean squared distance to the mean."""
    return float(np.square(places - places.mean(0)).sum(1).mean())


def _growing(places: np.ndarray) -> np.ndarray:
    """`_spread` of the first 1, 2, ... rows."""
    count = np.arange(1, len(places) + 1)
    means = np.cumsum(places, axis=0) / count[:, None]
    return np.cumsum(np.square(places).sum(1)) / count - np.square(means).sum(1)
