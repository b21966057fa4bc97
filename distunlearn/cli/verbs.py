"""The verbs of the command line: what each takes and calls.

torch, timm and pydantic are imported by the verbs when they are called: `distunlearn --help` answers at once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

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
from distunlearn.common.launcher import is_main, restarts_left
from distunlearn.errors import ConfigError


@dataclass(frozen=True)
class Run:
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
class Pool:
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
        return _ended(pipeline().VERDICT_CODES[told["gates"]["verdict"]], words, self.out / "pool.json")


@dataclass(frozen=True)
class Prepare:
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
        print(pipeline().prepare(cfg, self.out))
        return 0


@dataclass(frozen=True)
class Index:
    """Write the index of WebDataset shards that exist, beside them; the shards stay as they are."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help="folder of .tar files")]
    config: Config = None
    overrides: Overrides = ()

    def __call__(self) -> int:
        if is_main():
            own = ("data.source=webdataset", f"data.root={self.folder}", f"data.shards={self.folder}")
            cfg = resolved(None, self.config, (*own, *self.overrides))
            print(pipeline().index(cfg))
        return 0


@dataclass(frozen=True)
class Pretrain:
    """Train the original encoder."""

    recipe: Recipe = None
    out: Out = tyro.MISSING
    config: Config = None
    overrides: Overrides = ()

    def __call__(self) -> int:
        pipeline().pretrain(settings_of(self), self.out)
        return 0


@dataclass(frozen=True)
class Unlearn:
    """Make the original encoder forget."""

    recipe: Recipe = None
    out: Out = tyro.MISSING
    config: Config = None
    overrides: Overrides = ()

    def __call__(self) -> int:
        pipeline().unlearn(settings_of(self), self.out)
        return 0


@dataclass(frozen=True)
class Dose:
    """Look at every dose of a run that has unlearned, print figures and the choice as JSON; no encoder changes."""

    run_dir: RunDir

    def __call__(self) -> int:
        found = pipeline().dose(self.run_dir)
        if is_main():
            print(json.dumps(found, indent=2))
        return 0


@dataclass(frozen=True)
class Audit:
    """Attack the original, the unlearned and the retrained encoder of a run, and judge its gates."""

    run_dir: RunDir

    def __call__(self) -> int:
        return _end(pipeline().audit(self.run_dir), self.run_dir)


@dataclass(frozen=True)
class Report:
    """Write report.html of an audited run."""

    run_dir: RunDir

    def __call__(self) -> int:
        if is_main():
            print(pipeline().report(self.run_dir))
        return 0


@dataclass(frozen=True)
class Status:
    """Print where a run stands, from its directory, as JSON."""

    run_dir: RunDir

    def __call__(self) -> int:
        from distunlearn.run.status import run_status

        print(json.dumps(run_status(self.run_dir), indent=2))
        return 0


@dataclass(frozen=True)
class Purge:
    """Take the forgotten images out of the run's shards, for good; without --apply only say what would happen."""

    run_dir: RunDir
    apply: Annotated[bool, tyro.conf.arg(help="rewrite the shards", help_behavior_hint="")] = False

    def __call__(self) -> int:
        from distunlearn.run.purge import purge

        if is_main():
            print(json.dumps(purge(self.run_dir, apply=self.apply), indent=2))
        return 0


@dataclass(frozen=True)
class Plan:
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

        planned = make_plan(settings_of(self), self.out)
        if is_main():
            print(json.dumps(planned, indent=2, ensure_ascii=False, default=str))
        return 0


@dataclass(frozen=True)
class Schema:
    """Print the JSON schema of settings files, by which an editor completes and checks them."""

    def __call__(self) -> int:
        from distunlearn.config.json_schema import settings_schema

        if is_main():
            print(json.dumps(settings_schema(), indent=2))
        return 0


@dataclass(frozen=True)
class List:
    """Show the methods, encoders, objectives, attacks and recipes that can be named."""

    kind: Annotated[
        str | None,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="[KIND]", help="all of them if left out", help_behavior_hint=""),
    ] = None

    def __call__(self) -> int:
        from distunlearn.cli.list import KINDS, catalog_text

        if self.kind is not None and self.kind not in KINDS:
            raise ConfigError(unknown("kind", self.kind, KINDS))
        if is_main():
            print(catalog_text(self.kind))
        return 0


@dataclass(frozen=True)
class Doctor:
    """Describe this environment for a bug report, secrets left out, and name what is wrong with it.

    With a recipe or --config, under the launcher of the run: check the launch itself, too.
    """

    recipe: Recipe = None
    out: Annotated[Path, tyro.conf.arg(metavar="DIR", help="folder that must be writable")] = Path(".")
    config: Config = None
    overrides: Overrides = ()

    def __call__(self) -> int:
        from distunlearn.cli.doctor import doctor_text, launch_text

        if is_main():
            print(doctor_text(self.out))
        if self.recipe is None and self.config is None:
            return 0
        text, sound = launch_text(settings_of(self), self.out)
        if is_main():
            print(text)
        return 0 if sound else ConfigError.exit_code


@dataclass(frozen=True)
class LaunchFiles:
    """Write settings for accelerate and scripts for sbatch into DIR/launch and DIR/slurm, to copy and to change."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR", help="made if it does not exist")]

    def __call__(self) -> int:
        from distunlearn.run.launch_files import write_launch_files

        if is_main():
            print("\n".join(str(path) for path in write_launch_files(self.folder)))
        return 0


def _end(code: int, run_dir: Path) -> int:
    """Print how an audited run ended; returns `code`, or 0 where torchrun would take a verdict for a crash."""
    from distunlearn.report.terminal import ending

    return _ended(code, ending(run_dir) if is_main() else "", run_dir / "audit" / "summary.json")


def _ended(code: int, words: str, verdict: Path) -> int:
    again = code != 0 and restarts_left() > 0
    if is_main():
        print(words)
        if again:
            print(
                f"ends with 0 in place of {code}, for torchrun has restarts left and would audit again; the verdict is "
                f"in {verdict}"
            )
    return 0 if again else code
