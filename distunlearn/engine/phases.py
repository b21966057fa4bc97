"""The three trainings of a run, from config and shards to a finished model folder.

    pretrain  members          -> <run>/original
    retrain   retain           -> <run>/retrained   (the reference; the very recipe of pretrain)
    unlearn   the method's own -> <run>             (the unlearned encoder)

A finished model folder holds `export/`, `training_state.safetensors` (all weights, momentum encoder, queue),
and `done.json`, written last: a phase with a done.json of the same digest is not run again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from distunlearn.common.files import file_sha256
from distunlearn.common.random import VIEW_EPOCHS
from distunlearn.config.schema import RunConfig
from distunlearn.data.loading.epoch_order import epoch_order
from distunlearn.data.loading.image_store import ImageStore
from distunlearn.data.loading.stream import RoleFeeder
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.manifest.records import FORGOTTEN, ROLES
from distunlearn.data.schedule import Cycle
from distunlearn.data.views.draws import id_hashes
from distunlearn.distributed.world import World
from distunlearn.encoders.checkpoint_heads import other_heads, take_heads
from distunlearn.encoders.model import ContrastiveModel, MomentumEncoder
from distunlearn.encoders.weights import load_checkpoint
from distunlearn.engine import fault_injection
from distunlearn.engine.commitment import references
from distunlearn.engine.digests import digest_of, training_digest, unlearn_digest
from distunlearn.engine.dose.settle import FULL, measure_dose, settle_dose
from distunlearn.engine.ledger import require_coverage
from distunlearn.engine.loop import Phase, PhaseResult, train_phase
from distunlearn.engine.optimizer import make_optimizer
from distunlearn.engine.provenance import require_same_code
from distunlearn.engine.references import reference_digests, take_from_run
from distunlearn.engine.session import (
    Session,
    Trained,
    is_done,
    load_trained,
    phase_settings,
    save_trained,
    scratch,
)
from distunlearn.errors import ConfigError, DataError, EvidenceError
from distunlearn.methods.base import Method, method_class, refuse_missing
from distunlearn.methods.training import Pretrain, Retrain, TrainHeads
from distunlearn.objectives import make_objective
from distunlearn.objectives.forward import Context, EncoderView
from distunlearn.objectives.queue import KeyQueue
from distunlearn.verify.ledger import coverage, effective_steps, read_ledger
from distunlearn.verify.records import read_record
from distunlearn.verify.run import BROUGHT, CHECKPOINT, CHECKPOINT_SHA256, DONE, DONE_FIELDS, PHASES, STATE

KEYS_AT_ONCE = 256
NEW_HEADS = (
    "The checkpoint holds no heads that fit the objective; new ones are trained on its backbone with the images that "
    "stay, none of which is forgotten or held out."
)


def pretrain(session: Session) -> Path:
    """Train the original encoder on all members; returns its folder.

    With `encoder.checkpoint` the original encoder is that file's. Heads, momentum encoder and queue are the file's too
    where they fit the objective; else the backbone is not touched and new heads are trained on the images that stay,
    so that no head of this run knows an image that is forgotten, or one that the audit holds against it.

    With `data.previous` it is what that run left: its unlearned encoder with heads, momentum encoder and queue.
    """
    folder = session.out / "original"
    if session.cfg.data.previous:
        _take_previous(session, folder, Path(session.cfg.data.previous))
        return folder
    method = _pretraining(session.cfg)
    _train(session, "pretrain", folder, method, training_digest(session, "pretrain"), start=None)
    return folder


def _take_previous(session: Session, folder: Path, previous: Path) -> None:
    """The unlearned encoder of a run, weights unchanged, as the original one of the next."""
    digest = training_digest(session, "pretrain")
    if is_done(folder, digest):
        return
    load_trained(previous, session)  # which checks it, and that it fits
    if session.world.is_main:
        facts = dataclasses.asdict(PhaseResult(0, 0, 0.0, 1, {}))
        save_trained(session, folder, load_file(previous / STATE), {"phase": "pretrain", "digest": digest, **facts})
    session.world.barrier()


def _pretraining(cfg: RunConfig) -> Pretrain:
    return (TrainHeads if cfg.encoder.checkpoint else Pretrain)(cfg)


def retrain(session: Session) -> Path:
    """Train the reference: from scratch on the retain samples, everything else as in `pretrain`.

    With `audit.reference` the encoders that it names stand in its place; of one without heads they are trained.
    """
    folder = session.out / "retrained"
    method = Retrain(session.cfg)
    if session.cfg.audit.reference:
        for (name, place), digest in zip(references(session.cfg), reference_digests(session), strict=True):
            _take_reference(session, name, place, digest)
        return folder
    _train(session, "retrain", folder, method, training_digest(session, "retrain"), start=None)
    return folder


def _take_reference(session: Session, name: str, place: Path, digest: str) -> None:
    folder, phase = session.out / name, {**PHASES, **BROUGHT}[name]
    if is_done(folder, digest):
        return
    if not place.is_dir():
        encoder = dataclasses.replace(session.cfg.encoder, checkpoint=str(place))
        own = dataclasses.replace(session, cfg=dataclasses.replace(session.cfg, encoder=encoder))
        return _train(own, phase, folder, TrainHeads(own.cfg), digest, start=None)
    facts = {"phase": phase, "digest": digest, **dataclasses.asdict(PhaseResult(0, 0, 0.0, 1, {}))}
    session.world.on_main(lambda: take_from_run(session, place, folder, facts))


def unlearn(session: Session, start: Path | None = None) -> Path:
    """Run the configured method on an encoder, and keep as much of its change as `method.dose` says; returns the
    session's folder, which holds the result.

    start: folder of the finished encoder to begin with; None: the original one in the session's folder.
    """
    cfg = session.cfg
    method = method_class(cfg)(cfg)
    refuse_missing(cfg, {role: len(session.manifest.ids(role)) for role in ROLES})
    digest = unlearn_digest(session)
    if start is not None:
        digest = digest_of(unlearn=digest, start=read_record(start / DONE, DONE_FIELDS)["state"])
    begun = (start or session.out / "original") if method.begins == "original" else None
    if begun is None or not method.dosed(cfg):
        _train(session, "unlearn", session.out, method, digest, start=begun)
        return session.out
    dosed = digest_of(unlearn=digest, amount=str(cfg.method.dose), dose=cfg.dose if cfg.method.dose == "auto" else None)
    if not is_done(session.out, dosed):
        full = session.out / FULL
        _train(session, "unlearn", session.out, method, digest, start=begun, result=full)
        settle_dose(session, begun, full, dosed)
    return session.out


def dose(session: Session) -> dict[str, Any]:
    """Look at every dose of a finished unlearning, and change nothing; returns the figures of `<run>/dose/curve.json`.

    Raises:
        ConfigError: the method begins with other weights than the original encoder's, or trains nothing, so that there
            is no line; or the run has no watch images.
        DataError: the unlearning has not ended.
    """
    cfg = session.cfg
    if not method_class(cfg).dosed(_with_auto(cfg)):
        raise ConfigError(f"method.name={cfg.method.name} does not change the original encoder; it has no dose.")
    refuse_missing(_with_auto(cfg), {role: len(session.manifest.ids(role)) for role in ROLES})
    full = session.out / FULL if method_class(cfg).dosed(cfg) else session.out
    if not (full / DONE).exists():
        raise DataError(f"{session.out} holds no encoder that has forgotten; run unlearn first.")
    return measure_dose(session, session.out / "original", full)


def _with_auto(cfg: RunConfig) -> RunConfig:
    return dataclasses.replace(cfg, method=dataclasses.replace(cfg.method, dose="auto"))


def _train(
    session: Session,
    name: str,
    folder: Path,
    method: Method,
    digest: str,
    start: Path | None,
    result: Path | None = None,
) -> None:
    """Train into `result` (None: `folder`); checkpoints lie in `folder`."""
    result = result or folder
    if is_done(result, digest):
        return
    cfg, backend = session.cfg, session.backend
    backend.world.on_main(lambda: require_same_code(session.ledger, cfg.runtime.accept_code_change))
    trained = load_trained(start, session) if start else _start(session, name)
    notes = None if start else trained.facts.get(CHECKPOINT)
    model = trained.model.to(backend.device)
    queue = trained.queue.to(backend.device) if trained.queue else None
    if name != "pretrain" and queue is not None:
        queue.purge(torch.from_numpy(id_hashes(session.manifest.ids("forget"))))
    if method.steps == "none" or (notes and not trained.model.backbone_frozen):
        facts = dataclasses.asdict(PhaseResult(0, 0, 0.0, 1, {}))
        if notes and queue is not None:
            _fill_queue(session, trained, queue)
    else:
        optim = cfg.unlearn if method.steps == "unlearn" else cfg.pretrain
        optimizer = make_optimizer(optim, model)
        forward = backend.prepare(model, optimizer, clip=optim.clip)
        momentum = trained.momentum
        if momentum is not None:
            backend.follow(momentum)
        ctx = Context(
            cfg=cfg,
            objective=make_objective(cfg.objective),
            model=model,
            forward=forward,
            device=backend.device,
            momentum=momentum,
            queue=queue,
            original=_original(session, start, method),
            rank=backend.world.rank,
            world=backend.world.size,
            plain_forward=backend.plain_forward(),
            note=functools.partial(session.telemetry.note, name),
        )
        feeders = make_feeders(method, optim.accumulate, session.store, session.manifest, backend.world)
        images = next(iter(feeders.values())).cycle.num_ids
        total = cfg.unlearn.steps if method.steps == "unlearn" else pretrain_steps(cfg, images)
        phase = Phase(
            name=name, folder=folder, steps=total, optim=optim, method=method, feeders=feeders,
            sample=session.sample, forget_ids=frozenset(session.manifest.ids(("forget", FORGOTTEN))), digest=digest,
            names_forget="" if name == "pretrain" else "forget", refuse=session.store.undecodable.check,
            begins=trained.facts["state"] if start else None,
        )  # fmt: skip
        records = (session.ledger, session.telemetry, session.stop, session.watch)
        facts = dataclasses.asdict(train_phase(phase, ctx, backend, *records))
    if notes:
        facts |= {CHECKPOINT: notes, CHECKPOINT_SHA256: file_sha256(Path(str(cfg.encoder.checkpoint)))}
    _finish(session, name, result, digest, model, trained, facts)


def _original(session: Session, start: Path | None, method: Method) -> ContrastiveModel | None:
    """A frozen second copy of the encoder that forgetting starts from, for methods that need it."""
    if start is None or "teacher" not in method.needs_for(session.cfg):
        return None
    return load_trained(start, session).model.to(session.backend.device).eval().requires_grad_(False)


def _finish(
    session: Session, name: str, folder: Path, digest: str, model: ContrastiveModel, trained: Trained, facts: dict
) -> None:
    """Write the encoder that `backend` holds into `folder`."""
    backend = session.backend
    fault_injection.reach("finish", None, name)
    state = backend.full_state() if backend.is_prepared else model.state_dict()
    momentum: Mapping[str, Tensor] = {}
    if trained.momentum:
        momentum = backend.full_state(trained.momentum.model) if backend.is_prepared else trained.momentum.state_dict()

    def save() -> None:
        tensors = {f"model.{k}": v for k, v in state.items()}
        tensors |= {f"momentum.{k}": v for k, v in momentum.items()}
        tensors |= {f"queue.{k}": v for k, v in trained.queue.state_dict().items()} if trained.queue else {}
        save_trained(session, folder, tensors, {"phase": name, "digest": digest, **facts})

    backend.world.on_main(save)
    backend.release()


def _start(session: Session, name: str) -> Trained:
    """Where a phase without a predecessor starts: fresh weights, or those of a foreign checkpoint."""
    trained, cfg = scratch(session, name), session.cfg
    brought = bool(cfg.audit.reference) and name.startswith(PHASES["retrained"])
    if cfg.encoder.checkpoint is None or not (name == "pretrain" or brought):
        return trained
    trained.facts[CHECKPOINT] = take_checkpoint(trained, cfg)
    for note in trained.facts[CHECKPOINT]:
        session.telemetry.note(name, note)
    return trained


@torch.no_grad()
def _fill_queue(session: Session, trained: Trained, queue: KeyQueue) -> None:
    """Keys of retained images by the momentum encoder, as many as the queue holds; alike on every rank."""
    cfg, device, momentum = session.cfg, session.backend.device, trained.momentum
    assert momentum is not None, "keys are a momentum encoder's"
    networks = trained.model.to(device).eval(), momentum.to(device).model.eval()
    view = EncoderView(*networks, make_objective(cfg.objective), cfg.views, cfg.seed)
    retained = session.manifest.ids("retain")
    ids = session.store.decodable(retained[:: max(1, len(retained) // queue.size)][: queue.size])
    for start in range(0, len(ids), KEYS_AT_ONCE):
        chunk = ids[start : start + KEYS_AT_ONCE]
        pair = view.views(chunk, session.store.cut, VIEW_EPOCHS["calibration"][0], 2)
        labels = torch.from_numpy(session.manifest.labels(chunk)).to(device)
        queue.push(*view.objective.bank_keys(view.branches(pair, chunk, labels)))
    for network in networks:
        network.train()


def take_checkpoint(trained: Trained, cfg: RunConfig) -> list[str]:
    """Load `encoder.checkpoint`: what was taken and left out, in sentences. Without its heads the backbone is frozen.

    Raises:
        EncoderError, NumericsError: see `load_backbone`.
    """
    loaded = load_checkpoint(trained.model.backbone, cfg.encoder)
    heads = take_heads(trained.model, trained.momentum, loaded)
    if heads is None:
        trained.model.freeze_backbone()
        if trained.momentum is not None:
            trained.momentum = MomentumEncoder(trained.model)
        return [*loaded.notes, NEW_HEADS, *other_heads(loaded, trained.model.embed_dim)]
    if trained.queue is not None:
        heads.notes.append("A queue does not say whose keys it holds; its keys were made anew, of images that stay.")
    return [*loaded.done, *heads.notes, *loaded.left_out(heads.prefixes)]


# -- schedule --------------------------------------------------------------------------------------------------------


def pretrain_steps(cfg: RunConfig, num_samples: int) -> int:
    """Whole epochs in steps of the global batch, rounded up so that every image is seen `epochs` times."""
    return -(-cfg.pretrain.epochs * num_samples // cfg.pretrain.batch)


FEEDER_ROLES = {
    "members": ("retain", "forget"),
    "retain": ("retain",),
    "forget": ("forget",),
    "third_party": ("third_party",),
}


def make_feeders(
    method: Method, accumulate: int, store: ImageStore, manifest: Manifest, world: World
) -> dict[str, RoleFeeder]:
    """One feeder per batch the method asks for.

    They serve micro-batches: number step * accumulate + m holds the m-th part of the rows that the step's batch has.
    """
    share = {"seed": method.cfg.seed, "rank": world.rank, "world": world.size}
    return {
        name: RoleFeeder(
            store, manifest, FEEDER_ROLES[name], batch=size // accumulate, pairs=method.view_pairs(name), **share
        )
        for name, size in method.batch_sizes().items()
    }


def check_coverage(session: Session) -> None:
    """CoverageError on the main process if an unlearning missed a forget image or used one as retained."""
    if not session.world.is_main:
        return
    session.ledger.sync()
    lines = read_ledger(session.ledger.path)
    require_coverage(coverage(lines, session.manifest.ids("forget")), method_class(session.cfg).forgets)
    _require_schedule(session, lines)


def _require_schedule(session: Session, lines: Sequence[dict]) -> None:
    """Every finished training consumed at every step what the schedule says, which follows from the seed.

    Raises:
        EvidenceError: the ledger says otherwise.
    """
    manifest = session.manifest
    makers: dict[str, Callable[[RunConfig], Method]] = {
        "pretrain": _pretraining, "unlearn": lambda cfg: method_class(cfg)(cfg), "retrain": Retrain,
    }  # fmt: skip
    for phase, make in makers.items():
        cfg = phase_settings(session, phase)
        method = make(cfg)
        if not any(line.get("phase") == phase and line["event"] == "done" for line in lines):
            continue
        steps, sizes = effective_steps(lines, phase), method.batch_sizes()
        accumulate = (cfg.unlearn if method.steps == "unlearn" else cfg.pretrain).accumulate
        images = len(manifest.ids(FEEDER_ROLES[next(iter(sizes))]))
        total = cfg.unlearn.steps if method.steps == "unlearn" else pretrain_steps(cfg, images)
        cycle = _forget_cycle(manifest, cfg.seed, sizes["forget"] // accumulate) if "forget" in sizes else None
        for step in range(max(total, len(steps))):
            found = steps.get(step, {})
            named = Counter(found.get("forget", ()))
            draws = range(step * accumulate, (step + 1) * accumulate)
            due = Counter(i for draw in draws for i in cycle.at(draw)[1]) if cycle else Counter()
            expected = {**sizes, "forget": named.total()} if phase == "unlearn" else sizes  # `scrub` ends without them
            counts = {name: n for name, n in found.get("count", {}).items() if name in sizes}
            wrong = named != due if step < method.forget_steps() else named not in (due, Counter())
            if step >= total or not found or wrong or any(expected[name] != n for name, n in counts.items()):
                raise EvidenceError(
                    f"step {step} of {phase} in {session.ledger.path} is not what the seed, the settings and the "
                    f"shards give ({total} steps); the ledger was changed, or is of another run; restore it."
                )


def _forget_cycle(manifest: Manifest, seed: int, batch: int) -> Cycle:
    """Which images to forget each draw has, of all ranks together."""
    return Cycle(lambda epoch: epoch_order(manifest, FEEDER_ROLES["forget"], seed, epoch), batch)
