"""`pool` and `run --seeds`: one verdict and one report over several runs of one kind of request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distunlearn.common.files import write_json
from distunlearn.common.launcher import is_main
from distunlearn.config.schema import RunConfig
from distunlearn.config.shape import field_diff, marked
from distunlearn.engine.run_directory import refuse_other_settings, saved_config
from distunlearn.errors import ConfigError, DataError
from distunlearn.report import facts
from distunlearn.report.data import RunFiles, checked_run, tree
from distunlearn.report.pool import POOL, pool_ending, write_pool_report
from distunlearn.run import pipeline
from distunlearn.run.status import run_status
from distunlearn.verify.commitment import run_rules
from distunlearn.verify.figures import ENCODERS, plain
from distunlearn.verify.pool import judge_pool
from distunlearn.verify.scores import raw_scores, read_scores

JUDGED_ROLES = ("forget", "holdout")
SHOWN_DIFFERENCES = 3


def run_seeds(configs: Mapping[int, RunConfig], out: Path) -> list[Path]:
    """Run each of the configs, by seed, in `<out>/seed-N`; those that are finished are kept. Returns the folders."""
    folders = {seed: Path(out) / f"seed-{seed}" for seed in configs}
    for seed, folder in folders.items():
        refuse_other_settings(configs[seed], folder)
        if not folder.exists() or run_status(folder)["next"] is not None:
            pipeline.run(configs[seed], folder)
    return list(folders.values())


def pool(run_dirs: Sequence[Path], out: Path) -> tuple[dict[str, Any], str]:
    """Judge the runs as one; the main process writes `<out>/pool.json` and the report.

    Returns:
        what `pool.json` holds, with the verdict as `gates.verdict`, and the last words for a terminal.

    Raises:
        ConfigError: fewer than two runs, one twice, runs of other settings, requests or encoders, or `out` is a run.
        DataError: a run is not audited, has no retrained encoder, or a file of it is missing or contradicts another.
    """
    folders, out = [Path(folder).expanduser() for folder in run_dirs], Path(out)
    if len(folders) < 2:
        raise ConfigError(f"{len(folders)} run is nothing to pool; give two or more run directories.")
    if (out / "run.yaml").exists():
        raise ConfigError(f"{out} is a run directory; give another --out for the pool.")
    runs = [_whole(folder) for folder in folders]
    scores = [read_scores(folder / "audit") for folder in folders]
    images = [_images(files["original"]["samples"]) for files in scores]
    _require_alike(folders, runs, images)
    shared = all(found == images[0] for found in images)
    if shared:  # in one order, so that they share their draws
        scores = [{e: {**c, "samples": dict(sorted(c["samples"].items()))} for e, c in f.items()} for f in scores]
    rules = [run_rules(run.config, folder) for run, folder in zip(runs, folders, strict=True)]
    unchanged = any(run.audit["states"]["original"] == run.audit["states"]["unlearned"] for run in runs)
    judged = judge_pool([raw_scores(files) for files in scores], rules, shared=shared, unchanged=unchanged)
    members = [_member(folder, run) for folder, run in zip(folders, runs, strict=True)]
    twice = sum(len(found) for found in images) - len(set().union(*images))
    told = {"runs": members, "same_images": shared, "images_in_several_runs": twice, **plain(judged)}
    if is_main():
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / POOL, told)
        write_pool_report(out, runs, told)
    return told, pool_ending(out, runs, told)


def _whole(folder: Path) -> RunFiles:
    """A finished run, checked against itself as far as a pass needs it."""
    run = checked_run(folder)
    if not run.audit:
        raise DataError(f"{folder} has not been audited; run `distunlearn audit {folder}` first.")
    if "retrained" not in run.scores:
        raise DataError(
            f"{folder} has no retrained encoder to compare with (audit.tier is 0); pool runs that have one."
        )
    if len(tree(run.config, "audit").get("reference") or ()) > 1:
        raise DataError(f"{folder} compares with more than one encoder that was brought; pool runs that have one.")
    if run.checked.gaps:
        raise DataError(f"{folder} cannot be pooled: {' '.join(run.checked.gaps)} Restore what is missing.")
    covered = facts.coverage(run)
    if covered["state"] == "fail":
        raise DataError(f"{folder} cannot be pooled: {covered['sentence']} Pool runs that processed every image.")
    return run


def _images(samples: dict[str, Any]) -> frozenset[tuple[str, str]]:
    """(role, id) of the images that are judged."""
    return frozenset((row["role"], name) for name, row in samples.items() if row["role"] in JUDGED_ROLES)


def _require_alike(folders: Sequence[Path], runs: Sequence[RunFiles], images: Sequence[frozenset]) -> None:
    configs = [saved_config(folder, world=1) for folder in folders]
    seen: dict[tuple[str, ...], Path] = {}
    for folder, run, cfg, found in zip(folders, runs, configs, images, strict=True):
        states = tuple(str(run.audit["states"].get(encoder)) for encoder in ENCODERS)
        other = seen.setdefault(states, folder)
        if other != folder or folders.count(folder) > 1:
            raise ConfigError(f"{other} and {folder} are one run: all encoders are the same; give every run once.")
        differing = _differing(configs[0], cfg)
        if differing:
            shown = "; ".join(differing[:SHOWN_DIFFERENCES])
            raise ConfigError(
                f"{folders[0]} and {folder} have other settings ({shown}); pool takes runs that differ in their "
                "seed or retrained encoder only."
            )
        if _is_list(cfg.data.forget) and _forgotten(found) != _forgotten(images[0]):
            raise ConfigError(f"{folders[0]} and {folder} are of other requests: they forget other images; pool each.")
        handed_in = cfg.encoder.checkpoint is not None or cfg.data.previous is not None
        if handed_in and states[0] != runs[0].audit["states"].get("original"):
            raise ConfigError(f"{folders[0]} and {folder} began with other encoders; pool runs of one encoder.")


def _differing(first: RunConfig, other: RunConfig) -> list[str]:
    """Settings that decide results, but for the seed; places are not compared, what lies there is."""
    free = {"seed", *(key for cfg in (first, other) for mark in ("affects", "path") for key in marked(cfg, mark))}
    if _is_list(first.data.forget) and _is_list(other.data.forget):
        free.add("data.forget")
    found = field_diff(first, other)
    return [f"{key}: {old!r} there, {new!r} here" for key, (old, new) in found.items() if key not in free]


def _is_list(forget: int | float | str) -> bool:
    return isinstance(forget, str) and not forget.startswith("class:")


def _forgotten(images: frozenset[tuple[str, str]]) -> frozenset[tuple[str, str]]:
    return frozenset(image for image in images if image[0] == "forget")


def _member(folder: Path, run: RunFiles) -> dict[str, Any]:
    """What pool.json says of one run."""
    attacks = {name: found["gap"]["auc"] for name, found in run.audit["attacks"].items()}
    return {
        "folder": str(folder), "seed": run.config.get("seed"), "verdict": run.audit["gates"]["verdict"],
        "states": run.audit["states"], "gaps": attacks,
        "cost": {name: run.audit["cost"].get(name) for name in ("unlearn_images", "retrain_images")},
    }  # fmt: skip
