"""Counterparts: the third-party images that are to the third party what the forgotten images are to the members.

A match of distributions makes the forgotten images look like the third party as a whole. Requests are no fair sample,
though: the photographs of one person are alike, easier or harder than most, and an encoder that met neither them nor
the third party would still tell the two sets apart. That difference is no trace, and to remove it is to leave one.

So third-party images are weighed, as controls are matched to cases (Rubin, "Matching to remove bias in observational
studies", Biometrics 29, 1973), by the original encoder and without labels. For each member i, forgotten or retained:

1. its K nearest retained and its K nearest third-party images, by the cosine of their embeddings: what they show;
2. u_i, the rank of its view agreement among those retained ones: they were trained on as it was, so what training added
   is on both sides, and the rank says how easy the image is by itself;
3. a_ij, a Gaussian of width `WIDTH` in v_j - u_i, reflected at 0 and 1, where v_j is the rank of third-party image j of
   step 1 among those K; divided by its sum over j.

The weight of j is that of the forgotten relative to that of all members, a ratio of densities at j,

    w_j = (mean_{i forgotten} a_ij + s) / (mean_{i member} a_ij + s),     s = `SMOOTHING` / t,

so that a request which is a fair sample of the members draws all of the third party alike: images that are everybody's
neighbours get no more, and what training does to ranks cancels. w_j is at most the members per forgotten image.
"""

# Shapes: f, r, t = forgotten, retained, third-party images, E = embedding dim., K = neighbours.

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["NEIGHBOURS", "Look", "MatchedSampling", "counterpart_weights", "effective_number", "inclusion_shares"]

NEIGHBOURS = 50
WIDTH = 0.1  # of the kernel over ranks
SMOOTHING = 0.02  # of the mean of a_ij over all pairs: an image that is nobody's neighbour is drawn as all are
_ROWS = 1024  # members compared at a time: bounds memory


class Look(NamedTuple):
    """What the original encoder makes of n images: unit embeddings [n, E] and view agreements in [-1, 1], [n]."""

    direction: Tensor
    agreement: Tensor


class MatchedSampling:
    """`unlearn.third_party_sampling=matched`: which images are encoded for it, and how it weighs those of a feeder."""

    feeder = "third_party"
    roles = ("forget", "retain", "third_party")

    def weigh(self, looks: Mapping[str, Look]) -> tuple[Tensor, dict[str, float]]:
        """Weights of the images of `feeder` (see `counterpart_weights`), and figures, from the looks by role.

        Figures: "nearest" and "nearest_retained", the mean cosine of a forgotten and of a retained image to the
        third-party image most like it. Far below: the forgotten images have no counterparts.
        """
        forget, retain, third = (looks[role] for role in self.roles)
        figures = {"nearest": _nearest(forget, third), "nearest_retained": _nearest(retain, third)}
        return counterpart_weights(forget, retain, third), figures

    def text(self, facts: Mapping[str, float]) -> str:
        """One line for people. facts: figures of `weigh`; and "images" of an epoch, "available" and "effective"."""
        return (
            f"third-party images are drawn by how much they are like the forgotten ones: {facts['images']:.0f} of "
            f"{facts['available']:.0f} an epoch, which count as {facts['effective']:.0f} equally likely ones; nearest "
            f"cosine {facts['nearest']:.3f} (of retained images {facts['nearest_retained']:.3f})"
        )


def _nearest(members: Look, third: Look) -> float:
    """Mean over the images of the cosine to the third-party image that is most like it."""
    best = [part @ third.direction.mT for part in members.direction.split(1024)]
    return float(torch.cat([part.max(1).values for part in best]).mean())


def counterpart_weights(forget: Look, retain: Look, third: Look, neighbours: int = NEIGHBOURS) -> Tensor:
    """Weights of the third-party images, float64 [t] on the CPU, above 0, adding up to 1; see the module's text.

    Args:
        forget, retain, third: at least one image each. Fewer than `neighbours` of a kind: all of them.
    """
    forgotten = _counterparts(forget, retain, third, neighbours)
    retained = _counterparts(retain, retain, third, neighbours, itself=True)
    count_f, count_r = len(forget.agreement), len(retain.agreement)
    members = (count_f * forgotten + count_r * retained) / (count_f + count_r)
    floor = SMOOTHING / len(third.agreement)
    weights = (forgotten + floor) / (members + floor)
    return weights / weights.sum()


def _counterparts(members: Look, retain: Look, third: Look, neighbours: int, itself: bool = False) -> Tensor:
    """Mean over the members of a_ij, float64 [t]. itself: members and retained images are the same, row by row."""
    few = min(neighbours, len(retain.agreement) - itself)
    many = min(neighbours, len(third.agreement))
    weights = torch.zeros(len(third.agreement), dtype=torch.float64)
    for start in range(0, len(members.agreement), _ROWS):
        rows = slice(start, start + _ROWS)
        direction, agreement = members.direction[rows], members.agreement[rows, None]
        cosines = direction @ retain.direction.mT
        if itself:
            cosines.diagonal(start).fill_(-math.inf)
        known = retain.agreement[cosines.topk(few).indices]
        below = (known < agreement).sum(1) + 0.5 * (known == agreement).sum(1)
        rank = (below.double() + 0.5) / (few + 1)
        near = (direction @ third.direction.mT).topk(many).indices
        places = third.agreement[near].argsort(dim=1, stable=True).argsort(dim=1)
        found = _kernel((places.double() + 0.5) / many, rank[:, None])
        weights.index_add_(0, near.flatten().cpu(), (found / found.sum(1, keepdim=True)).flatten().cpu())
    return weights / len(members.agreement)


def _kernel(v: Tensor, u: Tensor) -> Tensor:
    """Gaussian of width WIDTH in v - u on [0, 1], what would lie outside reflected at the ends."""
    return sum(torch.exp(-0.5 * ((v - centre) / WIDTH) ** 2) for centre in (u, -u, 2 - u))


def inclusion_shares(weights: Tensor) -> Tensor:
    """In which share of the epochs each image is to come, float64 [t] in [0, 1], in proportion to the weights.

    They add up to a whole number, the images of an epoch: as many as there can be without one coming twice, and at
    least one.
    """
    images = max(1, math.floor(float(weights.sum() / weights.max()) + 1e-9))
    return (weights / weights.sum() * images).clamp(max=1.0)


def effective_number(weights: Tensor) -> float:
    """As how many equally weighted images the weighted ones count (Kish, Survey Sampling, 1965): in [1, t]."""
    return float(weights.sum() ** 2 / weights.square().sum())
