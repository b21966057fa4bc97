"""What an attacker can see of each image: one pass of every audited image through one encoder.

Every encoder of a run is shown the same views of the same images against a bank of the same retain images, in
evaluation mode, so that two encoders differ by their weights only. Nothing here knows which encoder it
looks at. third-party and calibration images are never looked at: they were used by the method.

Shapes: n = images, E = embedding dim, A = views of an image, P = A (A - 1) / 2 pairs of views, K = bank rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distunlearn.audit.signals.gradient_norms import network_gradient_norms
from distunlearn.audit.signals.gradient_sketch import network_sketches
from distunlearn.audit.signals.part_crops import part_responses
from distunlearn.common.random import STREAMS, VIEW_EPOCHS
from distunlearn.config.schema import AuditConfig, RunConfig
from distunlearn.constraints.gradients.last_layer import head_gradients, sketch_matrices
from distunlearn.data.loading.image_store import ImageStore
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.manifest.records import FORGOTTEN
from distunlearn.data.views.colour import plain_view
from distunlearn.distributed.world import World
from distunlearn.engine.session import Session, Trained
from distunlearn.errors import NumericsError
from distunlearn.objectives import make_objective
from distunlearn.objectives.forward import EncoderView
from distunlearn.objectives.memory_bank import Bank

AUDITED = ("retain", "forget", "third_party_audit", "holdout", FORGOTTEN)
AUDIT_EPOCH = VIEW_EPOCHS["audit"][0]  # views that no training and no calibration has seen
PER_ROLE = 10_000  # audited images of a role; a role with more is sampled, the same way for every encoder
BANK_IMAGES = 512
CHUNK = 64  # images that are looked at together, and what is kept of an audit that is interrupted
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

    def at(self, rows: np.ndarray | slice) -> Signals:
        """The signals of some images alone; rows: int64 or bool, or a slice."""
        kept = np.arange(len(self.ids))[rows]
        columns = {f.name: getattr(self, f.name)[kept] for f in fields(Signals) if f.name != "ids"}
        return Signals(ids=[self.ids[row] for row in kept.tolist()], **columns)


def collect_signals(encoder: EncoderView, store: ImageStore, manifest: Manifest, cfg: RunConfig) -> Signals:
    """Show every audited image to one encoder, in this process alone; see `shares.py` for several.

    Raises:
        NumericsError: a signal is not finite.
    """
    chunks = chunks_of(audited(manifest, cfg.seed, store))
    with looking(encoder, cfg.audit.precision):
        bank = audit_bank(encoder, store, manifest)
        return joined([signals_of(encoder, cfg.audit, chunk, store, manifest, bank) for chunk in chunks])


Chosen = Sequence[tuple[str, str]]  # sample id and role


def audited(manifest: Manifest, seed: int, store: ImageStore, world: World | None = None) -> list[tuple[str, str]]:
    """Who is looked at, role by role: every image that can be decoded, up to PER_ROLE of a role.

    world: whose ranks share the work of finding out; collective then.
    """
    ids = {role: store.decodable(sampled(manifest.ids(role), PER_ROLE, seed), world) for role in AUDITED}
    return [(i, role) for role, those in ids.items() for i in those]


def chunks_of(chosen: Chosen) -> list[Chosen]:
    """Those who are looked at together: the same whoever looks, for the size of a batch decides the last bits."""
    return list(_chunks(chosen))


def joined(parts: Sequence[Signals]) -> Signals:
    """The signals of all parts, in order.

    Raises:
        NumericsError: a signal is not finite.
    """
    columns = {f.name: _join([getattr(part, f.name) for part in parts]) for f in fields(Signals)}
    signals = Signals(**columns)  # type: ignore[arg-type]
    _require_finite(signals)
    return signals


@contextlib.contextmanager
def looking(encoder: EncoderView, precision: str) -> Iterator[None]:
    """Within it the encoder is in evaluation mode, and TF32 is used only where `audit.precision` says so."""
    for network in filter(None, (encoder.model, encoder.momentum)):
        network.eval()
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:  # torch allows it in convolutions unless it is told not to
            place.allow_tf32 = precision != "fp32"
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value


def _half(encoder: EncoderView, audit: AuditConfig) -> torch.autocast:
    """For the passes without a gradient; heads stay in float32 (`encoders/model.py`)."""
    return torch.autocast(encoder.device.type, torch.bfloat16, enabled=audit.precision == "bf16")


@torch.no_grad()
def signals_of(
    encoder: EncoderView, audit: AuditConfig, chosen: Chosen, store: ImageStore, manifest: Manifest, bank: Bank | None
) -> Signals:
    """What an attacker can see of some images."""
    ids, roles = [i for i, _ in chosen], np.array([role for _, role in chosen])
    plain = plain_view(store.plain(ids).to(encoder.device))
    labels = manifest.labels(ids)
    count = audit.views
    views = encoder.views(ids, store.cut, AUDIT_EPOCH, count)
    with _half(encoder, audit):
        seen = [encoder.model(view) for view in views]
    used = usable_labels(encoder, plain, labels)
    pairs = [views[start : start + 2] for start in range(0, count - 1, 2)]
    outs = [seen[start : start + 2] for start in range(0, count - 1, 2)]
    with _half(encoder, audit):
        branches = [encoder.branches(pair, ids, used, out) for pair, out in zip(pairs, outs, strict=True)]
    deltas = [encoder.objective.per_sample_delta(b, bank) / len(pairs) for b in branches]
    # The gradient of a loss averaged over pairs is one gradient over all their branches.
    gradients = head_gradients(torch.cat([b.hidden for b in branches]), torch.cat(deltas))
    probed = np.flatnonzero(roles != "retain")
    norms = np.full(len(ids), np.nan)
    if len(probed):
        online = torch.stack([view for pair in pairs for view in pair[: encoder.objective.branches]])
        norms[probed] = network_gradient_norms(encoder.model, online[:, probed], torch.cat(deltas)[:, probed])
    layer_norms, network_sketch = network_sketches(
        encoder.model, lambda: encoder.objective.per_sample_loss(encoder.branches(pairs[0], ids, used), bank), len(ids),
        encoder.objective.branches, encoder.seed,
    )  # fmt: skip
    out_matrix, in_matrix = sketch_matrices(
        encoder.seed, 0, deltas[0].shape[-1], gradients.hidden.shape[-1], SKETCH, SKETCH,
        device=encoder.device, dtype=gradients.delta.dtype,
    )  # fmt: skip
    return Signals(
        ids=ids,
        roles=roles,
        labels=labels,
        embedding=encoder.model(plain).embedding.float().cpu().numpy(),
        embedding_cosines=_cosines([out.embedding for out in seen]),
        output_cosines=_cosines([out.output for out in seen]),
        bank_loss=_mean([encoder.objective.per_sample_loss(b, bank) for b in branches]),
        confidence=_mean([encoder.objective.confidence(b, bank) for b in branches]),
        output=_mean([encoder.objective.output_features(b, bank) for b in branches]),
        gradient_norm_head=gradients.norm().double().cpu().numpy(),
        gradient_norm_network=norms,
        gradient_sketch=gradients.sketch(out_matrix, in_matrix).double().cpu().numpy(),
        layer_norms=layer_norms,
        network_sketch=network_sketch,
        part_responses=part_responses(
            encoder.model.backbone, encoder.model.normalise(plain), ids, audit.part_crops, encoder.seed
        ),
    )


@torch.no_grad()
def audit_bank(encoder: EncoderView, store: ImageStore, manifest: Manifest) -> Bank | None:
    """Keys of retain images, the same images for every encoder. Not the queue: each encoder would bring its own."""
    if not encoder.objective.uses_bank:
        return None
    ids = store.decodable(sampled(manifest.ids("retain"), BANK_IMAGES, encoder.seed + 1))
    keys, hashes = [], []
    for chunk in _chunks(ids):
        labels = torch.from_numpy(manifest.labels(chunk)).to(encoder.device)
        pair = encoder.views(chunk, store.cut, VIEW_EPOCHS["audit gradients"][0], 2)
        key, row = encoder.objective.bank_keys(encoder.branches(pair, chunk, labels))
        keys.append(key)
        hashes.append(row)
    return Bank(torch.cat(keys), torch.cat(hashes), encoder.objective.temperature)


def _cosines(vectors: Sequence[Tensor]) -> np.ndarray:
    """[n, D] of every view -> cosines of all pairs of views, [n, P]."""
    units = nn.functional.normalize(torch.stack(list(vectors)).double(), dim=-1)
    rows, columns = np.triu_indices(len(units), 1)
    return (units[rows] * units[columns]).sum(-1).T.cpu().numpy()


def usable_labels(encoder: EncoderView, plain: Tensor, labels: np.ndarray) -> Tensor:
    """Labels for the loss. Supervised: an image without a class of the members gets the encoder's own prediction.

    plain: see `plain_view`.
    """
    found = torch.from_numpy(labels).to(encoder.device)
    if not encoder.objective.uses_labels:
        return found
    logits = encoder.model(plain).output
    foreign = (found < 0) | (found >= logits.shape[-1])
    return torch.where(foreign, logits.argmax(-1), found)


def sampled(ids: Sequence[str], most: int, seed: int) -> list[str]:
    if len(ids) <= most:
        return list(ids)
    keep = np.sort(np.random.default_rng([seed, STREAMS["audit sample"]]).choice(len(ids), most, replace=False))
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


def encoder_view(session: Session, trained: Trained) -> EncoderView:
    """How the audit looks at an encoder: in evaluation mode on the run's device, with the run's views and objective."""
    cfg, device = session.cfg, session.backend.device
    momentum = trained.momentum.to(device).model.eval() if trained.momentum else None
    return EncoderView(trained.model.to(device).eval(), momentum, make_objective(cfg.objective), cfg.views, cfg.seed)
