"""The verbs of the command line: what each takes and calls.

torch, timm and pydantic are imported by the verbs when they are called: `distunlearn --help` answers at once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from distunlearn.cli.arguments import (
    Config,
    Out,
    Overrides,
    Previous,
    Recipe,
    RunDir,
    Seeds,
    pipeline,
    resolved,
    settings_of,
    unknown,
    yaml_list,
)
from distunlearn.cli.output import Verb, tell
from distunlearn.common.launcher import is_main, restarts_left
from distunlearn.errors import ConfigError
from distunlearn.run.launch_files import write_launch_files


@dataclass(frozen=True)
class Run(Verb):
    """Prepare, pretrain, unlearn, audit and report, in order; goes on where an earlier run stopped.

    With --previous: the next request on what a finished run has left, with that run's settings.
    With --seeds: one run for each seed, and one verdict over them.
    """

    recipe: Recipe = None
    out: Out = tyro.MISSING
    previous: Previous = None
    seeds: Seeds = None
    config: Config = None
    overrides: Overrides = ()

    def __call__(self) -> int:
        if self.seeds is None:
            return _end(pipeline().run(settings_of(self), self.out), self.out)
        if self.previous is not None:
            raise ConfigError("--seeds and --previous do not go together; run the next request of each run by itself")
        from distunlearn.run.pool import run_seeds

        seeds = yaml_list("--seeds", self.seeds, int, "0,1,2")
        if len(set(seeds)) < 2:
            raise ConfigError(f"--seeds is {self.seeds}, expected two seeds or more, each once; one is --set seed=N")
        configs = {n: settings_of(replace(self, overrides=(*self.overrides, f"seed={n}"))) for n in seeds}
        folders = run_seeds(configs, self.out)
        code = Pool(tuple(folders), self.out)()
        pipeline().wait_for_all()
        return code


@dataclass(frozen=True)
class Pool(Verb):
    """Judge several finished runs that differ in seed or retrained encoder as one: one verdict, one report."""

    run_dirs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN RUN ...", help="run directories, audited", help_behavior_hint=""),
    ]
    out: Annotated[Path, tyro.conf.arg(metavar="DIR", help="folder for pool.json and report.html")] = tyro.MISSING

    def __call__(self) -> int:
        from distunlearn.run.pool import pool

        told, words = pool(self.run_dirs, self.out)
        return _ended(pipeline().VERDICT_CODES[told["gates"]["verdict"]], words, self.out / "pool.json", told)


@dataclass(frozen=True)
class Prepare(Verb):
    """Turn a source of images into shards, a manifest and a summary."""

    source: Annotated[
        str | None,
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="[SOURCE]", help="a source (digits, cifar10, imagefolder, ...) or a recipe", help_behavior_hint=""
        ),
    ] = None
    out: Out = tyro.MISSING
    config: Config = None
    overrides: Overrides = ()

    def __call__(self) -> int:
        from distunlearn.config.load import SOURCES, load_source

        if not is_main():
            return 0
        if self.source is None and self.config is None:
            raise ConfigError(f"no source; name one of {', '.join(SOURCES)}, or give --config")
        cfg = load_source(self.source, self.config, list(self.overrides))
        made = pipeline().prepare(cfg, self.out)
        tell(made, {"run_dir": self.out, "made": made})
        return 0


@dataclass(frozen=True)
class Index(Verb):
    """Write the index of WebDataset shards that exist, beside them; the shards stay as they are."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help="folder of .tar files")]
    config: Config = None
    overrides: Overrides = ()

    def __call__(self) -> int:
        if is_main():
            own = ("data.source=webdataset", f"data.root={self.folder}", f"data.shards={self.folder}")
            cfg = resolved(None, self.config, (*own, *self.overrides))
            made = pipeline().index(cfg)
            tell(made, {"folder": self.folder, "made": made})
        return 0


@dataclass(frozen=True)
class Pretrain(Verb):
    """Train the original encoder."""

    recipe: Recipe = None
    out: Out = tyro.MISSING
    config: Config = None
    overrides: Overrides = ()

    def __call__(self) -> int:
        pipeline().pretrain(settings_of(self), self.out)
        return _trained(self.out, "original")


@dataclass(frozen=True)
class Unlearn(Verb):
    """Make the original encoder forget."""

    recipe: Recipe = None
    out: Out = tyro.MISSING
    config: Config = None
    overrides: Overrides = ()

    def __call__(self) -> int:
        pipeline().unlearn(settings_of(self), self.out)
        return _trained(self.out, ".")


@dataclass(frozen=True)
class Dose(Verb):
    """Look at every dose of a run that has unlearned, print figures and the choice as JSON; no encoder changes."""

    run_dir: RunDir

    def __call__(self) -> int:
        _tell_data(pipeline().dose(self.run_dir))
        return 0


@dataclass(frozen=True)
class Audit(Verb):
    """Attack the original, the unlearned and the retrained encoder of a run, and judge its gates."""

    run_dir: RunDir

    def __call__(self) -> int:
        return _end(pipeline().audit(self.run_dir), self.run_dir)


@dataclass(frozen=True)
class Report(Verb):
    """Write report.html of an audited run."""

    run_dir: RunDir

    def __call__(self) -> int:
        if is_main():
            page = pipeline().report(self.run_dir)
            tell(str(page), {"report": page})
        return 0


@dataclass(frozen=True)
class Status(Verb):
    """Print where a run stands, from its directory, as JSON."""

    run_dir: RunDir

    def __call__(self) -> int:
        from distunlearn.run.status import run_status

        _tell_data(run_status(self.run_dir))
        return 0


@dataclass(frozen=True)
class Purge(Verb):
    """Take the forgotten images out of the run's shards, for good; without --apply only say what would happen."""

    run_dir: RunDir
    apply: Annotated[bool, tyro.conf.arg(help="rewrite the shards", help_behavior_hint="")] = False

    def __call__(self) -> int:
        from distunlearn.run.purge import purge

        if is_main():
            _tell_data(purge(self.run_dir, apply=self.apply))
        return 0


@dataclass(frozen=True)
class Plan(Verb):
    """Resolve and check everything, print steps, memory and coverage as JSON, touch nothing."""

    recipe: Recipe = None
    out: Annotated[
        Path | None, tyro.conf.arg(metavar="DIR", help="run directory to look at", help_behavior_hint="")
    ] = None
    previous: Previous = None
    config: Config = None
    overrides: Overrides = ()

    def __call__(self) -> int:
        from distunlearn.plan.plan import make_plan

        _tell_data(make_plan(settings_of(self), self.out))
        return 0


@dataclass(frozen=True)
class Schema(Verb):
    """Print the JSON schema of settings files, by which an editor completes and checks them."""

    def __call__(self) -> int:
        from distunlearn.config.json_schema import settings_schema

        _tell_data(settings_schema())
        return 0


@dataclass(frozen=True)
class List(Verb):
    """Show the methods, encoders, objectives, attacks and recipes that can be named."""

    kind: Annotated[
        str | None,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="[KIND]", help="all of them if left out", help_behavior_hint=""),
    ] = None

    def __call__(self) -> int:
        from distunlearn.cli.list import KINDS, catalog_text, names

        if self.kind is not None and self.kind not in KINDS:
            raise ConfigError(unknown("kind", self.kind, KINDS))
        tell(catalog_text(self.kind), names(self.kind))
        return 0


@dataclass(frozen=True)
class Doctor(Verb):
    """Describe this environment for a bug report, secrets left out, and name what is wrong with it.

    With a recipe or --config, under the launcher of the run: check the launch itself, too.
    """

    recipe: Recipe = None
    out: Annotated[Path, tyro.conf.arg(metavar="DIR", help="folder that must be writable")] = Path(".")
    config: Config = None
    overrides: Overrides = ()

    def __call__(self) -> int:
        from distunlearn.cli.doctor import doctor_text, environment, launch_text

        tell(doctor_text(self.out), environment())
        if self.recipe is None and self.config is None:
            return 0
        text, sound = launch_text(settings_of(self), self.out)
        tell(text, {"launch": text, "sound": sound})
        return 0 if sound else ConfigError.exit_code


@dataclass(frozen=True)
class LaunchFiles(Verb):
    """Write settings for accelerate and scripts for sbatch into DIR/launch and DIR/slurm, to copy and to change."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR", help="made if it does not exist")]

    def __call__(self) -> int:
        if is_main():
            paths = write_launch_files(self.folder)
            tell("\n".join(map(str, paths)), {"files": paths})
        return 0


def _end(code: int, run_dir: Path) -> int:
    """Print how an audited run ended; returns `code`, or 0 where torchrun would take a verdict for a crash."""
    from distunlearn.report.terminal import ending

    summary = run_dir / "audit" / "summary.json"
    words, found = (ending(run_dir), json.loads(summary.read_text())) if is_main() else ("", {})
    return _ended(code, words, summary, {"run_dir": run_dir, **found})


def _ended(code: int, words: str, verdict: Path, found: dict[str, Any]) -> int:
    """found: figures of which `gates` are told."""
    again = code != 0 and restarts_left() > 0
    if again:
        words += (
            f"\nends with 0 in place of {code}, for torchrun has restarts left and would audit again; the verdict is "
            f"in {verdict}"
        )
    report = verdict.parent / "report.html" if "run_dir" not in found else found["run_dir"] / "report.html"
    gates = found.get("gates")
    tell(words, {"verdict": gates and gates["verdict"], "gates": gates, "report": report, "figures": verdict})
    return 0 if again else code


def _trained(run_dir: Path, place: str) -> int:
    """Tell where a finished training keeps its record, and with --json what it says. Returns 0."""
    done = run_dir / place / "done.json"
    if is_main() and done.exists():  # a method need not make an encoder
        tell(str(done), {"run_dir": run_dir, "done": json.loads(done.read_text())})
    return 0


def _tell_data(found: Any) -> None:
    """Of a verb that has no words: indented JSON either way."""
    tell(json.dumps(found, indent=2, ensure_ascii=False, default=str), found)
