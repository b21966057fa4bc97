"""What the watch, forget and retained images look like to an encoder: one pass of each, shared out over the ranks.

Images go round in pieces of fixed size, so that every image is seen in the same company on any number of ranks, and
every rank calls the encoder equally often, which sharded weights need. The features are cheap forms of what the audit
looks at, on views that neither a training nor the audit has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from distunlearn.common.random import STREAMS, VIEW_EPOCHS
from distunlearn.config.schema import RunConfig
from distunlearn.constraints.gradients.last_layer import head_gradients
from distunlearn.distributed.collectives import all_gather_detached
from distunlearn.encoders.model import ContrastiveModel, EncoderOutput, MomentumEncoder
from distunlearn.engine.session import Session
from distunlearn.errors import NumericsError
from distunlearn.methods.base import method_class
from distunlearn.objectives import make_objective
from distunlearn.objectives.base import Branches, Objective
from distunlearn.objectives.forward import EncoderView
from distunlearn.objectives.memory_bank import Bank, normalise

FEATURES = ("view_agreement", "embedding_agreement", "bank_loss", "gradient_norm_head")
ROLES = ("retain", "forget", "watch")
PIECE = 64  # images that go through an encoder together
KEPT_BYTES = 1 << 28  # of views kept between doses, by a process
EPOCH = VIEW_EPOCHS["dose"][0]


def dose_images(cfg: RunConfig, counts: Mapping[str, int]) -> int:
    """Images through an encoder to choose the dose, on one process; 0 where the dose is given. counts: by role."""
    if cfg.method.dose != "auto" or not method_class(cfg).dosed(cfg):
        return 0
    return len(cfg.dose.grid) * _passes(cfg, {role: min(counts.get(role, 0), cfg.dose.images) for role in ROLES}, 1)


def _passes(cfg: RunConfig, counts: Mapping[str, int], world: int) -> int:
    """Images through an encoder for one look, over all ranks: momentum encoder and what fills up pieces included."""
    objective = make_objective(cfg.objective)
    targets = cfg.dose.views // 2 * objective.branches if objective.needs_momentum else 0
    return sum(_turns(count, world) for count in counts.values()) * PIECE * world * (cfg.dose.views + targets)


def _turns(count: int, world: int) -> int:
    """Pieces that each rank looks at."""
    return -(-count // (PIECE * world))


class Viewer:
    """The images of one run's dose, and their views, which are the same for every encoder.

    ids: by role, the same on every rank: at most `dose.images`, drawn by the seed, of those that can be decoded.
    passed: images through an encoder for one look, over all ranks.
    """

    def __init__(self, session: Session, roles: Sequence[str] = ROLES) -> None:
        """roles: those of ROLES, and others that measurements want to see beside them."""
        cfg, manifest = session.cfg, session.manifest
        self.session, self.objective = session, make_objective(cfg.objective)
        self.ids: dict[str, list[str]] = {}
        for number, role in enumerate(roles):
            ids = manifest.ids(role)
            if len(ids) > cfg.dose.images:
                generator = np.random.default_rng([cfg.seed, STREAMS["dose sample"], number])
                ids = [ids[i] for i in np.sort(generator.choice(len(ids), cfg.dose.images, replace=False))]
            self.ids[role] = session.store.decodable(ids)
        self.passed = _passes(cfg, {role: len(ids) for role, ids in self.ids.items()}, session.world.size)
        self._views: dict[tuple[str, ...], list[Tensor]] = {}
        self._kept = 0

    @torch.no_grad()
    def look(
        self, forward: Callable[[Tensor], EncoderOutput], momentum: MomentumEncoder | None
    ) -> dict[str, np.ndarray]:
        """By role float64 [n, F], a column for each of FEATURES; `chance`, the loss of an encoder that knows nothing;
        `right` [r]: 1 where most neighbours of a retained image have its class, NaN without a label. Collective.

        forward: the encoder in evaluation mode. momentum: on the device.

        Raises:
            NumericsError: a figure is not finite.
        """
        seen = {role: self._seen(role, forward, momentum) for role in self.ids}
        bank, chance = self._bank(seen["retain"])
        found = {}
        for role, parts in seen.items():
            rows = torch.cat([_features(self.objective, *part, bank) for part in parts])
            whole = _in_order(all_gather_detached(rows), len(self.ids[role]), self.session.world.size)
            if not torch.isfinite(whole).all():
                raise NumericsError(
                    f"the dose found {role} images whose outputs are not finite; lower the learning rate, or the doses "
                    "of dose.grid."
                )
            found[role] = whole.cpu().numpy()
        return {**found, "chance": np.array(chance), "right": self._neighbours(seen["retain"])}

    def _seen(
        self, role: str, forward: Callable[[Tensor], EncoderOutput], momentum: MomentumEncoder | None
    ) -> list[tuple[list[EncoderOutput], list[Branches]]]:
        """Outputs by view and branches by pair of this rank's pieces, all of PIECE images: the last is filled up."""
        world, ids = self.session.world, self.ids[role]
        parts = []
        for turn in range(_turns(len(ids), world.size)):
            number = turn * world.size + world.rank
            rows = np.arange(number * PIECE, (number + 1) * PIECE) % len(ids)
            parts.append(self._piece([ids[i] for i in rows], forward, momentum))
        return parts

    def _piece(
        self, ids: list[str], forward: Callable[[Tensor], EncoderOutput], momentum: MomentumEncoder | None
    ) -> tuple[list[EncoderOutput], list[Branches]]:
        cfg, device = self.session.cfg, self.session.backend.device
        network = cast("ContrastiveModel", self.session.backend.model)
        target = None if momentum is None else momentum.model
        encoder = EncoderView(network, target, self.objective, cfg.views, cfg.seed)
        views = self._views_of(encoder, ids)
        out = forward(torch.cat(views))
        outs = [EncoderOutput(*part) for part in zip(*(tensor.chunk(len(views)) for tensor in out), strict=True)]
        labels = torch.from_numpy(self.session.manifest.labels(ids)).to(device)
        if self.objective.uses_labels:  # an image without a class of the members: the encoder's own prediction
            foreign = (labels < 0) | (labels >= outs[0].output.shape[-1])
            labels = torch.where(foreign, outs[0].output.argmax(-1), labels)
        pairs = range(0, len(views), 2)
        branches = [encoder.branches(views[at : at + 2], ids, labels, outs[at : at + 2]) for at in pairs]
        return outs, branches

    def _views_of(self, encoder: EncoderView, ids: list[str]) -> list[Tensor]:
        key = tuple(ids)
        views = self._views.get(key)
        if views is None:
            views = encoder.views(ids, self.session.store.cut, EPOCH, self.session.cfg.dose.views)
            size = sum(view.nbytes for view in views)
            if self._kept + size <= KEPT_BYTES:
                self._views[key], self._kept = views, self._kept + size
        return views

    def _neighbours(self, parts: list[tuple[list[EncoderOutput], list[Branches]]]) -> np.ndarray:
        """Leave-one-out over the retained images, by the cosine of their embeddings' means over views, [r]."""
        ids, count = self.ids["retain"], self.session.cfg.audit.neighbours
        labels = torch.from_numpy(self.session.manifest.labels(ids)).to(self.session.backend.device)
        mean = torch.cat([torch.stack([normalise(out.embedding) for out in outs]).mean(0) for outs, _ in parts])
        unit = normalise(_in_order(all_gather_detached(mean), len(ids), self.session.world.size).double())
        known = labels >= 0
        if known.sum() <= count or len(labels[known].unique()) < 2:
            return np.full(len(ids), np.nan)
        similar = (unit @ unit.T).masked_fill(~known, -2).fill_diagonal_(-2)
        nearest = labels[similar.topk(count).indices]
        right = (nearest.mode(1).values == labels).double()
        return right.masked_fill(~known, torch.nan).cpu().numpy()

    def _bank(self, parts: list[tuple[list[EncoderOutput], list[Branches]]]) -> tuple[Bank | None, float]:
        """Keys of the retained images' first pair of views, each image once, and the loss of chance against them."""
        if not self.objective.uses_bank:
            return None, float(np.log(parts[0][1][0].output.shape[-1]))
        keys, hashes = zip(*(self.objective.bank_keys(pairs[0]) for _, pairs in parts), strict=True)
        each = len(keys[0]) // PIECE  # keys of an image
        world, count = self.session.world.size, len(self.ids["retain"])

        def every(mine: Tensor) -> Tensor:
            rows = all_gather_detached(mine.unflatten(0, (-1, each)).flatten(1))
            return _in_order(rows, count, world).view(count * each, *mine.shape[1:])

        bank = Bank(every(torch.cat(keys)), every(torch.cat(hashes)), self.objective.temperature)
        return bank, float(np.log1p((count - 1) * each))


def _in_order(rows: Tensor, count: int, world: int) -> Tensor:
    """Rows that came rank by rank, of every world-th piece each, in the order of the images; [count, ...]."""
    turns = len(rows) // (PIECE * world)
    return rows.unflatten(0, (world, turns, PIECE)).transpose(0, 1).flatten(0, 2)[:count]


def _features(objective: Objective, outs: list[EncoderOutput], pairs: list[Branches], bank: Bank | None) -> Tensor:
    """FEATURES of the images of a piece, float64 [n, F]."""
    deltas = [objective.per_sample_delta(pair, bank) / len(pairs) for pair in pairs]
    gradients = head_gradients(torch.cat([pair.hidden for pair in pairs]), torch.cat(deltas))
    losses = torch.stack([objective.per_sample_loss(pair, bank) for pair in pairs])
    columns = [_agreement([out.output for out in outs]), _agreement([out.embedding for out in outs])]
    return torch.stack([*columns, losses.double().mean(0), gradients.norm().double()], dim=1)


def _agreement(vectors: list[Tensor]) -> Tensor:
    """Mean cosine over all pairs of an image's V views, [V][n, D] -> float64 [n]."""
    count = len(vectors)
    total = torch.stack([normalise(vector.double()) for vector in vectors]).sum(0)
    return (total.square().sum(-1) - count) / (count * (count - 1))
