"""SimCLR: NT-Xent over the global batch.

Source: Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual
Representations", ICML 2020, eq. 1 and algorithm 1. With u = z / |z|, N images, 2N embeddings:

    l(i, j) = -log [ exp(u_i.u_j / tau) / sum_{k != i} exp(u_i.u_k / tau) ]
    loss = 1 / 2N * sum over the N images of l(a, b) + l(b, a)

Per-sample loss: the bank formula (`bank.py`) with both views online, so that both branches carry a
gradient: d l_i / d z_a = bank_delta(z_a, u_b) and d l_i / d z_b = bank_delta(z_b, u_a).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distunlearn.distributed.collectives import gather_sizes, get_rank, mean_scale
from distunlearn.objectives.base import Branches, Contrastive, ContrastiveConfig, paired_keys
from distunlearn.objectives.infonce import Form, infonce
from distunlearn.objectives.memory_bank import (
    Bank,
    bank_delta,
    bank_density,
    bank_infonce,
    confidence,
    normalise,
    pair_logits,
)
from distunlearn.objectives.tiled_softmax import DEFAULT_BUDGET, Columns


def nt_xent(
    output: Tensor,
    temperature: float | Tensor,
    budget: int = DEFAULT_BUDGET,
    form: Form | None = None,
    sizes: Sequence[int] | None = None,
    everyone: Tensor | None = None,
) -> Tensor:
    """NT-Xent of this rank's pairs [2, n, D] (raw) against the global batch; a scalar.

    The mean over ranks is the loss of the global batch, in value and gradient. A collective call. sizes: n of every
    rank, if it is known. everyone: normalised pairs of all ranks, [2N, D], if they are gathered. Others: see `infonce`.
    """
    sizes = gather_sizes(output.shape[1], output.device, sizes)
    losses = _pair_losses(output, temperature, budget, sizes, form, everyone)
    return losses.sum() * mean_scale(sizes) / 2


def _pair_losses(
    output: Tensor,
    temperature: float | Tensor,
    budget: int,
    sizes: Sequence[int],
    form: Form | None = None,
    everyone: Tensor | None = None,
) -> Tensor:
    """l(i, j) of this rank's 2n rows, image by image. sizes: n of every rank."""
    u = normalise(output).transpose(0, 1)  # [n, 2, D]: image by image, so rows 2i and 2i + 1 are a pair
    mine = u.flatten(0, 1)  # [2n, D]
    own = torch.arange(mine.shape[0], device=u.device) + 2 * sum(sizes[: get_rank()])
    columns = Columns(positive=own ^ 1, own=own)  # k != i
    pairs = [2 * size for size in sizes]
    return infonce(mine, mine, columns, temperature, pairs, budget=budget, form=form, everyone=everyone)


@dataclass(frozen=True, kw_only=True)
class SimCLRConfig(ContrastiveConfig):
    """Temperature and projector."""

    name: str = "simclr"


class SimCLR(Contrastive):
    """Two online views, each other's partner."""

    name = "simclr"
    Config = SimCLRConfig
    summary = "SimCLR: two views against all other images of the batch"

    def _views(self, b: Branches) -> Tensor:
        assert b.output.shape[0] == 2, "simclr has 2 online branches"
        return normalise(b.output)

    def task_loss(self, b: Branches, bank: Bank | None = None) -> Tensor:
        """NT-Xent; the bank is not used."""
        assert b.output.shape[0] == 2, "simclr has 2 online branches"
        return nt_xent(b.output, self.temperature, self.budget, sizes=b.sizes, everyone=b.gathered)

    def row_losses(self, b: Branches, bank: Bank | None = None) -> Tensor:
        """(l(a, b) + l(b, a)) / 2 of every image, [n]; a collective call."""
        return _pair_losses(b.output, self.temperature, self.budget, b.shares).unflatten(0, (-1, 2)).mean(1)

    def bank_keys(self, b: Branches) -> tuple[Tensor, Tensor]:
        """Normalised, detached embeddings of both views [2n, D] and ids [2n], image by image."""
        return paired_keys(b.output, b.ids)

    def per_sample_loss(self, b: Branches, bank: Bank) -> Tensor:
        """l_i, [n]."""
        u = self._views(b)
        return bank_infonce(u[0], u[1], bank, b.ids, self.budget)

    def per_sample_delta(self, b: Branches, bank: Bank) -> Tensor:
        """d l_i / d output, [2, n, D]."""
        return bank_delta(b.output, self._views(b).flip(0), bank, b.ids, self.budget)

    def confidence(self, b: Branches, bank: Bank) -> Tensor:
        """c_i, [n]."""
        u = self._views(b)
        return confidence(u[0], u[1], bank, b.ids, self.budget)

    def logits(self, b: Branches, bank: Bank) -> Tensor:
        """[s0, u.Q / tau] of both views, [2, n, 1 + K]."""
        u = self._views(b)
        return pair_logits(u, u.flip(0), bank, b.ids)

    def output_features(self, b: Branches, bank: Bank) -> Tensor:
        """(u_a . u_b, soft maximum of u . Q averaged over the views), both cosines, [n, 2]."""
        u = self._views(b)
        return torch.stack([(u[0] * u[1]).sum(-1), bank_density(u, bank, b.ids, self.budget).mean(0)], dim=-1)
