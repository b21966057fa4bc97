"""InfoNCE of this rank's queries against the keys of all ranks, in three forms with one value and one gradient.

    l_i = log sum_k exp(u_i.q_k / tau) - u_i.q_{p(i)} / tau          (van den Oord et al. 2018, eq. 4)

k runs over the keys that `Columns` lets count (no self-comparison, by id, by role); p(i) is the partner's column.

| form | held by one rank of W | communication |
|---|---|---|
| plain | similarities [n, K], a few copies | keys gathered, gradients of keys summed |
| tiled | gathered keys [K, D], one tile | the same |
| ring | two blocks of keys and of key gradients, one tile | W - 1 hops of a block; backward: W more of its gradient |

A byte budget chooses: ring where the gathered keys alone exceed it, else tiled where the similarities do, else plain.
The tiled forms compute each similarity a second time in the backward pass and are exact, not approximations; their
sums are taken in another order, so that single digits at the end of a number may differ. They cannot be
differentiated twice (raises).

Shapes: n = this rank's queries, m = this rank's keys, K = keys of all ranks in rank order, D = dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from distunlearn.distributed.collectives import all_gather_detached, all_gather_with_grad
from distunlearn.objectives.memory_bank import full_precision
from distunlearn.objectives.tiled_softmax import DEFAULT_BUDGET, Columns, TiledInfoNCE, tile_size

Form = Literal["plain", "tiled", "ring"]


def choose_form(queries: Tensor, sizes: Sequence[int], budget: int) -> Form:
    """The form that keeps within `budget` bytes.

    queries: [..., n, D] of this rank. sizes: keys of every rank. Ranks may differ between plain and tiled, whose
    communication is the same; whether it is the ring depends on the sizes alone, so that all ranks agree.
    """
    dim, num_keys, itemsize = queries.shape[-1], sum(sizes), queries.element_size()
    leading = queries.shape[:-2].numel()
    if len(sizes) > 1 and leading * num_keys * dim * itemsize > budget:
        return "ring"
    return "tiled" if queries.shape[:-1].numel() * num_keys * itemsize > budget else "plain"


def infonce(
    queries: Tensor,
    keys: Tensor,
    columns: Columns,
    temperature: float | Tensor,
    sizes: Sequence[int],
    *,
    budget: int = DEFAULT_BUDGET,
    form: Form | None = None,
    everyone: Tensor | None = None,
) -> Tensor:
    """l_i of the module's formula for this rank's queries, [..., n]. A collective call, its backward too.

    `mean_scale` turns the sum of the ranks' losses into the global mean, whatever the shares are (see `gather`).

    Args:
        queries: [..., n, D], float32 or float64; n may be 0. keys: this rank's, [..., m, D], of the same dtype, with
            graph on all ranks or on none. Leading dimensions (views) are independent losses.
        columns: counted over all ranks' keys in rank order; `positive` is required.
        temperature: tau > 0; a scalar tensor may have a graph.
        sizes: m of every rank, as `gather_sizes` gives them.
        budget: bytes for one copy of the similarities, and for the gathered keys, >= 1.
        form: overrides the choice by `budget`, the same on all ranks; `budget` then only bounds the tile.
        everyone: the keys of all ranks, [..., K, D], without gradient, where they are gathered already.
    """
    assert columns.positive is not None, "every query has a partner among the keys"
    assert queries.dtype == keys.dtype, "queries and keys are of one dtype"
    form = form or choose_form(queries, sizes, budget)
    if form == "plain":
        return _plain(queries, _gathered(keys, sizes, everyone), columns, temperature)
    tile_bytes = tile_size(queries.device, budget)
    with full_precision(queries):
        scaled = queries / temperature
        shown, travelling = (keys, list(sizes)) if form == "ring" else (_gathered(keys, sizes, everyone), None)
        if queries.dim() == 2:
            return TiledInfoNCE.apply(scaled, shown, columns, travelling, tile_bytes)
        pairs = zip(scaled.flatten(0, -3), shown.flatten(0, -3), strict=True)
        losses = [TiledInfoNCE.apply(*pair, columns, travelling, tile_bytes) for pair in pairs]
        return torch.stack(losses).unflatten(0, queries.shape[:-2])


def _gathered(keys: Tensor, sizes: Sequence[int], everyone: Tensor | None) -> Tensor:
    """[..., m, D] of every rank -> [..., K, D]; the collective joins rows, so they come first on the way."""
    if keys.requires_grad:
        known = None if everyone is None else everyone.movedim(-2, 0)
        return all_gather_with_grad(keys.movedim(-2, 0).contiguous(), sizes, known).movedim(0, -2)
    return all_gather_detached(keys.movedim(-2, 0).contiguous(), sizes).movedim(0, -2) if everyone is None else everyone


def _plain(queries: Tensor, keys: Tensor, columns: Columns, temperature: float | Tensor) -> Tensor:
    with full_precision(queries):
        logits = (queries / temperature) @ keys.mT  # [..., n, K]; dividing the queries is a pass over less
    masked = columns.hidden(slice(0, queries.shape[-2]), slice(0, keys.shape[-2]))
    if masked is not None:
        logits = logits.masked_fill(masked, -torch.inf)
    shape = (*queries.shape[:-1], 1)
    if columns.own is not None:
        logits = logits.scatter(-1, columns.own.unsqueeze(-1).expand(shape), -torch.inf)
    rows = logits.shape[:-1]
    partners = columns.positive.expand(rows).flatten()
    return nn.functional.cross_entropy(logits.flatten(0, -2), partners, reduction="none").view(rows)
