"""Encoders that the user brings in the place of the one that a run trains again: `audit.reference`.

A file is a checkpoint like `encoder.checkpoint`; that it was trained without the images to forget is the user's word.
A run directory lends its retrained encoder, and its roles say what that was trained on: no image of this request and no
non-member of this run, by their bytes. So one encoder, retrained without a pool of images, serves every request that
the pool holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from distunlearn.config.schema import RunConfig
from distunlearn.config.shape import field_diff
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.manifest.records import FORGOTTEN, ROLES
from distunlearn.data.manifest.request import keys_of
from distunlearn.engine.commitment import references, source_digests
from distunlearn.engine.digests import digest_of, training_digest, training_digest_here
from distunlearn.engine.run_directory import find_manifest, saved_config
from distunlearn.engine.session import Session, load_trained, save_trained
from distunlearn.errors import ConfigError, DataError
from distunlearn.verify.commitment import kept_commitment, phase_seed
from distunlearn.verify.records import read_record
from distunlearn.verify.run import DONE, DONE_FIELDS, REFERENCE, STATE

TRAINING = ("encoder", "objective", "views", "pretrain", "precision", "sync_batchnorm")  # by which it is trained alike


def reference_digests(session: Session) -> list[str]:
    """What decides each brought encoder: which it is, and the training of heads that it may lack. Collective."""
    trained, world = training_digest(session, "retrain"), session.world
    known = world.broadcast_object(world.on_main(lambda: source_digests(session.cfg, session.out)))
    return [digest_of(retrain=trained, reference=digest) for digest in known]


def take_from_run(session: Session, run: Path, folder: Path, facts: Mapping[str, Any]) -> None:
    """The retrained encoder of another run, weights unchanged. facts: of its `done.json`. On the main rank.

    Raises:
        DataError, ConfigError: see `shown_by_run`; it is damaged, or does not fit.
    """
    shown = shown_by_run(session.cfg, session.manifest, run)
    load_trained(run / "retrained", session)
    save_trained(session, folder, load_file(run / "retrained" / STATE), {**facts, REFERENCE: shown})


def require_runs(cfg: RunConfig, out: Path, manifest: Manifest) -> None:
    """Raise what `shown_by_run` would before anything is computed or written. manifest: with the roles of this request;
    they need not be saved. On the main rank.
    """
    for name, place in references(cfg):
        if place.is_dir() and not (out / name / DONE).exists():
            shown_by_run(cfg, manifest, place)


def shown_by_run(own: RunConfig, manifest: Manifest, run: Path) -> dict[str, Any]:
    """What shows that the retrained encoder of a run saw no image of this run but those that are kept.

    own, manifest: of this run.

    Returns:
        For `done.json`: state, the digest of its weights; images that it was trained on; of_images: those that are kept
        here.

    Raises:
        DataError: the run trained no such encoder, or on an image that it must not have seen.
        ConfigError: it was trained by other settings.
    """
    cfg, done = saved_config(run, world=1), read_record(run / "retrained" / DONE, DONE_FIELDS)
    theirs = find_manifest(cfg, run)
    if theirs is None or cfg.audit.reference:
        lacks = "has no shards, whose index says" if theirs is None else "was brought an encoder itself: it cannot say"
        raise DataError(f"audit.reference: {run} {lacks} what its retrained encoder was trained on; name another run.")
    differ = [key for key in field_diff(cfg, own) if key.partition(".")[0] in TRAINING]
    differ = [key for key in differ if key != "encoder.checkpoint"]
    if differ:
        raise ConfigError(
            f"audit.reference: {run} trained its retrained encoder by other settings ({', '.join(differ[:5])}); a "
            "difference to it need not come from the images to forget; name another run."
        )
    kept = kept_commitment(run)
    seeded = dataclasses.replace(cfg, seed=phase_seed(cfg.seed, kept[1].nonce if kept else None, "retrain"))
    if training_digest_here(seeded, theirs, run, "retrain") != done["digest"]:
        raise DataError(
            f"audit.reference: the retrained encoder of {run} was not trained on the images that its roles say; one of "
            "them was changed; restore it or name another run."
        )
    trained = _keys(theirs, ("retain",))
    others = tuple(role for role in (*ROLES, FORGOTTEN) if role != "retain")
    for role in others:
        seen = int(np.isin(_keys(manifest, (role,)), trained).sum())
        if seen:
            raise DataError(
                f"audit.reference: the retrained encoder of {run} was trained on {seen} {role} images of this run, "
                "expected none; name one that was trained without them."
            )
    return {"state": done["state"], "images": len(trained), "of_images": len(manifest.rows(("retain",)))}


def _keys(manifest: Manifest, roles: tuple[str, ...]) -> np.ndarray:
    """uint64 [n], of the bytes of the images of these roles."""
    return keys_of(manifest.columns.sha256[manifest.rows(roles)])
