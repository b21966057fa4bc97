"""What an attacker can see of each image: one pass of every audited image through one encoder.

Every encoder of a run is shown the same views of the same images against a bank of the same retain images, in
evaluation mode, so that two encoders differ by their weights only. Nothing here knows which encoder it
looks at. third-party and calibration images are never looked at: they were used by the method.

Shapes: n = images, E = embedding dim, A = views of an image, P = A (A - 1) / 2 pairs of views, K = bank rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from distunlearn.audit.signals.gradient_norms import network_gradient_norms
from distunlearn.audit.signals.gradient_sketch import network_sketches
from distunlearn.audit.signals.part_crops import part_responses
from distunlearn.config.schema import RunConfig
from distunlearn.constraints.gradients.last_layer import head_gradients, sketch_matrices
from distunlearn.data.augmentations import id_hashes, make_view, plain_view
from distunlearn.data.loading.stream import ImageStore
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.encoders.model import ContrastiveModel, EncoderOutput
from distunlearn.errors import NumericsError
from distunlearn.objectives import make_objective
from distunlearn.objectives.base import Branches, Objective
from distunlearn.objectives.memory_bank import Bank

if TYPE_CHECKING:
    from distunlearn.engine.session import Session, Trained

__all__ = ["AUDITED", "AUDIT_EPOCH", "Eye", "Signals", "audit_bank", "collect_signals", "sampled", "usable_labels"]

AUDITED = ("retain", "forget", "third_party_audit", "holdout")
AUDIT_EPOCH = 1 << 33  # views that no training and no calibration has seen
PER_ROLE = 10_000  # audited images of a role; a role with more is sampled, the same way for every encoder
BANK_IMAGES = 512
CHUNK = 256  # images per forward pass
SKETCH = 8  # rows and columns of the head-gradient sketch


@dataclass(frozen=True, eq=False)
class Signals:
    """Per-image signals of one encoder, float64 unless said otherwise.

    ids: n sample ids. roles: n role names. labels: int64 [n], -1 where unknown.
    embedding: float32 [n, E], of the image itself. embedding_cosines, output_cosines: [n, P], between the backbone's
        embeddings of its views, and between the head's outputs for them.
    bank_loss, confidence: [n], means over disjoint pairs of views. output: [n, 2], the objective's output features.
    gradient_norm_head, gradient_norm_network: [n], of the loss averaged over those pairs (the second NaN for retain).
    gradient_sketch: [n, 64], of the head gradient.
    layer_norms, network_sketch: [n, L] and [n, 64], of the gradient over the whole network (`network_sketch`).
    part_responses: float32 [n, 2 N], of N crops (`parts`); N is 0 unless `audit.part_crops` says otherwise.
    """

    ids: list[str]
    roles: np.ndarray
    labels: np.ndarray
    embedding: np.ndarray
    embedding_cosines: np.ndarray
    output_cosines: np.ndarray
    bank_loss: np.ndarray
    confidence: np.ndarray
    output: np.ndarray
    gradient_norm_head: np.ndarray
    gradient_norm_network: np.ndarray
    gradient_sketch: np.ndarray
    layer_norms: np.ndarray
    network_sketch: np.ndarray
    part_responses: np.ndarray

    def of(self, role: str) -> np.ndarray:
        """Rows of a role, int64, ascending."""
        return np.flatnonzero(self.roles == role)

    def at(self, rows: np.ndarray) -> Signals:
        """The signals of some images alone; rows: int64 or bool."""
        kept = np.arange(len(self.ids))[rows]
        columns = {f.name: getattr(self, f.name)[kept] for f in fields(Signals) if f.name != "ids"}
        return Signals(ids=[self.ids[row] for row in kept.tolist()], **columns)


@dataclass(frozen=True, eq=False)
class Eye:
    """One encoder and how it is shown images."""

    model: ContrastiveModel
    momentum: nn.Module | None
    objective: Objective
    cfg: RunConfig
    device: torch.device

    def views(self, ids: Sequence[str], images: Tensor, epoch: int, count: int) -> list[Tensor]:
        epochs = np.full(len(ids), epoch, dtype=np.int64)
        images = images.to(self.device)
        return [
            make_view(images, self.cfg.views, seed=self.cfg.seed, epochs=epochs, ids=ids, view=view)
            for view in range(count)
        ]

    def online(self, pair: Sequence[Tensor]) -> list[Tensor]:
        """The views that go through the encoder itself (MoCo v2 has one query branch)."""
        return list(pair[: self.objective.branches])

    def branches(
        self, pair: Sequence[Tensor], ids: Sequence[str], labels: Tensor, seen: Sequence[EncoderOutput] | None = None
    ) -> Branches:
        """The pair of views as the objective's branches. seen: what the encoder gave for the views, if it is known."""
        online = self.online(pair)
        out = self.model(torch.cat(online)) if seen is None else _stacked(seen[: len(online)])
        target = None
        if self.momentum is not None:
            keyed = list(pair[1:]) if len(online) == 1 else list(pair[::-1])
            target = self.momentum(torch.cat(keyed)).projection.view(len(keyed), len(ids), -1)
        shape = (len(online), len(ids), -1)
        hashes = torch.from_numpy(id_hashes(ids)).to(self.device)
        return Branches(out.output.view(shape), out.hidden.view(shape), target, labels, hashes)


@torch.no_grad()
def collect_signals(
    model: ContrastiveModel,
    momentum: nn.Module | None,
    objective: Objective,
    store: ImageStore,
    manifest: Manifest,
    cfg: RunConfig,
) -> Signals:
    """Show every audited image to one encoder.

    Args:
        model: put into evaluation mode and left there. momentum: the momentum encoder of objectives that have one.

    Raises:
        NumericsError: a signal is not finite.
    """
    device = next(model.parameters()).device
    model.eval()
    if momentum is not None:
        momentum.eval()
    eye = Eye(model, momentum, objective, cfg, device)
    bank = audit_bank(eye, store, manifest)
    ids = {role: store.decodable(sampled(manifest.ids(role), PER_ROLE, cfg.seed)) for role in AUDITED}
    chosen = [(i, role) for role, those in ids.items() for i in those]
    parts = [_signals(eye, chunk, store, manifest, bank) for chunk in _chunks(chosen)]
    joined = {f.name: _join([getattr(part, f.name) for part in parts]) for f in fields(Signals)}
    signals = Signals(**joined)
    _require_finite(signals)
    return signals


def _signals(
    eye: Eye, chosen: Sequence[tuple[str, str]], store: ImageStore, manifest: Manifest, bank: Bank | None
) -> Signals:
    ids, roles = [i for i, _ in chosen], np.array([role for _, role in chosen])
    images = store.by_offset(ids)
    labels = manifest.labels(ids)
    count = eye.cfg.audit.views
    views = eye.views(ids, images, AUDIT_EPOCH, count)
    seen = [eye.model(view) for view in views]
    used = usable_labels(eye, images, labels)
    pairs = [views[start : start + 2] for start in range(0, count - 1, 2)]
    outs = [seen[start : start + 2] for start in range(0, count - 1, 2)]
    branches = [eye.branches(pair, ids, used, out) for pair, out in zip(pairs, outs, strict=True)]
    deltas = [eye.objective.per_sample_delta(b, bank) / len(pairs) for b in branches]
    # The gradient of a loss averaged over pairs is one gradient over all their branches.
    gradients = head_gradients(torch.cat([b.hidden for b in branches]), torch.cat(deltas))
    probed = np.flatnonzero(roles != "retain")
    norms = np.full(len(ids), np.nan)
    if len(probed):
        online = torch.stack([view for pair in pairs for view in eye.online(pair)])
        norms[probed] = network_gradient_norms(eye.model, online[:, probed], torch.cat(deltas)[:, probed])
    layer_norms, network_sketch = network_sketches(
        eye.model, lambda: eye.objective.per_sample_loss(eye.branches(pairs[0], ids, used), bank), len(ids),
        eye.objective.branches, eye.cfg.seed,
    )  # fmt: skip
    out_matrix, in_matrix = sketch_matrices(
        eye.cfg.seed, 0, deltas[0].shape[-1], gradients.hidden.shape[-1], SKETCH, SKETCH,
        device=eye.device, dtype=gradients.delta.dtype,
    )  # fmt: skip
    plain = plain_view(images.to(eye.device))
    return Signals(
        ids=ids,
        roles=roles,
        labels=labels,
        embedding=eye.model(plain).embedding.float().cpu().numpy(),
        embedding_cosines=_cosines([out.embedding for out in seen]),
        output_cosines=_cosines([out.output for out in seen]),
        bank_loss=_mean([eye.objective.per_sample_loss(b, bank) for b in branches]),
        confidence=_mean([eye.objective.confidence(b, bank) for b in branches]),
        output=_mean([eye.objective.output_features(b, bank) for b in branches]),
        gradient_norm_head=gradients.norm().double().cpu().numpy(),
        gradient_norm_network=norms,
        gradient_sketch=gradients.sketch(out_matrix, in_matrix).double().cpu().numpy(),
        layer_norms=layer_norms,
        network_sketch=network_sketch,
        part_responses=part_responses(eye.model.backbone, plain, ids, eye.cfg.audit.part_crops, eye.cfg.seed),
    )


def audit_bank(eye: Eye, store: ImageStore, manifest: Manifest) -> Bank | None:
    """Keys of retain images, the same images for every encoder. Not the queue: each encoder would bring its own."""
    if not eye.objective.uses_bank:
        return None
    ids = store.decodable(sampled(manifest.ids("retain"), BANK_IMAGES, eye.cfg.seed + 1))
    keys, hashes = [], []
    for chunk in _chunks(ids):
        images = store.by_offset(chunk)
        labels = torch.from_numpy(manifest.labels(chunk)).to(eye.device)
        pair = eye.views(chunk, images, AUDIT_EPOCH + 1, 2)
        key, row = eye.objective.bank_keys(eye.branches(pair, chunk, labels))
        keys.append(key)
        hashes.append(row)
    return Bank(torch.cat(keys), torch.cat(hashes), eye.objective.temperature)


def _cosines(vectors: Sequence[Tensor]) -> np.ndarray:
    """[n, D] of every view -> cosines of all pairs of views, [n, P]."""
    units = nn.functional.normalize(torch.stack(list(vectors)).double(), dim=-1)
    rows, columns = np.triu_indices(len(units), 1)
    return (units[rows] * units[columns]).sum(-1).T.cpu().numpy()


def usable_labels(eye: Eye, images: Tensor, labels: np.ndarray) -> Tensor:
    """Labels for the loss. Supervised: an image without a class of the members gets the encoder's own prediction."""
    found = torch.from_numpy(labels).to(eye.device)
    if not eye.objective.uses_labels:
        return found
    logits = eye.model(plain_view(images.to(eye.device))).output
    foreign = (found < 0) | (found >= logits.shape[-1])
    return torch.where(foreign, logits.argmax(-1), found)


def _stacked(outs: Sequence[EncoderOutput]) -> EncoderOutput:
    return EncoderOutput(*(torch.cat(parts) for parts in zip(*outs, strict=True)))


def sampled(ids: list[str], most: int, seed: int) -> list[str]:
    if len(ids) <= most:
        return ids
    keep = np.sort(np.random.default_rng([seed, 0x5A]).choice(len(ids), most, replace=False))
    return [ids[i] for i in keep]


def _chunks(items: Sequence) -> Iterator[Sequence]:
    for start in range(0, len(items), CHUNK):
        yield items[start : start + CHUNK]


def _mean(values: Sequence[Tensor]) -> np.ndarray:
    return torch.stack(list(values)).double().mean(0).cpu().numpy()


def _join(parts: list) -> list | np.ndarray:
    return [i for part in parts for i in part] if isinstance(parts[0], list) else np.concatenate(parts)


def _require_finite(signals: Signals) -> None:
    for f in fields(Signals):
        value = getattr(signals, f.name)
        if isinstance(value, list) or value.dtype.kind != "f":
            continue
        rows = value if f.name != "gradient_norm_network" else value[signals.roles != "retain"]
        if not np.isfinite(rows).all():
            raise NumericsError(
                f"the audit found values of {f.name} that are not finite, where every image must have finite ones; "
                "the encoder's weights or outputs overflow."
            )


def make_eye(session: Session, trained: Trained) -> Eye:
    """How the audit looks at an encoder: in evaluation mode, with the run's own views and objective."""
    momentum = trained.momentum.model.eval() if trained.momentum else None
    model = trained.model.eval()
    device = next(model.parameters()).device
    return Eye(model, momentum, make_objective(session.cfg.objective), session.cfg, device)
