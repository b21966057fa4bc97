"""From the ends of the line to the dosed encoder: every dose is looked at, one is chosen, its weights are written.

What was seen is kept in `<run>/dose` after every dose, so that an attempt that goes on looks only at what is left and
comes to the same answer. The full dose, as the method left it, stays in `<run>/full_dose`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from distunlearn.common.files import file_sha256, replacing, write_json
from distunlearn.common.progress import progress_of
from distunlearn.config.schema import OptimizerConfig
from distunlearn.config.shape import plain
from distunlearn.engine import fault_injection
from distunlearn.engine.dose.line import between, line
from distunlearn.engine.dose.looks import FEATURES, ROLES, Viewer
from distunlearn.engine.optimizer import make_optimizer
from distunlearn.engine.session import Session, load_trained, save_trained
from distunlearn.errors import DataError, StoppedError
from distunlearn.verify.dose import Choice, DoseRules, choose, read_looks
from distunlearn.verify.records import read_record
from distunlearn.verify.run import DONE, DONE_FIELDS, STATE

FULL = "full_dose"  # folder of the encoder as the method left it
FOLDER = "dose"
CURVE = "curve.json"
SCORES = "scores.npz"
SEEN = (*ROLES, "chance", "right")  # by dose, as `Viewer.look` gives it
BAD_FILE = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


def settle_dose(session: Session, start: Path, full: Path, digest: str) -> None:
    """Write the encoder at the dose of `method.dose` into the run's folder, from finished encoders. Collective.

    start, full: folders of the encoder that forgetting began with, and of the one it ended with.

    Raises:
        StoppedError: a stop was asked for; what was seen is kept.
    """
    dose: float | str = session.cfg.method.dose
    facts = read_record(full / DONE, DONE_FIELDS)
    if dose == "auto":
        found = measure_dose(session, start, full)
        dose = found["dose"]
        facts["images"] += found["passed"]
        facts["seconds"] += found["seconds"]
        facts["dose_images"] = found["passed"]
    facts |= {"digest": digest, "dose": dose}
    session.telemetry.note("dose", _said(session, float(dose)))
    session.world.on_main(lambda: _write(session, start, full, float(dose), facts))


def measure_dose(session: Session, start: Path, full: Path) -> dict[str, Any]:
    """Look at every dose of `dose.grid` and choose one: the figures of `<run>/dose/curve.json`. Collective.

    Nothing but that folder and the ledger is written: no encoder changes.
    """
    ends = (("original", start), ("full", full))
    digests = {name: read_record(at / DONE, DONE_FIELDS)["state"] for name, at in ends}
    folder = session.out / FOLDER
    key = _key(session, digests)
    viewer = Viewer(session)
    seen = session.world.broadcast_object(session.world.on_main(lambda: _kept(folder, key)))
    clock = time.monotonic()
    if len(seen) < len(session.cfg.dose.grid):
        _look(session, start, full, viewer, seen, key)
    seconds = time.monotonic() - clock
    return session.world.broadcast_object(
        session.world.on_main(lambda: _conclude(session, viewer, seen, digests, seconds))
    )


def _key(session: Session, digests: dict[str, str]) -> str:
    """Digest of all that decides what is seen."""
    cfg = session.cfg
    parts = {
        **digests, "data": session.manifest.fingerprint, "seed": cfg.seed, "precision": cfg.precision,
        "images": cfg.dose.images, "number": cfg.dose.views, "grid": cfg.dose.grid,
        "views": dataclasses.asdict(cfg.views), "objective": dataclasses.asdict(cfg.objective),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


# -- looking ---------------------------------------------------------------------------------------------------------


def _look(session: Session, start: Path, full: Path, viewer: Viewer, seen: list[dict[str, Any]], key: str) -> None:
    """Add what is seen at the doses that are left to `seen`, and keep it; the backend holds the weights as in training.

    Raises:
        StoppedError: a stop was asked for.
    """
    cfg, backend = session.cfg, session.backend
    trained = load_trained(full, session)
    ends, first = [load_file(folder / STATE) for folder in (start, full)], len(seen)
    model = trained.model.to(backend.device).eval()
    momentum = trained.momentum
    optimizer = make_optimizer(OptimizerConfig(optimizer="sgd", lr=1.0, weight_decay=0.0), model)  # ZeRO needs one
    backend.prepare(model, optimizer, clip=0.0)
    if momentum is not None:
        backend.follow(momentum)
        momentum.model.eval()
    forward = backend.plain_forward()

    def part(prefix: str, dose: float) -> dict[str, Any]:
        begun, ended = ({k.removeprefix(prefix): v for k, v in e.items() if k.startswith(prefix)} for e in ends)
        return line(begun, ended, dose)

    try:
        with session.watch.training(), progress_of("dose") as show:
            for number in range(len(seen), len(cfg.dose.grid)):
                dose = cfg.dose.grid[number]
                session.watch.at("dose", "unlearn", number, slow=True)
                fault_injection.reach("dose", number, "unlearn")
                if session.stop.agreed(session.world, number):
                    reason = session.stop.honoured(session.world)
                    raise StoppedError(
                        f"the choice of the dose was stopped by {reason} before dose {dose:g}, and what was seen is "
                        "kept; the same command goes on from there."
                    )
                backend.load_full_state(part("model.", dose))
                if momentum is not None:
                    backend.load_full_state(part("momentum.", dose), momentum.model)
                seen.append(viewer.look(forward, momentum))
                session.world.on_main(lambda: _keep(session, viewer, seen, key))
                show(number + 1 - first, len(cfg.dose.grid) - first)
    finally:
        backend.release()


def _keep(session: Session, viewer: Viewer, seen: list[dict[str, Any]], key: str) -> None:
    """The file of scores: ids and features of every image at every dose so far, float32."""
    folder = session.out / FOLDER
    session.ledger.may_write()
    folder.mkdir(exist_ok=True)
    arrays: dict[str, Any] = {name: np.stack([one[name] for one in seen]).astype(np.float32) for name in SEEN}
    arrays |= {f"{role}_ids": np.array(viewer.ids[role]) for role in ROLES}
    with replacing(folder / SCORES) as path, path.open("wb") as handle:
        np.savez_compressed(
            handle, key=np.array(key), features=np.array(FEATURES), grid=np.array(session.cfg.dose.grid), **arrays
        )


def _kept(folder: Path, key: str) -> list[dict[str, Any]]:
    """What an attempt at the same choice has seen so far; nothing where the file is missing, damaged or of another."""
    try:
        with (folder / SCORES).open("rb") as handle, np.load(handle, allow_pickle=False) as found:
            if str(found["key"]) != key:
                return []
            arrays = {name: found[name] for name in SEEN}
    except BAD_FILE:
        return []
    return [{name: arrays[name][a] for name in SEEN} for a in range(len(arrays["chance"]))]


# -- choosing --------------------------------------------------------------------------------------------------------


def _conclude(
    session: Session, viewer: Viewer, seen: list[dict[str, Any]], digests: dict[str, str], seconds: float
) -> dict[str, Any]:
    """Choose, by the numbers as they are kept, and write the curve and the ledger's event."""
    cfg, folder = session.cfg.dose, session.out / FOLDER
    if len(viewer.ids["forget"]) < 2 or len(viewer.ids["watch"]) < 2:
        raise DataError(
            f"method.dose=auto compares {len(viewer.ids['forget'])} forget with {len(viewer.ids['watch'])} watch "
            "images, expected at least 2 of each; raise data.watch, or set a number such as method.dose=1."
        )
    looks, _ = read_looks(folder / SCORES)
    rules = DoseRules.model_validate(plain(cfg))
    choice = choose(looks, rules, session.cfg.seed)
    other = "half" if cfg.aim == "retained" else "retained"
    beside: Choice = choose(looks, rules, session.cfg.seed, other)
    found = {
        **choice.as_dict(),
        "grid": list(cfg.grid),
        "aim": cfg.aim,
        "features": list(FEATURES),
        "beside": {"aim": other, "dose": beside.dose, "low": beside.low, "high": beside.high,
                   "aims": beside.aims.tolist()},
        "margins": [cfg.loss_share, cfg.knn_points],
        "confidence": cfg.confidence,
        "images": {role: len(ids) for role, ids in viewer.ids.items()},
        "passed": viewer.passed * len(cfg.grid),
        "seconds": seconds,
        **digests,
        "scores_sha256": file_sha256(folder / SCORES),
    }  # fmt: skip
    session.ledger.may_write()
    write_json(folder / CURVE, found)
    told = ("dose", "best", "low", "high", "grid", "aim", "images", "original", "full", "scores_sha256")
    told_too = {"rules": rules.model_dump(), "seed": session.cfg.seed}
    session.ledger.dose(**{name: found[name] for name in told}, **told_too)
    return found


def _said(session: Session, dose: float) -> str:
    end = "; the encoder is left as it was, and nothing is forgotten" if dose == 0 else ""
    if session.cfg.method.dose != "auto":
        return f"{dose:g} of the method's change, as asked for{end}"
    found = read_record(session.out / FOLDER / CURVE, dict.fromkeys(("low", "high", "best"), (int, float)))
    interval = f"interval {found['low']:g} to {found['high']:g}"
    if dose == 0 and found["best"] > 0:
        return f"0: {found['images']['watch']} watch images do not tell {found['best']:g} from 0 ({interval}){end}"
    if dose == 0:
        return f"0: every dose of this method makes the images to forget stand out more, or costs too much{end}"
    return f"{dose:g} of the method's change ({interval})"


def _write(session: Session, start: Path, full: Path, dose: float, facts: dict[str, Any]) -> None:
    """The dosed encoder, tensor by tensor. A queue holds keys of images, not weights: it is the full dose's, which has
    none of a forgotten image, except at dose 0, which is the original state whole, so that everybody can tell.
    """
    first, last = (load_file(folder / STATE) for folder in (start, full))
    if dose == 0:
        last = first
    queue = {name: value for name, value in last.items() if name.startswith("queue.")}
    rest = {name: between(name, first[name], value, dose) for name, value in last.items() if name not in queue}
    save_trained(session, session.out, rest | queue, facts)
