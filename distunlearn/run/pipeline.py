"""The verbs: what each command does, in order, on files of the run directory.

prepare -> pretrain -> unlearn -> (retrain) -> audit -> report. `run` is all of them. Every verb may be
repeated: what is finished is checked and kept, what was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distunlearn.audit.run_audit import collect_evidence
from distunlearn.audit.trainings.shadows import audit_shadows
from distunlearn.audit.trainings.stress import audit_stress
from distunlearn.common.launcher import is_main
from distunlearn.config.checks import forget_is_file
from distunlearn.config.load import load_config
from distunlearn.config.schema import RunConfig
from distunlearn.config.yaml import parse_scalar
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.manifest.request import has_request
from distunlearn.data.prepare.selection import check_selection, draw_request, without_chain
from distunlearn.distributed.process_group import wait_for_all
from distunlearn.encoders.compile import require_compiler
from distunlearn.engine import phases
from distunlearn.engine.backends import open_backend
from distunlearn.engine.phases import check_coverage
from distunlearn.engine.preemption import stop_kept
from distunlearn.engine.references import require_runs
from distunlearn.engine.run_directory import (
    refuse_other_settings,
    require_reusable,
    saved_config,
    shards_folder,
    verified_manifest,
)
from distunlearn.engine.run_lock import refuse_if_owned
from distunlearn.engine.session import open_session, seeded
from distunlearn.engine.trackers import require_trackers
from distunlearn.errors import EXIT_GATE_FAILED, EXIT_INCONCLUSIVE, ConfigError, DataError, StoppedError
from distunlearn.plan.plan import make_plan, write_plan
from distunlearn.report.render import write_report
from distunlearn.run.chain import keep_chain
from distunlearn.run.prepare import describe, index_folder, make_shards

VERDICT_CODES = {"pass": 0, "fail": EXIT_GATE_FAILED, "inconclusive": EXIT_INCONCLUSIVE}


def prepare(cfg: RunConfig, out: str | Path) -> str:
    """Shards with their index in `data.shards` or `<out>/shards`, unless they are there, and the roles of this request
    in `out`; returns a line that says what.
    """
    out = Path(out)
    refuse_if_owned(out)
    manifest, foreign = verified_manifest(cfg, out), cfg.encoder.checkpoint is not None
    if manifest is not None and has_request(out):
        if not (out / "run.yaml").exists():  # whose settings are compared else, and the source is not needed
            check_selection(cfg.data, cfg.seed, manifest)
        require_runs(cfg, out, manifest)
        return describe(manifest)
    if manifest is None:
        manifest = without_chain(cfg.data, make_shards(cfg, shards_folder(cfg, out)))
    elif cfg.runtime.reuse:
        manifest = Manifest.load(manifest.folder, manifest.remote, Path(cfg.runtime.reuse).expanduser())
        check_selection(cfg.data, cfg.seed, manifest)
    else:
        manifest = draw_request(cfg.data, cfg.seed, manifest, foreign=foreign)
    require_runs(cfg, out, manifest)  # one that is refused leaves no roles behind
    manifest.save_request(out)
    return describe(manifest)


def index(cfg: RunConfig) -> str:
    """The index of the shards in `data.root`, written beside them; returns a line that says what."""
    return describe(index_folder(cfg, Path(str(cfg.data.root))))


def pretrain(cfg: RunConfig, out: str | Path, planned: dict | None = None) -> None:
    """Train the original encoder on retain and forget samples. planned: what `begin` found, to be kept."""
    with open_session(cfg, Path(out)) as session:
        if planned is not None:
            session.world.on_main(lambda: write_plan(planned, Path(out)))
        phases.pretrain(session)


def unlearn(cfg: RunConfig, out: str | Path) -> None:
    """Run the method on the original encoder.

    Raises:
        CoverageError: a forget sample never entered the loss of a method that forgets, or entered it as retain.
    """
    with open_session(cfg, Path(out)) as session:
        with seeded(session, "unlearn") as own:
            phases.unlearn(own)
        check_coverage(session)
        if session.world.is_main:
            keep_chain(session.cfg, session.out, session.manifest)


def dose(run_dir: str | Path) -> dict[str, Any]:
    """Look at every dose of a run that has unlearned, and change nothing; the figures of `<run>/dose/curve.json`."""
    with open_session(saved_config(Path(run_dir)), Path(run_dir)) as session:
        with seeded(session, "unlearn") as own:
            return phases.dose(own)


def audit(run_dir: str | Path, cfg: RunConfig | None = None) -> int:
    """Train the retrained reference where it is missing, attack all three encoders, judge the gates.

    cfg: settings of this attempt, where keys that change no result differ from those saved; None: the saved ones.

    Returns:
        0 if every gate passes, 6 if one fails, 7 if none fails but one is inconclusive.

    Raises:
        CoverageError: as `unlearn`; evidence about a run that missed images would mislead.
    """
    run_dir = Path(run_dir)
    cfg = cfg or saved_config(run_dir)
    with open_session(cfg, run_dir) as session:
        if (Path(run_dir) / "done.json").exists():  # else the missing encoder itself is what to complain about
            check_coverage(session)
        if cfg.audit.tier:
            with seeded(session, "retrain") as own:
                phases.retrain(own)
        if session.stop.agreed(session.world):
            reason = session.stop.honoured(session.world)
            raise StoppedError(f"stopped by {reason} before the audit; the same command goes on from there.")
        pooled = audit_shadows(session) if cfg.audit.tier == 2 else None
        stressed = audit_stress(session) if cfg.audit.stress else None
        with seeded(session, "audit") as own:
            verdict = collect_evidence(own, pooled, stressed)
    return VERDICT_CODES[verdict]


def report(run_dir: str | Path) -> Path:
    """Write `report.html` from what the audit saved."""
    return write_report(Path(run_dir))


def next_config(previous: Path, overrides: Sequence[str], world: int | None = None) -> RunConfig:
    """Settings of the next request on what a run has left: its own, with what the overrides change.

    A list is read as the one before it was (`data.forget_by`, `data.forget_column`), if the overrides do not say.

    Raises:
        ConfigError: no override names what to forget now. DataError: there is no finished run.
    """
    previous = Path(previous).expanduser().resolve()
    saved = saved_config(previous, world=1)
    if not (previous / "done.json").exists():
        raise DataError(f"{previous} has not forgotten yet (done.json is missing); finish that run first.")
    asked = [text.partition("=")[2] for text in overrides if text.partition("=")[0].strip() == "data.forget"]
    if not asked:
        raise ConfigError(f"--previous {previous} needs what to forget now; give --set data.forget=LIST.")
    shards = shards_folder(saved, previous).resolve()
    own = {"data.previous": str(previous), "data.shards": str(shards), "data.members": None, "data.exclude": None,
           "encoder.checkpoint": None, "runtime.reuse": None, "runtime.accept_code_change": False,
           "evidence.commitment": None}  # fmt: skip
    if not forget_is_file(parse_scalar(asked[-1], "data.forget")):  # what says how a list names images is of a list
        own |= {"data.forget_column": None, "data.forget_by": "id"}
    given = [f"{key}={'' if value is None else json.dumps(value)}" for key, value in own.items()]
    return load_config(None, previous / "run.yaml", [*given, *overrides], world=world)


def begin(cfg: RunConfig, out: str | Path) -> dict:
    """Check everything and make the shards; returns the plan, which `pretrain` keeps. Collective."""
    out = Path(out)
    planned = make_plan(cfg, out)
    if cfg.runtime.compile:
        require_compiler()

    def make_ready() -> None:
        require_trackers(cfg.tracking)
        refuse_other_settings(cfg, out)
        require_reusable(cfg)
        refuse_if_owned(out)
        prepare(cfg, out)  # all shards or nothing, so that an image that is refused leaves no run directory behind

    open_backend(cfg).world.on_main(make_ready)  # what the main process refuses ends the others, too
    return planned


def run(cfg: RunConfig, out: str | Path) -> int:
    """All verbs in order; the exit code is the audit's. What `plan` finds is refused before anything is written."""
    planned = begin(cfg, out)
    with stop_kept():  # one that comes between two verbs is for the next
        pretrain(cfg, out, planned)
        unlearn(cfg, out)
        code = audit(out, cfg)
    if is_main():
        report(out)
    wait_for_all()  # a launcher ends all processes when the first leaves with a code, while this one still writes
    return code
