"""Hyper-parameter search with an equal budget for every method: chosen on one forget set, reported on another.

    DIR/sweep.json              what the sweep is; DIR/settings.yaml the settings that all runs start from
    DIR/validation_ids.txt      images to forget in the validation; in no report's forget set
    DIR/bases/0, 1, ...         original and retrained encoder of the validation seed, then of each report seed
    DIR/trials/0, 1, ...        a run each, on the validation base; reports/0, 1, ... the chosen settings on the others
    DIR/<stage>.json            the tasks of a stage; DIR/<stage>/<index>.json the result of one, written when it ended
    DIR/chosen.json             {method: {key: value}}, written when the trials ended; DIR/results.json, results.md

Every task is a plain run of its own with `reuse` of its base. Finished tasks are skipped by the digest of their config,
interrupted ones go on. How a trial is chosen: see `sweep_results`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

from distunlearn.common.files import write_atomic, write_json
from distunlearn.config.load import load_config, save_config
from distunlearn.config.registry import METHOD, find, names
from distunlearn.config.schema import RunConfig
from distunlearn.config.shape import digest
from distunlearn.data.prepare.draw import open_and_draw
from distunlearn.data.schedule import permutation
from distunlearn.errors import ConfigError, DataError, DistunlearnError, NumericsError, RankLostError, StoppedError
from distunlearn.methods.search_space import grid, random
from distunlearn.run import pipeline
from distunlearn.sweep.results import average_gap, choose, facts, gaps, page, strongest
from distunlearn.verify.records import read_json

STAGES = ("bases", "trials", "reports")
ENDED = (0, 6, 7)  # codes of a run with an audit; the verdict is no failure of a trial
DIVERGED = NumericsError.exit_code
HEAVY = ("original", "retrained", "checkpoints", "export", "training_state.safetensors")  # of a trial, once it ended
ERRORS = {error.exit_code: error for error in (ConfigError, DataError, RankLostError, StoppedError)}


@dataclass(frozen=True)
class Search:
    """What to search. trials: runs for each method, the first of them with the recipe's own settings."""

    methods: tuple[str, ...]
    trials: int = 8
    search: str = "random"  # or "grid", filled up with random draws where it has fewer points
    seeds: tuple[int, ...] = (0,)  # of the reports
    validation_seed: int = 10
    attacks: int = 4  # the strongest, that enter the score
    search_seed: int = 0  # of the draws of settings


@dataclass(frozen=True)
class Task:
    """One run of a stage: the settings (`--set` texts) that make it, and the digest of the resulting config."""

    index: int
    method: str
    settings: dict[str, Any]
    overrides: tuple[str, ...]
    digest: str


# -- planning ----------------------------------------------------------------------------------------------------------


def prepare_sweep(cfg: RunConfig, sweep: Search, out: Path) -> None:
    """Check, draw the validation's images, and write down what the sweep is; a second time: require the same one.

    Raises:
        ConfigError: it cannot be, or `out` holds another sweep.
        DataError: too few images for a second forget set.
    """
    _check(cfg, sweep)
    forget, ids = _validation_forget(cfg, sweep)
    facts_ = {
        "recipe": cfg.recipe, **dataclasses.asdict(sweep), "config": _digest(cfg), "validation_forget": forget,
        "validation_images": len(ids),
    }  # fmt: skip
    plain = json.loads(json.dumps(facts_))
    path, listed = out / "sweep.json", out / "validation_ids.txt"
    text = "\n".join(ids) + "\n"
    if path.exists():
        found = read_json(path)
        if found != plain or (ids and listed.read_text(encoding="utf-8") != text):
            differing = sorted(key for key in plain if found.get(key) != plain[key]) or [listed.name]
            raise ConfigError(f"{out} holds another sweep ({', '.join(differing)} differ); choose another --out.")
        return
    out.mkdir(parents=True, exist_ok=True)
    save_config(cfg, out / "settings.yaml")
    if ids:
        write_atomic(listed, text)
    write_json(path, plain)


def _check(cfg: RunConfig, sweep: Search) -> None:
    problems = []
    if not sweep.methods:
        problems.append(f"--methods names nothing, expected some of {', '.join(names(METHOD))}")
    for name in sweep.methods:
        try:
            find(METHOD, name)
        except ConfigError as error:
            problems.append(f"--methods: {error}")
    if len(set(sweep.methods)) < len(sweep.methods):
        problems.append("--methods names a method twice; the budget is the same for all")
    for option, number in (("--trials", sweep.trials), ("--attacks", sweep.attacks)):
        if number < 1:
            problems.append(f"{option} is {number}, expected at least 1")
    if not sweep.seeds or len(set(sweep.seeds)) < len(sweep.seeds):
        problems.append("--seeds is empty or names a seed twice")
    if sweep.validation_seed in sweep.seeds:
        problems.append(f"--validation-seed is {sweep.validation_seed}, which is also reported; set another")
    for key, value in (("data.shards", cfg.data.shards), ("runtime.reuse", cfg.runtime.reuse)):
        if value is not None:
            problems.append(f"{key} is set, but a sweep makes shards and encoders of its own for each seed; unset it")
    if problems:
        raise ConfigError("; ".join(problems) + ".")


def _validation_forget(cfg: RunConfig, sweep: Search) -> tuple[Any, list[str]]:
    """What the validation forgets: another class where the reports forget one, else as many ids of images that no
    report forgets.
    """
    foreign = cfg.encoder.checkpoint is not None
    drawn = {seed: open_and_draw(cfg.data, seed, foreign) for seed in sweep.seeds}
    members = drawn[sweep.seeds[0]][0].members
    if isinstance(cfg.data.forget, str) and cfg.data.forget.startswith("class:"):
        labels = sorted({label for _, label in members.samples if label is not None})
        asked = cfg.data.forget.removeprefix("class:")
        own = members.classes.index(asked) if asked in members.classes else int(asked)
        others = [label for label in labels if label > own] + [label for label in labels if label < own]
        if not others:
            raise DataError(f"data.forget={cfg.data.forget} leaves no other class to choose settings on.")
        return f"class:{members.classes[others[0]] if members.classes else others[0]}", []
    reported = [{i for i, role in found.roles.items() if role == "forget"} for _, found in drawn.values()]
    pool = [sample_id for sample_id, _ in members.samples if not any(sample_id in ids for ids in reported)]
    count = len(reported[0])
    if len(pool) < count:
        raise DataError(
            f"{len(members.samples)} images less those that the reports forget leave {len(pool)}, fewer than the "
            f"{count} that the validation is to forget; report fewer seeds or forget fewer images."
        )
    return "ids", [pool[i] for i in permutation(len(pool), sweep.validation_seed, "validation")[:count]]


def plan_stage(out: Path, stage: str) -> list[Task]:
    """The tasks of a stage, also written to `DIR/<stage>.json`; those before it must have ended."""
    what = read_json(out / "sweep.json")
    make = {"bases": _bases, "trials": _trials, "reports": _reports}[stage]
    tasks = []
    for index, (method, settings, fixed) in enumerate(make(out, what)):
        overrides = (*fixed, f"method.name={method}", *(f"{key}={value}" for key, value in settings.items()))
        resolved = load_config(None, out / "settings.yaml", list(overrides), world=1)
        tasks.append(Task(index, method, settings, overrides, _digest(resolved)))
    write_json(out / f"{stage}.json", [dataclasses.asdict(task) for task in tasks])
    return tasks


Planned = Iterable[tuple[str, dict[str, Any], list[str]]]


def _seeds(out: Path, what: Mapping[str, Any]) -> list[list[str]]:
    """Overrides of the validation, then of each report seed."""
    forget = what["validation_forget"]
    named = str((out / "validation_ids.txt").resolve()) if forget == "ids" else forget
    validation = [f"seed={what['validation_seed']}", f"data.forget={json.dumps(named)}"]
    return [validation, *([f"seed={seed}"] for seed in what["seeds"])]


def _bases(out: Path, what: Mapping[str, Any]) -> Planned:
    return [("none", {}, fixed) for fixed in _seeds(out, what)]


def _reuse(out: Path, base: int) -> str:
    return f"runtime.reuse={json.dumps(str((out / 'bases' / str(base)).resolve()))}"


def _trials(out: Path, what: Mapping[str, Any]) -> Planned:
    fixed = [*_seeds(out, what)[0], _reuse(out, 0)]
    for method in what["methods"]:
        base = load_config(None, out / "settings.yaml", [f"method.name={method}"], world=1)
        space, more = find(METHOD, method).space, what["trials"] - 1
        drawn: list[dict[str, Any]] = []
        if space and more:
            points = grid(space, more + 1, what["search_seed"], method) if what["search"] == "grid" else []
            drawn = [point for point in points if not _is_in(base, point)][:more]
            drawn += random(space, more - len(drawn), what["search_seed"], method)
        for settings in [{}, *drawn]:
            yield method, settings, fixed


def _is_in(cfg: RunConfig, settings: Mapping[str, Any]) -> bool:
    """Whether these settings are the config's own already."""
    return all(functools.reduce(getattr, key.split("."), cfg) == value for key, value in settings.items())


def _reports(out: Path, what: Mapping[str, Any]) -> Planned:
    chosen = _chosen(out, what)
    for number, fixed in enumerate(_seeds(out, what)[1:], start=1):
        for method, trial in chosen.items():
            if trial is not None:
                yield method, trial["settings"], [*fixed, _reuse(out, number)]


def _digest(cfg: RunConfig) -> str:
    """Of all that decides a result: not of where files lie, nor of how the work is spread."""
    forget = cfg.data.forget
    if isinstance(forget, str) and Path(forget).is_file():
        forget = hashlib.sha256(Path(forget).read_bytes()).hexdigest()
    return digest(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, forget=forget)))


# -- running -----------------------------------------------------------------------------------------------------------


def run_sweep(out: Path, jobs: int = 1, processes: int = 1, extra: Sequence[str] = (), *, report: bool = True) -> Path:
    """All stages that are not finished, `jobs` runs at a time on this machine; returns results.md, or chosen.json.

    processes: of one run, started by torchrun; more than 1 needs a distributed backend. extra: settings that change no
        result, such as runtime.threads=1. report: run the chosen settings on the report seeds; without it only the
        validation's base and the trials are run.

    Raises:
        DistunlearnError: a task ended otherwise than with an audit or by diverging; the others keep their results.
    """
    for stage, tasks in open_stages(out, report):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        shared = [f"runtime.threads={max(1, cores // (jobs * processes))}", *extra] if jobs > 1 else list(extra)
        folders = [out / stage / str(task.index) for task in tasks]
        with ThreadPoolExecutor(jobs) as pool:
            codes = list(pool.map(_start, folders, repeat(processes), repeat(shared)))
        for task, (code, said) in zip(tasks, codes, strict=True):
            if code:
                raise ERRORS.get(code, DistunlearnError)(
                    f"task {task.index} of {out / stage} ({task.method}) ended with {code}: {said}"
                )
    return write_results(out) if report else out / "chosen.json"


def open_stages(out: Path, report: bool = True) -> Iterator[tuple[str, list[Task]]]:
    """Each stage with its tasks that have no result yet; planned when it is asked for, after those before it ended.

    chosen.json is written before the reports. report: see `run_sweep`.
    """
    for stage in STAGES if report else STAGES[:-1]:
        if stage == "reports":
            write_chosen(out)
        planned = plan_stage(out, stage)
        yield stage, pending(out, stage, planned if report or stage != "bases" else planned[:1])
    if not report:
        write_chosen(out)


def _start(folder: Path, processes: int, extra: Sequence[str]) -> tuple[int, str]:
    """One task in processes of its own; its exit code and the last line it said."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "distunlearn", "sweep", "--task", "--out", str(folder)]
    for text in extra:
        command += ["--set", text]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.log", "a", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    lines = (folder.parent / f"{folder.name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
    return code, lines[-1] if lines else "nothing was said"


def run_task(folder: Path, extra: Sequence[str] = ()) -> None:
    """The task of `DIR/<stage>/<index>`, by all processes of its launcher; its result is written by the main one.

    Raises:
        DataError: there is no such task.
        DistunlearnError: what a run raises, but for one that diverges: that is a result.
    """
    stage, out = folder.parent.name, folder.parent.parent
    tasks = read_json(out / f"{stage}.json") if (out / f"{stage}.json").is_file() else []
    found = next((task for task in tasks if str(task["index"]) == folder.name), None)
    if found is None:
        raise DataError(f"{folder} is no task of a sweep; plan the sweep first: distunlearn sweep RECIPE --out DIR.")
    cfg = load_config(None, out / "settings.yaml", [*found["overrides"], *extra])
    error, clock = None, time.monotonic()
    try:
        code = pipeline.run(cfg, folder)
    except NumericsError as raised:
        code, error = raised.exit_code, str(raised)
    if os.environ.get("RANK", "0") != "0":
        return
    figures = facts(folder) if code in ENDED else None
    seconds = round(time.monotonic() - clock, 3)
    result = {"stage": stage, **found, "code": code, "error": error, "seconds": seconds, "figures": figures}
    write_json(folder.parent / f"{folder.name}.json", result)
    if stage == "trials":
        _drop_weights(folder)


def _drop_weights(folder: Path) -> None:
    """A trial keeps its records; hundreds of encoders would fill a disk."""
    for name in HEAVY:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def pending(out: Path, stage: str, tasks: Iterable[Task]) -> list[Task]:
    """The tasks without a result.

    Raises:
        ConfigError: a result is of another config than the task.
    """
    left = []
    for task in tasks:
        path = out / stage / f"{task.index}.json"
        if not path.exists():
            left.append(task)
        elif read_json(path)["digest"] != task.digest:
            raise ConfigError(f"{path} is the result of other settings; choose another --out.")
    return left


# -- results -----------------------------------------------------------------------------------------------------------


def _results(out: Path, stage: str) -> list[dict[str, Any]]:
    return [read_json(out / stage / f"{task['index']}.json") for task in read_json(out / f"{stage}.json")]


def _attacks(out: Path, what: Mapping[str, Any]) -> list[str]:
    return strongest(read_json(out / "bases" / "0.json")["figures"], what["attacks"])


def _chosen(out: Path, what: Mapping[str, Any]) -> dict[str, Mapping[str, Any] | None]:
    trials, attacks = _results(out, "trials"), _attacks(out, what)
    return {m: choose([t for t in trials if t["method"] == m], attacks) for m in what["methods"]}


def write_chosen(out: Path) -> Path:
    """chosen.json, {method: {key: value}} of all methods with a choice, from the results of all trials; its path."""
    chosen = _chosen(out, read_json(out / "sweep.json"))
    settings = {method: trial["settings"] for method, trial in chosen.items() if trial is not None}
    write_json(out / "chosen.json", settings)
    return out / "chosen.json"


def write_results(out: Path) -> Path:
    """results.json and results.md from the results of all tasks; returns the latter's path."""
    what = read_json(out / "sweep.json")
    attacks, chosen = _attacks(out, what), _chosen(out, what)
    trials, reports, bases = (_results(out, stage) for stage in ("trials", "reports", "bases"))

    def score(result: Mapping[str, Any]) -> float | None:
        return average_gap(gaps(result["figures"], attacks)) if result["figures"] else None

    methods = {}
    for method in what["methods"]:
        own = [t for t in trials if t["method"] == method]
        told = [r for r in reports if r["method"] == method]
        scores, costs = [score(r) for r in told], [r["figures"]["cost"] for r in told if r["figures"]]
        shares = [cost["unlearn_images"] / cost["retrain_images"] for cost in costs]
        picked = chosen[method]
        methods[method] = {
            "settings": picked["settings"] if picked else {}, "trial": picked["index"] if picked else None,
            "validation": score(picked) if picked else None, "default": score(own[0]),
            "tried": len(own), "failed": sum(score(t) is None for t in own),
            "scores": scores, "score": sum(scores) / len(scores) if scores and None not in scores else None,  # type: ignore[arg-type]
            "share": sum(shares) / len(shares) if shares else None,
            "gaps": [gaps(r["figures"], attacks) if r["figures"] else None for r in told],
            "verdicts": [r["figures"]["verdict"] if r["figures"] else None for r in told],
        }  # fmt: skip
    results = {
        **what, "attacks": attacks, "utilities": list(bases[0]["figures"]["utility"]),
        "validation_images": bases[0]["figures"]["coverage"]["requested"], "methods": methods,
    }  # fmt: skip
    write_json(out / "results.json", results)
    write_atomic(out / "results.md", page(results))
    return out / "results.md"
