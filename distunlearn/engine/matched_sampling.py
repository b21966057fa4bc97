"""How often each image of a feeder comes, where the method weighs them by what the original encoder sees in them.

The looks are shared out over the ranks in pieces of fixed size, so that they are the same on any number of ranks; the
main rank asks the method's sampling for the weights, and what it found is kept in the run directory: a run that goes on
draws by the same shares.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from distunlearn.common.device import on_device
from distunlearn.common.files import write_json
from distunlearn.common.random import VIEW_EPOCHS
from distunlearn.common.tensors import write_tensors
from distunlearn.config.schema import RunConfig
from distunlearn.data.augmentations import plain_view
from distunlearn.data.schedule import permutation
from distunlearn.distributed.collectives import all_gather_uneven
from distunlearn.encoders.model import ContrastiveModel, batchnorm_mode
from distunlearn.engine.session import Session
from distunlearn.errors import DataError, DistunlearnError
from distunlearn.methods.base import Method
from distunlearn.methods.third_party_weights import Look, MatchedSampling, effective_number, inclusion_shares
from distunlearn.objectives.forward import random_views
from distunlearn.objectives.memory_bank import normalise

__all__ = ["LOOK_LIMIT", "LOOK_VIEWS", "feeder_shares", "look", "looked_at"]

LOOK_VIEWS = 4  # of each image: 6 pairs
LOOK_LIMIT = 32768  # images of a role that are looked at; of a weighed feeder the others never come
LOOK_EPOCH = VIEW_EPOCHS["matched sampling"][0]  # views of their own, far from any training's and from calibration's
FACTS = "counterparts.json"
SHARES = "counterparts.safetensors"
_PIECE = 64  # images


def looked_at(counts: Iterable[int]) -> int:
    """Images through the original encoder, from the number of images of each role that is looked at."""
    return (LOOK_VIEWS + 1) * sum(min(count, LOOK_LIMIT) for count in counts)


def feeder_shares(
    session: Session, phase: str, method: Method, model: ContrastiveModel, folder: Path, digest: str
) -> tuple[dict[str, np.ndarray], float]:
    """By feeder in which share of its epochs each image comes, and the images that were looked at to find it; nothing
    where every image comes in every epoch. Collective.

    Args:
        phase, method: what is about to begin; the method says whose images are weighed, and how.
        model: the original encoder, whole, on this rank's device.
        folder: where the shares are kept, or have been by a run of the same digest.

    Returns:
        float64 [t] in the order of the manifest (see `inclusion_shares`), and the number.

    Raises:
        DataError: an image cannot be read; no image of a role can be decoded; what is kept is not what was written.
    """
    sampling, world = method.sampling(), session.world
    if sampling is None:
        return {}, 0.0
    kept = world.broadcast_object(world.on_main(lambda: _kept(folder, digest)))
    if kept is None:
        ids = {role: _chosen(session, role) for role in sampling.roles}
        looks = {role: _look(session, model, chosen) for role, chosen in ids.items()}
        kept = world.broadcast_object(world.on_main(lambda: _weigh(session, sampling, ids, looks, folder, digest)))
        session.telemetry.note(phase, sampling.text(kept[1]))
        session.telemetry.log(phase, 0, {f"start/counterparts_{name}": value for name, value in kept[1].items()})
    shares, facts = kept
    return {sampling.feeder: shares}, facts["looked_at"]


def _kept(folder: Path, digest: str) -> tuple[np.ndarray, dict[str, float]] | None:
    """What an earlier attempt of the same settings found."""
    if not (folder / FACTS).exists():
        return None
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    if facts.pop("digest") != digest:
        return None
    shares = load_file(folder / SHARES)["shares"].numpy()
    if len(shares) != facts["available"] or abs(shares.sum() - facts["images"]) > 1e-6:
        raise DataError(f"{folder / SHARES} is not what {FACTS} says; delete both, or choose another --out.")
    return shares, facts


def _chosen(session: Session, role: str) -> list[str]:
    """At most LOOK_LIMIT ids of a role, in the order of the manifest; the same on every rank."""
    ids = session.manifest.ids(role)
    rows = np.sort(permutation(len(ids), session.cfg.seed, "looked at", role)[:LOOK_LIMIT])
    return [ids[int(row)] for row in rows]


@torch.no_grad()
def look(cfg: RunConfig, network: ContrastiveModel, images: Tensor, ids: Sequence[str]) -> Look:
    """The embedding of the plain image as a unit vector, and the mean cosine of the outputs of two of its `LOOK_VIEWS`
    random views. By running statistics.

    images: uint8 [n, C, S, S], where the network is.
    """
    epochs = np.full(len(ids), LOOK_EPOCH, dtype=np.int64)
    half = torch.autocast(images.device.type, torch.bfloat16, enabled=cfg.precision == "bf16")
    total = 0
    with batchnorm_mode(network, "eval"), half:
        for view in range(LOOK_VIEWS):  # one at a time: bounds memory
            (shown,) = random_views(images, cfg.views, seed=cfg.seed, epochs=epochs, ids=ids, views=[view])
            total = total + normalise(network(shown).output.float())
        direction = normalise(network(plain_view(images)).embedding.float())
    return Look(direction, (total.square().sum(1) - LOOK_VIEWS) / (LOOK_VIEWS * (LOOK_VIEWS - 1)))


def _look(session: Session, model: ContrastiveModel, ids: list[str]) -> Tensor:
    """Per image its direction [E], its view agreement and whether it was decoded: float32 [n, E + 2], on the CPU."""
    world, device = session.world, session.backend.device
    pieces = [ids[start : start + _PIECE] for start in range(0, len(ids), _PIECE)]
    found, failed = [torch.zeros((0, model.embed_dim + 2), device=device)], None
    try:
        found += [_look_at(session, model, piece) for piece in pieces[world.rank :: world.size]]
    except DistunlearnError as error:
        failed = error
    for error in world.gather_objects(failed):  # or the others would wait for this rank's looks
        if error is not None:
            error.agreed = True
            raise error
    whole = all_gather_uneven(torch.cat(found)).cpu()
    return _in_order(whole, [len(pieces[rank :: world.size]) for rank in range(world.size)])


def _in_order(rows: Tensor, pieces: list[int]) -> Tensor:
    """Rows that came rank by rank, of every world-th piece each, in the order of the images. pieces: by rank."""
    world, place = len(pieces), []
    for rank, held in enumerate(pieces):
        for number in range(rank, rank + world * held, world):
            place.extend(range(number * _PIECE, min(len(rows), (number + 1) * _PIECE)))
    result = torch.empty_like(rows)
    result[torch.tensor(place, dtype=torch.int64)] = rows
    return result


def _look_at(session: Session, model: ContrastiveModel, ids: list[str]) -> Tensor:
    """`_look` of one piece, on the device."""
    images = torch.zeros((len(ids), *session.store.shape), dtype=torch.uint8)
    bad = session.store.fill(ids, images)
    session.store.undecodable.add(bad)
    decoded = torch.tensor([float(i not in bad) for i in ids], device=session.backend.device)
    found = look(session.cfg, model, on_device(images, session.backend.device), ids)
    return torch.cat([found.direction, found.agreement[:, None], decoded[:, None]], dim=1)


def _weigh(
    session: Session,
    sampling: MatchedSampling,
    ids: dict[str, list[str]],
    looks: dict[str, Tensor],
    folder: Path,
    digest: str,
) -> tuple[np.ndarray, dict[str, float]]:
    """Shares and figures from the looks; written, so that an attempt that goes on has them."""
    seen, decoded = {}, {}
    for role, found in looks.items():
        decoded[role] = found[:, -1] > 0
        if not decoded[role].any():
            raise DataError(f"No image of role {role} can be decoded; replace the files and prepare again.")
        there = found[decoded[role]].to(session.backend.device)
        seen[role] = Look(there[:, :-2], there[:, -2])
    weights, figures = sampling.weigh(seen)
    place = {sample_id: row for row, sample_id in enumerate(session.manifest.ids(sampling.feeder))}
    shares = np.zeros(len(place))
    rows = [place[i] for i, fine in zip(ids[sampling.feeder], decoded[sampling.feeder].tolist(), strict=True) if fine]
    shares[rows] = inclusion_shares(weights).numpy()
    facts = {
        "images": float(round(shares.sum())),
        "available": float(len(shares)),
        "effective": effective_number(weights),
        **figures,
        "looked_at": float(looked_at(map(len, ids.values()))),
    }
    session.ledger.may_write()
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / SHARES, {"shares": torch.from_numpy(shares)})
    write_json(folder / FACTS, {"digest": digest, **facts})
    return shares, facts
