"""Softmax over many keys without ever holding the matrix of similarities: one tile of it at a time.

For queries x (already divided by the temperature) and keys q, with s_ik = x_i.q_k:

    LSE_i = log sum_k exp s_ik,   merged over blocks A, B of keys as   m = max(m_A, m_B),
    sum = sum_A exp(m_A - m) + sum_B exp(m_B - m),   LSE = m + log sum

(the running softmax of Milakov and Gimelshein, arXiv 1805.02867, algorithm 3). A forward pass keeps LSE, one number a
query; the backward pass computes every tile again and turns it into probabilities, as FlashAttention does (Dao et al.,
arXiv 2205.14135, algorithm 4). That makes four products of a tile instead of the plain form's three; but a tile stays
in the cache, which more than pays on a CPU (benchmarks/results/2026-11-27-infonce.md).

`TiledInfoNCE` takes the keys as one block, or as W blocks that travel round a ring of ranks (the ring of Inf-CL,
Cheng et al., arXiv 2410.17243); its key gradients travel with them. `SoftmaxMean` is the bank's: constant
keys, and a derivative that can itself be differentiated once. Neither can be differentiated further (raises).

Shapes: n = queries, K = keys of all ranks, D = dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distunlearn.distributed.collectives import RingPass, get_rank

DEFAULT_BUDGET = 1 << 30  # bytes that one copy of the similarities of this rank's queries may take

TILE_BYTES = 4 << 20  # of one tile, at most: fits the caches of a CPU core
GPU_TILE_BYTES = 64 << 20  # fills a GPU: with tiles of 4 MiB it waits for the next launch most of the time


def tile_size(device: torch.device, budget: int) -> int:
    """The largest tile on this device, within the budget for one copy of the similarities."""
    return min(budget, GPU_TILE_BYTES if device.type == "cuda" else TILE_BYTES)


@dataclass(frozen=True, eq=False)
class Columns:
    """Which of the K keys each of n queries is compared with.

    positive: int64 [n], the column of the query's partner, which always counts; None where the partner is no key.
    own: int64 [n], a column that never counts (the query itself), or None.
    query_ids: int64 [n] and key_ids: int64 [K]: a key of the query's own id does not count. Both or neither.
    valid: bool [K]; keys that are False do not count. None: all do.
    """

    positive: Tensor | None
    own: Tensor | None = None
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None
    valid: Tensor | None = None

    def __post_init__(self) -> None:
        assert (self.query_ids is None) == (self.key_ids is None), "ids of queries and keys come together"

    def hidden(self, rows: slice, columns: slice) -> Tensor | None:
        """bool [rows, columns] (or [1, columns]), True where ids or validity leave a key out; None: nowhere."""
        masked = None if self.valid is None else ~self.valid[columns].unsqueeze(0)
        if self.key_ids is not None:
            same = self.query_ids[rows].unsqueeze(1) == self.key_ids[columns].unsqueeze(0)
            masked = same if masked is None else same | masked
        if masked is None or self.positive is None:
            return masked
        at, inside = _place(self.positive, rows, columns)
        masked = masked.expand(at.shape[0], -1).clone() if masked.shape[0] != at.shape[0] else masked
        return masked.scatter_(1, at, masked.gather(1, at) & ~inside)

    def hide(self, tile: Tensor, rows: slice, columns: slice) -> None:
        """-inf, in place, wherever a key does not count."""
        masked = self.hidden(rows, columns)
        if masked is not None:
            tile.masked_fill_(masked, -torch.inf)
        if self.own is not None:
            at, inside = _place(self.own, rows, columns)
            tile.scatter_(1, at, tile.gather(1, at).masked_fill_(inside, -torch.inf))


def _place(where: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
    """Columns of a tile that global columns `where` fall on, and whether they do; both [rows, 1].

    Others are clamped into the tile, so that a gather or scatter needs no look at the values (which would stop a GPU).
    """
    at = (where[rows] - columns.start).unsqueeze(1)
    width = columns.stop - columns.start
    return at.clamp(0, width - 1), (at >= 0) & (at < width)


def _spans(count: int, length: int) -> Iterator[slice]:
    return (slice(first, min(first + length, count)) for first in range(0, count, length))


class _Tiles:
    """Similarities tile by tile, as (rows, columns of the block, tile); one buffer, a tile is gone with the next."""

    def __init__(self, queries: Tensor, tile_bytes: int) -> None:
        self.queries = queries
        self.side = max(1, math.isqrt(tile_bytes // queries.element_size()))
        self.buffer = queries.new_empty(0)

    def of(self, keys: Tensor, first: int, columns: Columns) -> Iterator[tuple[slice, slice, Tensor]]:
        """Tiles against one block of keys whose first is column `first` of all keys."""
        for rows in _spans(self.queries.shape[0], self.side):
            for part in _spans(keys.shape[0], self.side):
                shape = rows.stop - rows.start, part.stop - part.start
                if self.buffer.numel() < shape[0] * shape[1]:
                    self.buffer = self.queries.new_empty(shape[0] * shape[1])
                tile = self.buffer[: shape[0] * shape[1]].view(shape)
                torch.mm(self.queries[rows], keys[part].T, out=tile)
                columns.hide(tile, rows, slice(first + part.start, first + part.stop))
                yield rows, part, tile


class _RunningSum:
    """LSE of every row, merged tile by tile, and on request the mean of the keys under the softmax."""

    def __init__(self, queries: Tensor, dim: int = 0) -> None:
        count = queries.shape[0]
        self.maximum = queries.new_full((count,), -torch.inf)
        self.total = queries.new_zeros(count)
        self.mean = queries.new_zeros(count, dim)  # not yet divided by the total

    def add(self, rows: slice, tile: Tensor, keys: Tensor | None = None) -> None:
        """Take in a tile, which is overwritten."""
        before = self.maximum[rows]
        after = torch.maximum(before, tile.amax(1))
        finite = after.masked_fill(after == -torch.inf, 0)  # a row with nothing in it yet: exp(-inf - 0) = 0
        shrink = (before - finite).exp_()
        tile.sub_(finite.unsqueeze(1)).exp_()
        self.total[rows] = self.total[rows].mul_(shrink).add_(tile.sum(1))
        self.maximum[rows] = after
        if keys is not None:
            self.mean[rows] = self.mean[rows].mul_(shrink.unsqueeze(1)).addmm_(tile, keys)

    def result(self) -> tuple[Tensor, Tensor]:
        """LSE [n], -inf where no key counts, and the mean [n, dim], 0 there."""
        empty = self.total == 0
        log_total = self.total.masked_fill(empty, 1).log_().masked_fill_(empty, 0)
        return self.maximum + log_total, self.mean / self.total.masked_fill(empty, 1).unsqueeze(1)


def _ring(keys: Tensor, sizes: Sequence[int] | None) -> Iterator[tuple[int, Tensor]]:
    """(first column, block) of every block of keys: this rank's, then what comes round. sizes None: one block, all."""
    if sizes is None:
        yield 0, keys
        return
    world, rank, block = len(sizes), get_rank(), keys
    for hop in range(world):
        # Under way while the caller computes with the block in hand.
        coming = RingPass(block, sizes[(rank - hop - 1) % world]) if hop < world - 1 else None
        yield sum(sizes[: (rank - hop) % world]), block
        if coming is not None:
            block = coming.wait()


class TiledInfoNCE(torch.autograd.Function):
    """LSE_i - s_{i, positive}, [n], of queries against all keys.

    Arguments: queries [n, D] over the temperature; keys [K, D], or with `sizes` (keys of every rank) this rank's
    [m, D], a collective call in forward and backward; columns; sizes; tile_bytes.
    """

    @staticmethod
    def forward(
        ctx, queries: Tensor, keys: Tensor, columns: Columns, sizes: Sequence[int] | None, tile_bytes: int
    ) -> Tensor:
        sums, tiles = _RunningSum(queries), _Tiles(queries, tile_bytes)
        positive = queries.new_zeros(queries.shape[0])
        for first, block in _ring(keys, sizes):
            for rows, part, tile in tiles.of(block, first, columns):
                at, inside = _place(columns.positive, rows, slice(first + part.start, first + part.stop))
                found = tile.gather(1, at)
                positive[rows] = torch.where(inside, found, positive[rows].unsqueeze(1)).squeeze(1)
                sums.add(rows, tile)
        lse, _ = sums.result()
        ctx.save_for_backward(queries, keys, lse)
        ctx.columns, ctx.sizes, ctx.tile_bytes = columns, sizes, tile_bytes
        return lse - positive

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, lse = ctx.saved_tensors
        needs_keys = ctx.needs_input_grad[1]
        sizes, tiles = ctx.sizes, _Tiles(queries, ctx.tile_bytes)
        grad_queries = torch.zeros_like(queries)
        grad_keys = torch.zeros_like(keys) if needs_keys else None
        for hop, (first, block) in enumerate(_ring(keys, sizes)):
            for rows, part, tile in tiles.of(block, first, ctx.columns):
                tile.sub_(lse[rows].unsqueeze(1)).exp_().mul_(grad[rows].unsqueeze(1))
                at, inside = _place(ctx.columns.positive, rows, slice(first + part.start, first + part.stop))
                tile.scatter_add_(1, at, -grad[rows].unsqueeze(1) * inside)
                grad_queries[rows].addmm_(tile, block[part])
                if needs_keys:
                    grad_keys[part].addmm_(tile.T, queries[rows])
            if needs_keys and sizes is not None and len(sizes) > 1:
                # The gradient follows its block; after the last hop it is home.
                grad_keys = RingPass(grad_keys, sizes[(get_rank() - hop - 1) % len(sizes)]).wait()
        return grad_queries, grad_keys, None, None, None


class SoftmaxMean(torch.autograd.Function):
    """LSE [n] (-inf where no key counts) and mean sum_k p_ik q_k [n, D] (0 there) over constant keys.

    d LSE_i / d x_i is that mean, so a loss made of both outputs is differentiated without another pass, and its
    derivative (a function of the mean) with one: the softmax covariance of the keys.
    Arguments: queries [n, D] over the temperature; keys [K, D] without gradient; columns without positive; tile_bytes.
    """

    @staticmethod
    def forward(ctx, queries: Tensor, keys: Tensor, columns: Columns, tile_bytes: int) -> tuple[Tensor, Tensor]:
        sums, tiles = _RunningSum(queries, keys.shape[1]), _Tiles(queries, tile_bytes)
        for rows, part, tile in tiles.of(keys, 0, columns):
            sums.add(rows, tile, keys[part])
        lse, mean = sums.result()
        ctx.save_for_backward(queries, keys, lse, mean)
        ctx.columns, ctx.tile_bytes = columns, tile_bytes
        ctx.set_materialize_grads(False)
        return lse, mean

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_lse: Tensor | None, grad_mean: Tensor | None) -> tuple[Tensor | None, ...]:
        queries, keys, lse, mean = ctx.saved_tensors
        grad = torch.zeros_like(queries)
        if grad_lse is not None:
            grad.addcmul_(grad_lse.unsqueeze(1), mean)
        if grad_mean is not None:
            finite = lse.masked_fill(lse == -torch.inf, 0)  # exp(-inf - 0) = 0 in every column
            for rows, part, tile in _Tiles(queries, ctx.tile_bytes).of(keys, 0, ctx.columns):
                tile.sub_(finite[rows].unsqueeze(1)).exp_()
                tile.mul_(grad_mean[rows] @ keys[part].T)
                grad[rows].addmm_(tile, keys[part])
            grad -= mean * (mean * grad_mean).sum(1, keepdim=True)
        return grad, None, None, None
