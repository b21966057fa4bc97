"""What an objective takes and gives, so that methods, constraints and audits need not know which it is.

Shapes: V = online branches, n = images of this rank, D = output dim, Hd = hidden dim, K = bank rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from distunlearn.config.registry import OBJECTIVE, find
from distunlearn.config.schema import ObjectiveConfig, PositiveFloat, PositiveInt, RunConfig
from distunlearn.distributed.collectives import gather_sizes, mean_scale
from distunlearn.objectives.memory_bank import (
    Bank,
    bank_delta,
    bank_density,
    bank_infonce,
    confidence,
    normalise,
    pair_logits,
)


class Branches(NamedTuple):
    """Everything an objective needs of one batch, by online branch.

    output: [V, n, D] raw results of the head's last linear layer (not normalised), with graph.
    hidden: [V, n, Hd] inputs of that layer, for per-sample gradients delta h^T.
    target: [V, n, D] raw momentum projections; row v is the one that branch v predicts (the *other* view).
        None for objectives without a momentum encoder.
    labels: int64 [n] classes, or None. ids: int64 [n] id hashes, or None (then nothing is masked by id).
    embedding, target_embedding: [V, n, E] of the backbones behind output and target, or None; no objective reads them.
    sizes: images of every rank, where the schedule knows them.
    gathered: `Objective.bank_keys` of all ranks, [N * V, D], where they are gathered already.
    """

    output: Tensor
    hidden: Tensor
    target: Tensor | None = None
    labels: Tensor | None = None
    ids: Tensor | None = None
    embedding: Tensor | None = None
    target_embedding: Tensor | None = None
    sizes: tuple[int, ...] | None = None
    gathered: Tensor | None = None

    @property
    def shares(self) -> list[int]:
        """Images of every rank; a collective call where the schedule does not know them."""
        return gather_sizes(self.num_samples, self.output.device, self.sizes)

    @property
    def num_samples(self) -> int:
        """Images of this rank, n."""
        return self.output.shape[1]

    def part(self, which: slice | Tensor) -> Branches:
        """The same branches for some of the images: a slice, or an index or mask tensor over n."""
        by_branch = ("output", "hidden", "target", "embedding", "target_embedding")
        return Branches(
            **{  # type: ignore[arg-type]
                name: None if value is None else value[:, which] if name in by_branch else value[which]
                for name, value in self._replace(sizes=None, gathered=None)._asdict().items()
            }
        )


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig(ObjectiveConfig):
    """Settings of objectives that compare projections of images."""

    temperature: PositiveFloat = 0.2  # of the contrastive softmax and of the bank loss
    hidden_dim: PositiveInt = 128  # width of projector and predictor
    output_dim: PositiveInt = 64  # width of the projection that losses compare
    head_layers: Annotated[int, Field(ge=2)] = 2  # linear layers of the projector; the predictor has 2
    head_norm: bool = True  # a BatchNorm after each but the last; MoCo v2 has none
    similarity_mib: PositiveFloat = 1024.0  # for one copy of a process's similarities; above it tile by tile, exactly


@dataclass(frozen=True, kw_only=True)
class MomentumConfig(ContrastiveConfig):
    """Settings of objectives with a momentum encoder."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99  # of the momentum encoder, per step


class Objective(ABC):
    """One training objective and the per-sample quantities that forgetting compares, with all that is its own.

    The per-sample functions depend on one image, the bank and the weights, never on batch-mates, and
    need no communication. `task_loss` may communicate: all ranks call it together.

    Attributes of the class:
        name: as in `objective.name`.
        Config: settings, a frozen dataclass derived from `ObjectiveConfig` whose `name` has the objective's name as
            default; from `ContrastiveConfig` where the head is a projector.
        summary: what it is, in a few words.
        head: a projector of `hidden_dim` and `output_dim`, or a linear classifier over the classes of the members.
        predictor: whether a predictor follows the projector.
        needs_momentum: Branches.target comes from a momentum encoder.
        compares_views: the loss of an image compares its views with one another.
        uses_bank: the per-sample functions need a bank.
        uses_queue: that bank is a KeyQueue of `queue_size` keys, else the retain keys of the step.
        uses_labels: the loss needs labels.
        views: random views drawn per image. branches: V, online branches.
    """

    name: ClassVar[str]
    Config: ClassVar[type[ObjectiveConfig]]
    summary: ClassVar[str]
    head: ClassVar[Literal["projector", "classifier"]] = "projector"
    predictor: ClassVar[bool] = False
    needs_momentum: ClassVar[bool] = False
    compares_views: ClassVar[bool] = True
    uses_bank: ClassVar[bool] = True
    uses_queue: ClassVar[bool] = False
    uses_labels: ClassVar[bool] = False
    views: ClassVar[int] = 2
    branches: ClassVar[int] = 2
    temperature: float  # of objectives with `ContrastiveConfig`

    def __init__(self, settings: ObjectiveConfig) -> None:
        self.settings = settings

    @classmethod
    def problems(cls, cfg: RunConfig) -> Iterator[str]:
        """Reasons why it cannot be used with these settings, one sentence each, naming the keys."""
        return iter(())

    def task_loss(self, b: Branches, bank: Bank | None = None) -> Tensor:
        """Training loss of this rank: the mean over ranks is the loss of the global batch, in value and gradient.

        bank: of an objective with a queue `KeyQueue.bank(temperature)`, else not used. Collective.
        """
        losses = self.row_losses(b, bank)
        return losses.sum() * mean_scale(b.shares)

    @abstractmethod
    def row_losses(self, b: Branches, bank: Bank | None = None) -> Tensor:
        """What `task_loss` averages over the images of the global batch, image by image, [n].

        Unlike `per_sample_loss` it may depend on batch-mates; all ranks call it together.
        """

    @abstractmethod
    def bank_keys(self, b: Branches) -> tuple[Tensor, Tensor] | None:
        """Normalised, detached keys [m, D] of these (retain) images and their ids [m]; None without a bank.

        Image by image, so that `Bank.gather` over any number of ranks gives one order.
        """

    @abstractmethod
    def per_sample_loss(self, b: Branches, bank: Bank | None) -> Tensor:
        """l_i, [n]."""

    @abstractmethod
    def per_sample_delta(self, b: Branches, bank: Bank | None) -> Tensor:
        """Exact d l_i / d output[v, i] in closed form, [V, n, D], itself differentiable in the outputs."""

    @abstractmethod
    def confidence(self, b: Branches, bank: Bank | None) -> Tensor:
        """c_i in (0, 1], [n]: how surely the sample's partner (or class) is told from all others."""

    @abstractmethod
    def logits(self, b: Branches, bank: Bank | None) -> Tensor:
        """[V, n, 1 + K] (-inf where masked) or [V, n, classes]: what the confidence is the softmax of.

        Always the whole matrix, whatever the budget.
        """

    @abstractmethod
    def output_features(self, b: Branches, bank: Bank | None) -> Tensor:
        """Agreement between the views and closeness to the bank (or certainty), [n, 2], for output alignment."""


class Contrastive(Objective):
    """What objectives with `ContrastiveConfig` share. temperature: tau > 0. budget: bytes that one copy of the
    similarities may take; above it they are computed tile by tile.
    """

    settings: ContrastiveConfig

    def __init__(self, settings: ContrastiveConfig) -> None:
        super().__init__(settings)
        assert settings.temperature > 0, "the temperature is positive"
        self.temperature, self.budget = settings.temperature, max(1, round(settings.similarity_mib * 2**20))


def objective_class(cfg: RunConfig) -> type[Objective]:
    """The objective that the settings name."""
    return find(OBJECTIVE, cfg.objective.name)


def paired_keys(vectors: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """[V, n, D] raw vectors -> detached keys [n * V, D] and ids [n * V], image by image."""
    assert ids is not None, "bank keys need the ids of their images"
    keys = normalise(vectors.detach()).transpose(0, 1).flatten(0, 1)
    return keys, ids.repeat_interleave(vectors.shape[0])


class MomentumObjective(Contrastive):
    """Per-sample part shared by objectives whose partner is a stop-gradient momentum key (MoCo, MoCo v3, BYOL).

    l_i is the mean over the V branches of the bank formula with u_b = normalised target, constant; so
    d l_i / d z_v is the closed form of branch v divided by V.
    """

    needs_momentum = True

    def _pair(self, b: Branches) -> tuple[Tensor, Tensor]:
        """Online raw outputs and normalised, detached partners, both [V, n, D]."""
        assert b.target is not None and b.target.shape == b.output.shape, "one momentum target per online output"
        assert b.output.shape[0] == self.branches, f"{self.name} has {self.branches} online branches"
        return b.output, normalise(b.target.detach())

    def bank_keys(self, b: Branches) -> tuple[Tensor, Tensor]:
        """Normalised momentum keys [n * V, D] and ids [n * V]."""
        assert b.target is not None, "bank keys are momentum keys"
        return paired_keys(b.target, b.ids)

    def per_sample_loss(self, b: Branches, bank: Bank) -> Tensor:
        """l_i, [n]."""
        z, key = self._pair(b)
        return bank_infonce(normalise(z), key, bank, b.ids, self.budget).mean(0)

    def per_sample_delta(self, b: Branches, bank: Bank) -> Tensor:
        """d l_i / d output, [V, n, D]."""
        z, key = self._pair(b)
        return bank_delta(z, key, bank, b.ids, self.budget) / self.branches

    def confidence(self, b: Branches, bank: Bank) -> Tensor:
        """c_i, [n]."""
        z, key = self._pair(b)
        return confidence(normalise(z), key, bank, b.ids, self.budget).mean(0)

    def logits(self, b: Branches, bank: Bank) -> Tensor:
        """Query side [s0, u.Q / tau], [V, n, 1 + K]."""
        z, key = self._pair(b)
        return pair_logits(normalise(z), key, bank, b.ids)

    def output_features(self, b: Branches, bank: Bank) -> Tensor:
        """(u . key, soft maximum of u . Q), both cosines averaged over branches, [n, 2]."""
        z, key = self._pair(b)
        u = normalise(z)
        return torch.stack([(u * key).sum(-1).mean(0), bank_density(u, bank, b.ids, self.budget).mean(0)], dim=-1)
