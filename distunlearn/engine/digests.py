"""Digests of what decides the weights of an encoder: settings and images, not where they lie."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from distunlearn.common.files import file_sha256
from distunlearn.config.schema import RunConfig
from distunlearn.config.shape import without_effect
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.engine.session import Session
from distunlearn.verify.records import read_record
from distunlearn.verify.run import CHECKPOINT_SHA256, DONE, DONE_FIELDS


def digest_of(**parts: object) -> str:
    plain = {k: _deciding(v) if dataclasses.is_dataclass(v) else v for k, v in parts.items()}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


def _deciding(section: Any) -> dict[str, Any]:
    """The settings of a section that decide results."""
    free = without_effect(section)
    return {key: value for key, value in dataclasses.asdict(section).items() if key not in free}


def training_digest(session: Session, phase: str) -> str:
    """What decides the weights of `original` or `retrained`: settings and the ids trained on, not where they lie.

    Collective: the main rank finds it.
    """
    world, parts = session.world, (session.cfg, session.manifest, session.out)
    return world.broadcast_object(world.on_main(lambda: training_digest_here(*parts, phase)))


def training_digest_here(cfg: RunConfig, manifest: Manifest, out: Path, phase: str) -> str:
    """`training_digest` of a run directory, on this rank alone."""
    if cfg.data.previous and phase == "pretrain":
        own = out / "original" / DONE  # once it is there, the run before is not needed
        done = own if own.exists() else Path(cfg.data.previous) / DONE
        return digest_of(previous=read_record(done, DONE_FIELDS)["state"])
    foreign = cfg.encoder.checkpoint if phase == "pretrain" else None
    roles = ("retain", "forget") if phase == "pretrain" and not foreign else ("retain",)
    return digest_of(
        phase=phase,
        seed=cfg.seed,
        precision=cfg.precision,
        sync=cfg.sync_batchnorm,
        encoder=dataclasses.replace(cfg.encoder, checkpoint=None),
        objective=cfg.objective,
        views=cfg.views,
        pretrain=cfg.pretrain,
        samples=manifest.samples_digest(roles),
        **({"checkpoint": _checkpoint_sha256(out, Path(foreign))} if foreign else {}),
        decode_size=cfg.data.decode_size,
    )


def _checkpoint_sha256(out: Path, path: Path) -> str:
    """Of `encoder.checkpoint`; once the original encoder is made of it, as it was then, if the file is gone."""
    done = out / "original" / DONE
    if not path.exists() and done.exists():
        return read_record(done, DONE_FIELDS)[CHECKPOINT_SHA256]
    return file_sha256(path)


def unlearn_digest(session: Session) -> str:
    """What decides the weights of the unlearned encoder. Collective."""
    cfg = session.cfg
    return digest_of(
        original=training_digest(session, "pretrain"),
        retain=training_digest(session, "retrain"),
        unlearn=cfg.unlearn,
        method=dataclasses.replace(cfg.method, dose="auto"),
        constraint=cfg.constraint,
        data=session.manifest.fingerprint,
    )
