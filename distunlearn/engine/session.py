"""What the phases of one process share, and the encoders that they leave behind."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from distunlearn.common import plugins
from distunlearn.common.files import write_json
from distunlearn.common.random import STREAMS
from distunlearn.common.tensors import write_tensors
from distunlearn.config.registry import own_attacks
from distunlearn.config.schema import RunConfig
from distunlearn.config.view_recipes import own_view
from distunlearn.constraints.evaluators.base import evaluator_class
from distunlearn.data.loading.image_store import ImageStore, open_store
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.prepare.previous import count_labels
from distunlearn.data.schedule import Batch
from distunlearn.distributed.world import World
from distunlearn.encoders.export import export_backbone
from distunlearn.encoders.model import ContrastiveModel, MomentumEncoder, build_model
from distunlearn.encoders.own_module import is_own, locate
from distunlearn.encoders.weights import check_finite
from distunlearn.engine import fault_injection
from distunlearn.engine.backends import Backend, open_backend
from distunlearn.engine.checkpoint.format import exposed
from distunlearn.engine.commitment import Declared, declared
from distunlearn.engine.ledger import Ledger
from distunlearn.engine.metrics_log import Telemetry
from distunlearn.engine.preemption import StopRequest
from distunlearn.engine.provenance import start_facts
from distunlearn.engine.run_directory import open_run_directory
from distunlearn.engine.trackers import require_trackers
from distunlearn.engine.watchdog import Watch
from distunlearn.errors import DataError
from distunlearn.methods.base import method_class
from distunlearn.objectives import make_objective
from distunlearn.objectives.base import objective_class
from distunlearn.objectives.queue import KeyQueue
from distunlearn.verify.commitment import phase_seed
from distunlearn.verify.records import find_record
from distunlearn.verify.run import DONE, DONE_FIELDS, STATE, require_encoder
from distunlearn.verify.states import export_digests, read_tensors, state_digest


@contextmanager
def open_session(cfg: RunConfig, out: Path, known: Declared | None = None) -> Iterator[Session]:
    """Join the other processes, open the run directory, its shards and its records; closed in reverse. Collective.

    known: the commitment, where it is another run directory's, of which this is a copy; None: see `declared`.

    Raises:
        ConfigError, RankLostError: see `open_backend`.
        ConfigError, DataError, RankLostError: see `open_run_directory`.
    """
    load_own_parts(cfg)
    backend = open_backend(cfg)
    world = backend.world
    world.on_main(lambda: require_trackers(cfg.tracking))
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(open_run_directory(cfg, Path(out), world))
        out, manifest = opened.path, opened.manifest
        limits = (cfg.runtime.watchdog_s, cfg.runtime.watchdog_save_s)
        watch = stack.enter_context(Watch(out, world.rank, world.size, *limits, opened.release))
        fault_injection.reach("session")
        store = open_store(manifest, cfg, backend.device)
        stack.callback(store.close)
        facts = start_facts(cfg, out, world) if world.is_main else {}
        if known is None:
            known = Declared(*world.broadcast_object(world.on_main(lambda: tuple(declared(cfg, out, world, manifest)))))
        path = out / "ledger.jsonl"
        ledger = Ledger(path, is_main=world.is_main, may_write=opened.may_write, facts=facts, anchor=known.digest)
        stack.callback(ledger.close)
        telemetry = stack.enter_context(Telemetry(out, world.is_main, tracking=cfg.tracking))
        if world.is_main and (trouble := exposed(out)):
            telemetry.note("run", f"warning: {trouble}; whoever can write there can change what this run shows")
        stop = stack.enter_context(StopRequest(out))
        yield Session(cfg, out, manifest, store, backend, ledger, telemetry, stop, watch, known.nonce)


def load_own_parts(cfg: RunConfig) -> None:
    """Load what this run has from outside: part of the code that ranks compare and the ledger records."""
    plugins.start_anew()
    method_class(cfg), objective_class(cfg), evaluator_class(cfg), own_view(cfg.views)
    if is_own(cfg.encoder.name):
        locate(cfg.encoder.name)
    own_attacks(cfg.audit.gates.also)


@contextmanager
def seeded(session: Session, phase: str) -> Iterator[Session]:
    """The session with the seed of `unlearn`, `retrain` or the `audit`, see `phase_settings`. Collective."""
    cfg = phase_settings(session, phase)
    if cfg is session.cfg:
        yield session
        return
    with contextlib.closing(open_store(session.manifest, cfg, session.backend.device)) as store:
        yield dataclasses.replace(session, cfg=cfg, store=store)


def phase_settings(session: Session, phase: str) -> RunConfig:
    """The settings with the seed that follows from the nonce of the run's commitment, where there is one."""
    if session.nonce is None or phase == "pretrain":
        return session.cfg
    return dataclasses.replace(session.cfg, seed=phase_seed(session.cfg.seed, session.nonce, phase))


CALIBRATION_LIMIT = 2048  # images a method may calibrate on, per role


@dataclass
class Session:
    """What the phases of one process share."""

    cfg: RunConfig
    out: Path
    manifest: Manifest
    store: ImageStore
    backend: Backend
    ledger: Ledger
    telemetry: Telemetry
    stop: StopRequest
    watch: Watch
    nonce: str | None = None  # of the commitment

    @property
    def world(self) -> World:
        """The processes of the run."""
        return self.backend.world

    @property
    def num_classes(self) -> int | None:
        """Classes of the members, for an objective whose head is a classifier; None for others."""
        if objective_class(self.cfg).head != "classifier":
            return None
        labels = count_labels(self.manifest)
        if labels is None:
            raise DataError(
                f"objective.name={self.cfg.objective.name} needs labels, but not every member has one; expected all."
            )
        return labels

    def sample(self, role: str) -> Batch:
        """The images of a role as one batch, at most `CALIBRATION_LIMIT`, alike on every rank."""
        ids = self.manifest.ids(role)
        if len(ids) > CALIBRATION_LIMIT:
            keep = np.random.default_rng([self.cfg.seed, STREAMS["calibration sample"]]).choice(
                len(ids), CALIBRATION_LIMIT, replace=False
            )
            ids = [ids[i] for i in np.sort(keep)]
        ids = self.store.decodable(ids)
        labels = torch.from_numpy(self.manifest.labels(ids))
        return Batch(ids, np.zeros(len(ids), dtype=np.int64), labels, self.store.cut)


@dataclass
class Trained:
    """An encoder read back from a model folder."""

    model: ContrastiveModel
    momentum: MomentumEncoder | None
    queue: KeyQueue | None
    facts: dict


def is_done(folder: Path, digest: str) -> bool:
    """True if `folder` holds a finished model of exactly these settings.

    Raises:
        DataError: it holds one of other settings, or its weights or its export do not match done.json.
    """
    facts = find_record(folder / DONE, DONE_FIELDS)
    if facts is None:
        return False
    if facts["digest"] != digest:
        raise DataError(
            f"{folder} holds a finished {facts['phase']} of other settings or data; expected this run's own; "
            "choose another --out."
        )
    require_encoder(folder, facts)
    return True


def scratch(session: Session, name: str) -> Trained:
    """Fresh weights, the same for `pretrain` and `retrain`: only the data differ between the two.

    An encoder "trained" by `random_init` draws others, or its audit would compare one start with itself.
    """
    cfg = session.cfg
    seed = cfg if name != "unlearn" else dataclasses.replace(cfg, seed=cfg.seed + 1_000_003)
    model = build_model(seed, session.num_classes)
    objective = make_objective(cfg.objective)
    momentum = MomentumEncoder(model) if objective.needs_momentum else None
    queue = KeyQueue(cfg.objective.queue_size, cfg.objective.output_dim) if objective.uses_queue else None
    return Trained(model, momentum, queue, {})


def save_trained(session: Session, folder: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Write a model folder, on the main rank alone: weights first, `done.json` last.

    tensors: whole, under `model.`, `momentum.` and `queue.`. facts: of `done.json`.

    Raises:
        NumericsError: weights that are not finite; nothing is written.
    """
    check_finite(tensors)
    session.ledger.may_write()
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / STATE, tensors)
    plain = build_model(session.cfg, session.num_classes)
    plain.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    export_backbone(plain.backbone, session.cfg.encoder, folder / "export")
    state = state_digest(read_tensors(folder / STATE))
    session.ledger.state(facts["phase"], facts["steps"], state, final=True)
    session.ledger.sync()
    write_json(folder / DONE, {**facts, "state": state, "export": export_digests(folder / "export")})


def load_trained(folder: Path, session: Session) -> Trained:
    """Read a model folder back.

    Raises:
        DataError: not finished, or the weights or the export differ from what done.json names.
        NumericsError: weights that are not finite.
    """
    facts = find_record(folder / DONE, DONE_FIELDS)
    if facts is None:
        raise DataError(f"{folder} holds no finished encoder ({DONE} is missing); run the phase that trains it first.")
    require_encoder(folder, facts)
    tensors = load_file(folder / STATE)
    check_finite(tensors)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    trained = scratch(session, "pretrain")
    trained.model.load_state_dict(part("model."))
    if trained.momentum is not None:
        trained.momentum.load_state_dict(part("momentum."))
    if trained.queue is not None:
        trained.queue.load_state_dict(part("queue."))
    trained.facts = facts
    return trained


def load_for_all(folder: Path, session: Session) -> Trained:
    """`load_trained` on the main rank, which reads and checks the files; the same encoder on every rank. Collective.

    Its queue is the main rank's alone.
    """
    world = session.world
    trained = world.on_main(lambda: load_trained(folder, session)) or scratch(session, "pretrain")
    trained.facts = world.broadcast_object(trained.facts)
    for network in (trained.model, *([trained.momentum.model] if trained.momentum else [])):
        for tensor in network.to(world.device).state_dict().values() if world.size > 1 else ():
            dist.broadcast(tensor, src=0)
    return trained
