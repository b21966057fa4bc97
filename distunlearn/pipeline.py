"""The verbs: what each command does, in order, on files of the run directory.

prepare -> pretrain -> unlearn -> (retrain) -> audit -> report. `run` is all of them. Every verb may be
repeated: what is finished is checked and kept, what was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from distunlearn.config import RunConfig
from distunlearn.config_io import field_diff, load_config, save_config
from distunlearn.errors import EXIT_GATE_FAILED, EXIT_INCONCLUSIVE, ConfigError, DataError, StoppedError

if TYPE_CHECKING:
    from distunlearn.data.manifest import Manifest
    from distunlearn.data.stores import Remote
    from distunlearn.target import Target

__all__ = ["audit", "plan", "prepare", "pretrain", "purge", "report", "run", "unlearn"]

VERDICT_CODES = {"pass": 0, "fail": EXIT_GATE_FAILED, "inconclusive": EXIT_INCONCLUSIVE}


def prepare(cfg: RunConfig, out: Path) -> str:
    """Sources to shards, a manifest and a summary in `data.shards` or `<out>/shards`; returns a line that says what."""
    from distunlearn.data.selection import check_selection
    from distunlearn.preparing import describe, make_shards

    manifest = find_manifest(cfg, out)
    if manifest is None:
        return describe(make_shards(cfg, shards_folder(cfg, out)))
    verify(cfg, manifest)
    check_selection(cfg.data, cfg.seed, manifest)
    return describe(manifest)


def pretrain(cfg: RunConfig, out: Path) -> None:
    """Train the original encoder on retain and forget samples."""
    from distunlearn.engine import phases

    with _session(cfg, out) as session:
        phases.pretrain(session)


def unlearn(cfg: RunConfig, out: Path) -> None:
    """Run the method on the original encoder.

    Raises:
        CoverageError: a forget sample never entered the loss of a method that forgets, or entered it as retain.
    """
    from distunlearn.audit.nested import check_coverage
    from distunlearn.engine import phases

    with _session(cfg, out) as session:
        phases.unlearn(session)
        check_coverage(session)


def audit(run_dir: Path, cfg: RunConfig | None = None) -> int:
    """Train the retrained reference where it is missing, attack all three encoders, judge the gates.

    cfg: settings of this attempt, where keys that change no result differ from those saved; None: the saved ones.

    Returns:
        0 if every gate passes, 6 if one fails, 7 if none fails but one is inconclusive.

    Raises:
        CoverageError: as `unlearn`; evidence about a run that missed images would mislead.
    """
    from distunlearn.audit.evidence import collect_evidence
    from distunlearn.audit.nested import check_coverage
    from distunlearn.audit.shadows import audit_shadows
    from distunlearn.audit.stress import audit_stress
    from distunlearn.engine import phases

    cfg = cfg or saved_config(run_dir)
    with _session(cfg, run_dir) as session:
        if (Path(run_dir) / "done.json").exists():  # else the missing encoder itself is what to complain about
            check_coverage(session)
        if cfg.audit.tier:
            phases.retrain(session)
        if session.stop.agreed(session.backend):
            reason = session.stop.honoured(session.backend)
            raise StoppedError(f"stopped by {reason} before the audit; the same command goes on from there.")
        pooled = audit_shadows(session) if cfg.audit.tier == 2 else None
        stressed = audit_stress(session) if cfg.audit.stress else None
        verdict = collect_evidence(session, pooled, stressed) if session.backend.is_main else None
        session.backend.barrier()
        verdict = session.backend.broadcast_object(verdict)
    return VERDICT_CODES[verdict]


def purge(run_dir: Path, apply: bool = False) -> dict:
    """Take the images that the run forgot out of its shards; without `apply` only say what would happen.

    After it the run's report can still be made, but none of its encoders can be trained or audited again.

    Returns:
        plain JSON: what is, or would be, removed; with `apply` it is also kept as `purge.json` in the run directory.

    Raises:
        DataError: the run has not forgotten yet, was not audited, or its shards are not as the manifest says.
        ConfigError: its shards lie in an object store.
    """
    from distunlearn.data.manifest import Manifest
    from distunlearn.data.purge import ids_digest, plan_purge, purge_shards, purged_before
    from distunlearn.engine.checkpoint import write_json

    cfg, folder = saved_config(run_dir, world=1), Path(run_dir)
    remote = shards_remote(cfg)
    if remote is not None:
        raise ConfigError(
            f"the shards of {folder} lie in {remote.url}, and only local shards can be purged; purge a local copy of "
            "them and put it in their place."
        )
    for name, verb in (("done.json", "unlearn"), ("audit/summary.json", "audit")):
        if not (folder / name).exists():
            raise DataError(
                f"{folder} has no {name}, so its images are still needed; finish the run ({verb}) before purging them."
            )
    shards = shards_folder(cfg, folder)
    facts: dict = {"applied": apply, "shards_folder": str(shards)}
    done = purged_before(shards)
    if done is None:
        manifest = Manifest.load(shards)
        ids = manifest.ids("forget")
        facts["ids_sha256"] = ids_digest(ids)
        done = purge_shards(shards, ids) if apply else plan_purge(manifest, ids)
    facts |= done.facts()
    if apply and ("ids_sha256" in facts or not (folder / "purge.json").exists()):
        write_json(folder / "purge.json", facts)
    return facts


def report(run_dir: Path) -> Path:
    """Write `report.html` from what the audit saved."""
    from distunlearn.report import write_report

    return write_report(Path(run_dir))


def run(cfg: RunConfig, out: Path) -> int:
    """All verbs in order; the exit code is the audit's. What `plan` finds is refused before anything is written."""
    from distunlearn.encoders.compiled import require_compiler
    from distunlearn.engine.backends import open_backend
    from distunlearn.engine.backends.process_group import wait_for_all
    from distunlearn.planning import make_plan

    planned = make_plan(cfg, out)
    if cfg.compile:
        require_compiler()

    def begin() -> None:
        _refuse_other_settings(cfg, out)
        prepare(cfg, out)  # all shards or nothing, so that an image that is refused leaves no run directory behind
        _claim(cfg, out)
        write_plan(planned, out)

    open_backend(cfg).on_main(begin)  # what the main process refuses ends the others, too
    pretrain(cfg, out)
    unlearn(cfg, out)
    code = audit(out, cfg)
    if _is_main():
        report(out)
    wait_for_all()  # a launcher ends all processes when the first leaves with a code, while this one still writes
    return code


# -- the run directory -----------------------------------------------------------------------------------------------


def shards_folder(cfg: RunConfig, out: Path) -> Path:
    """Where the shards of a run lie."""
    if cfg.data.shards:
        return Path(cfg.data.shards).expanduser()
    if cfg.reuse:
        return shards_folder(saved_config(Path(cfg.reuse), world=1), Path(cfg.reuse))
    return Path(out) / "shards"


def shards_remote(cfg: RunConfig) -> Remote | None:
    """The object store that holds the shards of a run; None: they lie in `shards_folder`."""
    from distunlearn.data.stores import Remote

    data = cfg.data
    if data.store:
        return Remote(data.store, data.read_retries, data.store_cache, data.store_cache_mib)
    return shards_remote(saved_config(Path(cfg.reuse), world=1)) if cfg.reuse and not data.shards else None


def find_manifest(cfg: RunConfig, out: Path) -> Manifest | None:
    """The manifest of a run's shards, which knows where they lie; None if there is none yet.

    Raises:
        DataError: the manifest is damaged; or there is none of shards in an object store, where `prepare` writes none.
    """
    from distunlearn.data.manifest import Manifest, has_manifest

    folder, remote = shards_folder(cfg, out), shards_remote(cfg)
    if has_manifest(folder):
        return Manifest.load(folder, remote)
    if remote is not None:
        raise DataError(
            f"{folder} holds no manifest of the shards in {remote.url}; copy manifest* and summary.json there, or "
            "index the shards."
        )
    return None


def saved_config(run_dir: Path, world: int | None = None) -> RunConfig:
    """The resolved config of a run directory.

    world: number of processes it is to run on now; None: what the launcher announced. 1 where it is only looked at,
        for a run may reuse or continue one that had another number of processes.

    Raises:
        DataError: there is none.
    """
    path = Path(run_dir) / "run.yaml"
    if not path.exists():
        raise DataError(f"{run_dir} is not a run directory (run.yaml is missing); give the --out folder of a run.")
    return load_config(None, path, [], world=world)


def _refuse_other_settings(cfg: RunConfig, out: Path) -> None:
    """Raise ConfigError if the run directory belongs to a run with other settings."""
    path = out / "run.yaml"
    if not path.exists():
        return
    differences = field_diff(saved_config(out, world=1), cfg)
    differences = {k: v for k, v in differences.items() if k not in FREE_KEYS}
    if differences:
        shown = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in list(differences.items())[:5])
        raise ConfigError(f"{out} belongs to a run with other settings ({shown}); choose another --out.")


def _claim(cfg: RunConfig, out: Path) -> None:
    """The run directory belongs to one config: write it, or refuse another."""
    _refuse_other_settings(cfg, out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "run.yaml").exists():
        save_config(cfg, out / "run.yaml")


def verify(cfg: RunConfig, manifest: Manifest) -> None:
    """Shards against the manifest: sizes always; digests, where asked for, once per process and on one process.

    Of shards in an object store both are compared on one process; every process compares the length of what it reads.
    """
    from distunlearn.data.selection import check_list
    from distunlearn.data.shards import verify_shards
    from distunlearn.data.store_cache import verify_objects

    if "purged" in manifest.info:
        raise DataError(
            f"{manifest.folder} holds shards from which {manifest.info['purged']['images']} forgotten images were "
            "purged, but training and audits need them; prepare new shards for another run, or make this run's report."
        )
    check_list(cfg.data, manifest)
    key = (str(manifest.folder), manifest.place, manifest.fingerprint, cfg.data.verify)
    deep = cfg.data.verify == "digest" and _is_main() and key not in _VERIFIED
    if manifest.remote is None:
        verify_shards(manifest, deep=deep)
    elif _is_main() and key not in _VERIFIED:
        verify_objects(manifest, deep=deep)
    if deep or manifest.remote is not None:
        _VERIFIED.add(key)


_VERIFIED: set[tuple[str, ...]] = set()

FREE_KEYS = (
    "backend", "threads", "activation_checkpointing", "compile", "data.cache_mib", "data.verify", "data.shards",
    "data.store", "data.store_cache", "data.store_cache_mib", "data.prepare_workers", "data.root",
    "data.third_party_root", "data.workers", "data.prefetch", "data.read_retries", "data.max_undecodable", "reuse",
    "checkpoint.asynchronous", "checkpoint.sharded", "watchdog_s", "watchdog_save_s", "join_s", "accept_code_change",
)  # fmt: skip


def _is_main() -> bool:
    """Before the process group exists only the launcher's RANK tells."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _session(cfg: RunConfig, out: Path) -> Iterator:
    from distunlearn.data.manifest import Manifest
    from distunlearn.data.stream import open_store
    from distunlearn.doctor import environment
    from distunlearn.engine import faults
    from distunlearn.engine.backends import open_backend
    from distunlearn.engine.checkpoint import write_json
    from distunlearn.engine.lease import Lease
    from distunlearn.engine.ledger import Ledger
    from distunlearn.engine.phases import Session
    from distunlearn.engine.provenance import require_one_run
    from distunlearn.engine.stopping import StopRequest
    from distunlearn.engine.telemetry import Telemetry
    from distunlearn.engine.watch import Watch

    out = Path(out)
    backend = open_backend(cfg)
    manifest = Manifest.load(shards_folder(cfg, out), shards_remote(cfg))
    verify(cfg, manifest)
    with contextlib.ExitStack() as stack:
        may_write = None
        if backend.is_main:
            _claim(cfg, out)
            lease = Lease(out)
            stack.callback(lease.release)
            may_write = lease.check
            if not (out / "env.json").exists():
                write_json(out / "env.json", environment())
        backend.barrier()
        last = lease.release if backend.is_main else None
        limits = (cfg.watchdog_s, cfg.watchdog_save_s)
        watch = stack.enter_context(Watch(out, backend.rank, backend.world, *limits, last))
        require_one_run(backend, cfg, manifest)
        faults.reach("session")
        if backend.is_main and cfg.reuse:
            _take_over(cfg, out)
        backend.barrier()
        store = open_store(manifest, cfg)
        stack.callback(store.close)
        ledger = Ledger(out / "ledger.jsonl", is_main=backend.is_main, may_write=may_write)
        stack.callback(ledger.close)
        telemetry = stack.enter_context(Telemetry(out, backend.is_main))
        stop = stack.enter_context(StopRequest(out))
        yield Session(cfg, out, manifest, store, backend, ledger, telemetry, stop, watch)


def _take_over(cfg: RunConfig, out: Path) -> None:
    """Copy the finished original and retrained encoders of `reuse`; their digests are checked when they are used."""
    source = Path(cfg.reuse).expanduser()
    for name in ("original", "retrained"):
        if (source / name / "done.json").exists() and not (out / name).exists():
            partial = out / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source / name, partial, ignore=shutil.ignore_patterns("checkpoints"))
            os.replace(partial, out / name)


# -- plan ------------------------------------------------------------------------------------------------------------


def plan(cfg: RunConfig, out: Path | None, target: Target | None = None) -> dict:
    """Everything that a run would do, checked and counted, with nothing written; on which GPUs, if `target` says so."""
    from distunlearn.planning import make_plan

    if target is None or not target.gpu:
        if target is not None:
            target.check()
        return make_plan(cfg, out)
    from distunlearn.planning_costs import check_target, estimate

    check_target(cfg, target)  # before data are looked at
    planned = make_plan(cfg, out)
    planned["estimate"] = estimate(cfg, planned["phases"], target, planned["encoder"]["classes"])
    return planned


def write_plan(planned: dict, out: Path) -> None:
    """Keep the plan beside the run it describes."""
    from distunlearn.engine.checkpoint import write_json

    write_json(Path(out) / "plan.json", planned)
