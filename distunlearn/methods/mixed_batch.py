"""Retain and forget images in one batch, as methods need them that weigh the rows of one contrastive loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distunlearn.data.schedule import Batch, concat_batches, random_words
from distunlearn.distributed.collectives import (
    all_gather_detached,
    all_gather_with_grad,
    gather_sizes,
)
from distunlearn.objectives.base import Branches
from distunlearn.objectives.forward import Context, embed


def mixed_branches(ctx: Context, retain: Batch, forget: Batch) -> Branches:
    """Both batches in one forward with batch statistics: this rank's retain rows first, then its forget rows."""
    return embed(ctx, concat_batches(retain, forget), batchnorm="train")


def row_losses(ctx: Context, branches: Branches) -> Tensor:
    """The rows of the utility loss, [n]; MoCo v2: against the queue, which holds no key of an image to forget."""
    queue = None if ctx.queue is None else ctx.queue.bank(ctx.objective.temperature)
    return ctx.objective.row_losses(branches, queue)


def with_other_partners(ctx: Context, branches: Branches, first: int, known: Sequence[int] | None = None) -> Branches:
    """The same rows, but those from `first` on have another of these images' second view as their partner.

    Row i of the F rows of all ranks gets the partner of row (i + s) mod F; s is drawn from 1 .. F - 1 for every loss
    anew, so that every other image is equally likely and none is its own partner. known: those rows of every rank.
    """
    count = branches.num_samples - first
    sizes = gather_sizes(count, branches.output.device, known)
    total, mine = sum(sizes), sum(sizes[: ctx.rank])
    if total < 2:
        return branches
    shift = 1 + int(random_words(1, ctx.cfg.seed, "partner", ctx.draw)[0] % (total - 1))
    rows = (torch.arange(count, device=branches.output.device) + mine + shift) % total

    def exchanged(part: Tensor, gather) -> Tensor:
        """[V, n, D] with the rows from `first` on replaced."""
        everyone = gather(part[:, first:].transpose(0, 1).contiguous(), sizes)
        return torch.cat([part[:, :first], everyone[rows].transpose(0, 1)], dim=1)

    if branches.target is not None:
        return branches._replace(target=exchanged(branches.target, all_gather_detached))
    return branches._replace(
        output=torch.cat([branches.output[:1], exchanged(branches.output[1:], all_gather_with_grad)])
    )
