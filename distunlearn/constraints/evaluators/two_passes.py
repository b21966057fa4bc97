"""What `sketch` and `ghost_norm` share: a first pass that measures gradients, and a second one with signed copies.

The first pass is differentiated by itself, for what it measures of every sample's gradient. The second shows every
forgotten image with +e and with -e added, and the difference of both losses has the gradient that Phi needs.

Phi does not move third-party images, so they need no copies: only a graph, for the terms on their outputs. That of the
first pass will do, and saves them a second forward. It is kept where the same weights are still in place at the step's
backward (`once`); elsewhere third-party images come along in the second pass.

Shapes: n forgotten and m third-party images of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import Tensor

from distunlearn.constraints.evaluators.base import (
    Constrained,
    mean_loss,
    reuse_targets,
    shared,
    signed_copies,
    views_by_pair,
    without_graph,
)
from distunlearn.data.schedule import Batch, concat_batches
from distunlearn.objectives.base import Branches
from distunlearn.objectives.forward import Context, embed
from distunlearn.objectives.memory_bank import Bank


class Measured(NamedTuple):
    """What a first pass gives: values [n, ...] by sample, what else the evaluator keeps, branches by pair of views."""

    values: Tensor
    kept: Any
    pairs: list[Branches]


# measure(batch, views by pair, lasting) -> Measured; lasting: third-party images alone, whose graph is needed again
Measure = Callable[[Batch, list[list[Tensor]], bool], Measured]


class FirstPass(NamedTuple):
    """own [n, ...], others [m, ...]: values of forgotten and third-party images. kept: see `Measured`, of the former.

    count: n. shown, viewed, seen: what the second pass shows, forgotten images first: the images, their views and
        their branches in the first pass (without graph), by pair. strangers: third-party branches with graph, if they
        are not among what is shown.
    """

    own: Tensor
    others: Tensor
    kept: Any
    count: int  # type: ignore[assignment]
    shown: Batch
    viewed: list[list[Tensor]]
    seen: list[Branches]
    strangers: list[Branches] | None


def first_pass(ctx: Context, forget: Batch, third: Batch, measure: Measure, once: bool) -> FirstPass:
    """Measure forgotten and third-party images, in one pass, or in two of which the second one's graph is kept.

    once: third-party images go through the encoder once a step, see `Evaluator.shown_once`.
    """
    both, count = concat_batches(forget, third), len(forget)
    viewed = views_by_pair(ctx, both)
    if not once:
        found = measure(both, viewed, False)
        seen = [without_graph(b) for b in found.pairs]
        return FirstPass(found.values[:count], found.values[count:], found.kept, count, both, viewed, seen, None)
    apart = [[[view[rows] for view in pair] for pair in viewed] for rows in (slice(count), slice(count, None))]
    own = measure(forget, apart[0], False)
    seen = [without_graph(b) for b in own.pairs]
    own = own._replace(pairs=[])  # their graph may go before the next one is made
    others = measure(third, apart[1], True)
    return FirstPass(own.values, others.values, own.kept, count, forget, apart[0], seen, others.pairs)


def second_pass(
    ctx: Context,
    first: FirstPass,
    bank: Bank | None,
    added: Callable[[Tensor, tuple[float, ...]], AbstractContextManager[None]],
    network: Callable | None = None,
) -> tuple[Tensor, list[Branches], list[Branches]]:
    """l_i(+) - l_i(-) of the forgotten images [n], the branches of both copies by pair, and third-party branches.

    added(copies, signs): within it forwards of one branch's rows, samples `copies` with these signs, add what is to be
        added (see `signed_copies`; a third-party sample has sign 0).
    """
    count = first.count
    copies, signs = signed_copies(count, len(first.shown), ctx.device)
    with added(copies, signs), shared(ctx, count, len(copies)):
        pairs = [
            embed(ctx, first.shown, batchnorm="eval", views=views, copies=copies, network=network, momentum=False)
            for views in first.viewed
        ]
    pairs = [reuse_targets(b, seen, copies) for b, seen in zip(pairs, first.seen, strict=True)]
    plus, minus = ([b.part(part) for b in pairs] for part in (slice(count), slice(count, 2 * count)))
    strangers = first.strangers
    if strangers is None:
        strangers = [b.part(slice(2 * count, None)) for b in pairs]
    return mean_loss(ctx, plus, bank) - mean_loss(ctx, minus, bank), plus + minus, strangers


def constrained(
    phi: Tensor, goal: Tensor, pulls: Tensor, both: list[Branches], strangers: list[Branches], metrics: dict[str, float]
) -> Constrained:
    """The term has the value of `goal` and the gradient of the sum of `pulls`, which are of this rank's samples."""
    pull = pulls.sum()
    return Constrained(phi, pull + (goal - pull).detach(), both, strangers, metrics, [b.output for b in both])
