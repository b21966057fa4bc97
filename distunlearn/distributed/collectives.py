"""Collectives over the ranks, and the only place where gradients cross them.

Scaling rule (Chen et al. 2020, "A Simple Framework for Contrastive Learning", section 2.1 gathers
the whole batch; the scaling is ours and tested): every backend *averages* parameter gradients over
the W ranks. A loss over the global batch therefore has to be written, on each rank, as

    local loss = W / N * sum over this rank's own terms          (N: terms of the global batch)

with the other ranks' embeddings gathered by `all_gather_with_grad`, whose backward *sums* over the
ranks what each of them asks of a slice. The mean over the ranks of the local losses is then the
global loss, and the mean of their gradients its gradient, whatever W is and however uneven the
shares are. A backward that averages, or one without communication, is wrong by factors around 1/W.

Without an initialised process group, or in a world of 1, every function is the identity.
Shapes: W = world, n = this rank's rows (may be 0), N = rows of all ranks in rank order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from distunlearn.errors import RankLostError

# torch 2.14 renames the function and warns at every use of the old name.
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _everyones(x: Tensor) -> Tensor:
    """[W, *x.shape]: the x of all ranks, of one shape."""
    gathered = x.new_empty(get_world() * x.numel())
    _all_gather_flat(gathered, x.contiguous().view(-1))
    return gathered.view(-1, *x.shape)


def get_world() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def get_rank() -> int:
    """This rank in 0 .. world - 1; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_sizes(count: int, device: torch.device, known: Sequence[int] | None = None) -> list[int]:
    """Rows held by every rank, in rank order; `count` is this rank's.

    known: what the schedule says they are: then no rank asks the others, which would wait for the host. None: a
        collective call.

    Raises:
        RankLostError: this rank holds another number of rows than the schedule says, so that every mean were wrong.
    """
    world = get_world()
    if known is not None:
        if len(known) != world or known[get_rank()] != count:
            raise RankLostError(
                f"rank {get_rank()} holds {count} rows of a batch whose shares are {list(known)[:8]} by the schedule; "
                "start the run again from the last checkpoint."
            )
        return list(known)
    if world == 1:
        return [count]
    return _everyones(torch.tensor(count, dtype=torch.int64, device=device)).tolist()


def mean_scale(sizes: Sequence[int]) -> float:
    """W / N: what a sum over this rank's samples is multiplied by to stand for a global mean.

    The mean over ranks of (scale * local sum) is the mean over all samples, for uneven shares too.
    """
    total = sum(sizes)
    assert total > 0, "a mean over an empty global batch was asked for"
    return len(sizes) / total


def _concatenate(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """[n, ...] of every rank -> [N, ...] in rank order. Short ranks are padded for the transport only."""
    largest = max(sizes)
    if largest == 0:
        return x.clone()
    padded = x.contiguous()
    if x.shape[0] < largest:
        padded = torch.cat([padded, padded.new_zeros(largest - x.shape[0], *x.shape[1:])])
    gathered = _everyones(padded)
    if all(size == largest for size in sizes):
        return gathered.flatten(0, 1)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


class _AllGather(torch.autograd.Function):
    """Forward: concatenation over ranks. Backward: sum over ranks of the gradient of the own slice.

    The backward is a reduce-scatter, or with uneven shares an all-reduce of [N, ...].
    Not differentiable twice (raises), for the collective would have to be, too.
    """

    @staticmethod
    def forward(ctx, x: Tensor, sizes: Sequence[int], rank: int, everyone: Tensor | None) -> Tensor:
        ctx.sizes, ctx.rank = sizes, rank
        return _concatenate(x, sizes) if everyone is None else everyone.view_as(everyone)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        sizes, rank = ctx.sizes, ctx.rank
        if len(set(sizes)) == 1:
            own = grad.new_empty(sizes[rank], *grad.shape[1:])
            _reduce_scatter_flat(own, grad.contiguous())
        else:
            start = sum(sizes[:rank])
            own = sum_over_ranks(grad)[start : start + sizes[rank]]
        return own, None, None, None


def all_gather_with_grad(x: Tensor, sizes: Sequence[int] | None = None, everyone: Tensor | None = None) -> Tensor:
    """Rows of all ranks, [n, ...] -> [N, ...], with gradients flowing back to every rank.

    sizes: rows per rank as `gather_sizes` returns them; None promises that all ranks hold n rows.
    everyone: those rows without gradient, where they are gathered already; they are not gathered again.
    All ranks must run the backward of the result, in the same order.
    """
    world = get_world()
    if world == 1:
        return x
    return _AllGather.apply(x, list(sizes or [x.shape[0]] * world), get_rank(), everyone)


def all_gather_detached(x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """Rows of all ranks, [n, ...] -> [N, ...], without gradient. sizes as in `all_gather_with_grad`."""
    world = get_world()
    if world == 1:
        return x.detach()
    return _concatenate(x.detach(), list(sizes or [x.shape[0]] * world))


def all_gather_uneven(x: Tensor, known: Sequence[int] | None = None) -> Tensor:
    """Rows of all ranks, [n, ...] -> [N, ...], without gradient, n may differ by rank (0 included).

    known: see `gather_sizes`.
    """
    return all_gather_detached(x, gather_sizes(x.shape[0], x.device, known))


def gather_ids(ids: Tensor, known: Sequence[int] | None = None) -> Tensor:
    """int64 id hashes of all ranks, [n] -> [N] in rank order; n may differ by rank. known: see `gather_sizes`."""
    assert ids.dtype == torch.int64 and ids.dim() == 1, "ids are a vector of int64 hashes"
    return all_gather_uneven(ids, known)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum over the ranks of a tensor of one shape, without gradient, the same bits on all; x itself is left alone."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    if get_world() > 1:
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


def all_reduce_mean(x: Tensor) -> Tensor:
    """Mean over the ranks of a floating tensor of one shape, without gradient; x itself is left alone."""
    return sum_over_ranks(x) / get_world()


class RingPass:
    """A block under way to the next rank (rank + 1, round the ring), another one arriving from the previous.

    Starts at once and does not wait, so that a rank can compute with the block it still holds; do not write to that
    block before `wait`. All ranks pass in the same order. Nothing is sent where a block has no rows. No gradient.
    """

    def __init__(self, block: Tensor, incoming_rows: int) -> None:
        """block: [n, ...] to send. incoming_rows: n of the block that arrives, otherwise of the same shape."""
        world, rank = get_world(), get_rank()
        self.outgoing = block.detach().contiguous()  # kept until it is sent
        self.incoming = self.outgoing.new_empty(incoming_rows, *block.shape[1:])
        transfers = []
        if block.shape[0]:
            transfers.append(dist.P2POp(dist.isend, self.outgoing, (rank + 1) % world))
        if incoming_rows:
            transfers.append(dist.P2POp(dist.irecv, self.incoming, (rank - 1) % world))
        self.under_way = dist.batch_isend_irecv(transfers) if transfers else []

    def wait(self) -> Tensor:
        """The block that arrived, [incoming_rows, ...]."""
        for work in self.under_way:
            work.wait()
        return self.incoming
