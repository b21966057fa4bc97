"""The run directory: where its shards and manifest lie, which settings it belongs to, and how an attempt opens it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distunlearn.common.files import write_json
from distunlearn.common.launcher import is_main, number
from distunlearn.config.checks import batch_problems
from distunlearn.config.load import load_config, save_config
from distunlearn.config.schema import RunConfig
from distunlearn.config.shape import field_diff, marked
from distunlearn.data.loading.verify import verify_shards
from distunlearn.data.manifest.manifest import Manifest, has_index
from distunlearn.data.manifest.records import FORGOTTEN, Remote
from distunlearn.data.manifest.request import has_request
from distunlearn.data.prepare.selection import check_list, draw_request
from distunlearn.data.storage.object_store_cache import verify_objects
from distunlearn.distributed.meeting import Meeting
from distunlearn.distributed.world import World
from distunlearn.engine.environment import environment
from distunlearn.engine.provenance import require_one_run
from distunlearn.engine.run_lock import Lease
from distunlearn.errors import ConfigError, DataError
from distunlearn.verify.records import find_record
from distunlearn.verify.run import DONE


def shards_folder(cfg: RunConfig, out: Path) -> Path:
    """Where the shards of a run lie."""
    if cfg.data.shards:
        return Path(cfg.data.shards).expanduser()
    if cfg.runtime.reuse:
        return shards_folder(saved_config(Path(cfg.runtime.reuse), world=1), Path(cfg.runtime.reuse))
    return Path(out) / "shards"


def shards_remote(cfg: RunConfig) -> Remote | None:
    """The object store that holds the shards of a run; None: they lie in `shards_folder`."""
    data = cfg.data
    if data.store:
        return Remote(data.store, data.read_retries, data.store_cache, data.store_cache_mib)
    return (
        shards_remote(saved_config(Path(cfg.runtime.reuse), world=1)) if cfg.runtime.reuse and not data.shards else None
    )


def find_manifest(cfg: RunConfig, out: Path | None) -> Manifest | None:
    """The index of a run's shards with the roles of its request, all `unused` where it has none yet; None: no index.

    out: run directory; None: there is none.

    Raises:
        DataError: index or request are damaged, or not of each other; or there is no index of shards in an object
            store, where `prepare` writes none.
    """
    folder, remote = shards_folder(cfg, out or Path()), shards_remote(cfg)
    if has_index(folder):
        return Manifest.load(folder, remote, out if out and has_request(out) else None)
    if remote is not None:
        raise DataError(
            f"{folder} holds no index of the shards in {remote.url}; copy index.arrow and summary.json there, or "
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
    return load_config(None, path, [], world=world, begun=True)


def refuse_other_settings(cfg: RunConfig, out: Path) -> None:
    """Raise ConfigError if the run directory belongs to a run with other settings."""
    path = out / "run.yaml"
    if not path.exists():
        return
    free = set(marked(cfg, "affects"))
    differences = {k: v for k, v in field_diff(saved_config(out, world=1), cfg).items() if k not in free}
    if differences:
        shown = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in list(differences.items())[:5])
        raise ConfigError(f"{out} belongs to a run with other settings ({shown}); choose another --out.")


def refuse_large_batches(cfg: RunConfig, counts: Mapping[str, int]) -> None:
    """ConfigError if a batch is larger than its role turned out to be. counts: images by role."""
    problems = list(batch_problems(cfg, counts))
    if problems:
        raise ConfigError(f"{'; '.join(problems)}.")


def claim(cfg: RunConfig, out: Path) -> None:
    """The run directory belongs to one config: write it, or refuse another."""
    refuse_other_settings(cfg, out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "run.yaml").exists():
        save_config(cfg, out / "run.yaml")


@dataclass(frozen=True)
class RunDirectory:
    """A run directory that this attempt may write into, and its images with their roles.

    may_write, release (None but on the main rank): to be called before anything is written, raises RankLostError once
        another attempt has claimed the directory; and gives it back.
    """

    path: Path
    manifest: Manifest
    may_write: Callable[[], None] | None
    release: Callable[[], None] | None


@contextmanager
def open_run_directory(cfg: RunConfig, out: Path, world: World) -> Iterator[RunDirectory]:
    """Open `out` for one attempt at a run; given back at the end. Collective.

    Whatever is refused is refused before anything is written. Then the main rank claims the directory, keeps settings,
    roles and environment in it, and copies finished encoders from the run that `runtime.reuse` names.

    Raises:
        ConfigError: it belongs to a run with other settings, or another process is at work in it.
        DataError: its shards are missing, purged, or not as their manifest says.
        RankLostError: the ranks do not run the same.
    """
    with Meeting(world):  # what one rank finds wrong is said by all
        manifest = verified_manifest(cfg, out, world) or Manifest.load(shards_folder(cfg, out))  # which says what lacks
    fresh = not has_request(out)
    if fresh:  # the same on every rank
        manifest = draw_request(cfg.data, cfg.seed, manifest, foreign=cfg.encoder.checkpoint is not None)
    refuse_large_batches(cfg, manifest.count_roles())
    require_one_run(world, cfg, manifest)
    lease = world.on_main(lambda: _begin(cfg, out, manifest if fresh else None))
    try:
        yield RunDirectory(out, manifest, lease.check if lease else None, lease.release if lease else None)
    finally:
        if lease is not None:
            lease.release()


def _begin(cfg: RunConfig, out: Path, request: Manifest | None) -> Lease:
    """The main rank's part: the claim, and what is written with it. All ranks have the same settings by now."""
    refuse_other_settings(cfg, out)
    require_reusable(cfg)
    out.mkdir(parents=True, exist_ok=True)
    lease = Lease(out)
    try:
        claim(cfg, out)
        if request is not None:
            request.save_request(out)
        if not (out / "env.json").exists():
            write_json(out / "env.json", environment())
        if cfg.runtime.reuse:
            # With a nonce of its own a run trains a retrained encoder of its own.
            other = cfg.evidence.commitment or cfg.audit.reference
            names = ("original",) if other else ("original", "retrained")
            _take_over(Path(cfg.runtime.reuse).expanduser(), out, names)
    except BaseException:
        lease.release()
        raise
    return lease


def verified_manifest(cfg: RunConfig, out: Path | None, world: World | None = None) -> Manifest | None:
    """`find_manifest`, whose shards are as it says and lack none of the request's images; None if there is none yet.

    world: whose ranks share the work; None: this process does it alone.

    Raises:
        DataError: see `find_manifest`; images were purged, or shards are not as it says; the list has changed since.
    """
    manifest = find_manifest(cfg, out)
    if manifest is not None:
        _verify(cfg, manifest, world)
    return manifest


def _verify(cfg: RunConfig, manifest: Manifest, world: World | None) -> None:
    """Shards against the manifest: lengths by one process of a machine; digests, where asked for, once in each process,
    every rank its share. Before the ranks of a launch have met digests wait until then.

    Of shards in an object store both are compared on one process; every process compares the length of what it reads.
    """
    needed = {role: count for role, count in manifest.lost.items() if role != FORGOTTEN}
    if needed:
        gone = ", ".join(f"{count} {role}" for role, count in needed.items())
        raise DataError(
            f"Images of this request were purged from {manifest.folder} ({gone}), but training and audits need them; "
            "the report can still be made, and another request can use the shards from another --out."
        )
    if cfg.encoder.checkpoint is not None and manifest.facts.get("non_members") == "drawn":
        raise ConfigError(
            f"encoder.checkpoint was trained elsewhere, but the non-members in {manifest.folder} were drawn among "
            "images that it may have seen; prepare anew with data.holdout_root, or with a list that gives roles."
        )
    check_list(cfg.data, manifest)
    key = (str(manifest.folder), manifest.place, manifest.index_sha256, cfg.data.verify)
    deep = cfg.data.verify == "digest" and key not in _VERIFIED
    if manifest.remote is None:
        deep = deep and (world is not None or number("WORLD_SIZE", 1) == 1)
        rank, size = (0, 1) if world is None else (world.rank, world.size)
        sizes = world is None or number("LOCAL_RANK", 0) == 0
        verify_shards(manifest, deep, sizes, slice(rank, None, size))
    elif is_main() and key not in _VERIFIED:
        verify_objects(manifest, deep=deep)
    if deep or manifest.remote is not None:
        _VERIFIED.add(key)


_VERIFIED: set[tuple[str, ...]] = set()


def require_reusable(cfg: RunConfig) -> None:
    """DataError if `runtime.reuse` names a run that has no finished original encoder: it would be trained anew."""
    source = Path(cfg.runtime.reuse or "").expanduser()
    if cfg.runtime.reuse and find_record(source / "original" / DONE) is None:
        raise DataError(
            f"runtime.reuse names {source}, which has no finished original encoder (original/{DONE} is missing); "
            "finish that run (pretrain) first, or leave runtime.reuse out."
        )


def _take_over(source: Path, out: Path, names: Sequence[str]) -> None:
    """Copy finished encoders of a run; their digests are checked when they are used."""
    for name in names:
        if (source / name / "done.json").exists() and not (out / name).exists():
            partial = out / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source / name, partial, ignore=shutil.ignore_patterns("checkpoints"))
            os.replace(partial, out / name)
