"""The verb `sweep`: search settings for many methods, here or as SLURM arrays."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Literal

import tyro

from distunlearn.cli.arguments import Config, Out, Overrides, Recipe, resolved, yaml_list
from distunlearn.cli.output import Verb, tell
from distunlearn.errors import ConfigError
from distunlearn.run.slurm import Job, script, submit

Methods = Annotated[str, tyro.conf.arg(metavar="[A,B,...]", help="list of the methods to search")]
Seeds = Annotated[str, tyro.conf.arg(metavar="[N,N,...]", help="list of the seeds of the reports")]


@dataclass(frozen=True)
class Sweep(Verb):
    """Search the settings of methods with an equal budget, choose on one forget set, report on others
    (docs/researcher.md).

    The same command goes on where it stopped. With --submit it gives the next unfinished stage to SLURM as an array.
    """

    recipe: Recipe = None
    out: Out = tyro.MISSING
    config: Config = None
    overrides: Overrides = ()
    methods: Methods = "[third_party, alignment_calibration, neg_grad, grad_ascent, finetune]"
    trials: Annotated[int, tyro.conf.arg(help="runs of each method; the first has the recipe's settings")] = 8
    search: Annotated[Literal["random", "grid"], tyro.conf.arg(help="how settings are drawn")] = "random"
    seeds: Seeds = "[0]"
    validation_seed: Annotated[int, tyro.conf.arg(help="seed of the runs that settings are chosen on")] = 10
    search_seed: Annotated[int, tyro.conf.arg(help="seed of the draws of settings")] = 0
    attacks: Annotated[int, tyro.conf.arg(help="how many of the strongest attacks enter the score")] = 4
    jobs: Annotated[int, tyro.conf.arg(help="runs at a time, on this machine or of the array")] = 1
    processes: Annotated[int, tyro.conf.arg(help="processes of one run on this machine")] = 1
    report: Annotated[
        bool, tyro.conf.arg(help="run what was chosen on the report seeds; else end with chosen.json")
    ] = True
    submit: Annotated[bool, tyro.conf.arg(help="give the next stage to SLURM", help_behavior_hint="")] = False
    dry_run: Annotated[bool, tyro.conf.arg(help="print that stage's script", help_behavior_hint="")] = False
    task: Annotated[
        bool, tyro.conf.arg(help="run the one task whose folder is --out (jobs do this)", help_behavior_hint="")
    ] = False
    job: Annotated[Job, tyro.conf.arg(name="")] = Job()

    def __call__(self) -> int:
        from distunlearn.sweep import sweep

        if self.task:
            sweep.run_task(self.out, self.overrides)
            return 0
        if self.recipe is None and self.config is None:
            raise ConfigError(
                "no settings to start from; name a recipe (see: distunlearn list recipes) or give --config"
            )
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ConfigError("a sweep starts its runs itself; call it without a launcher and give --processes N")
        for option in ("jobs", "processes"):
            if getattr(self, option) < 1:
                raise ConfigError(f"--{option} is {getattr(self, option)}, expected at least 1")
        world = self.job.nodes * self.job.tasks if self.submit or self.dry_run else self.processes
        cfg = resolved(self.recipe, self.config, self.overrides, world=world)
        what = sweep.Search(
            methods=yaml_list("--methods", self.methods, str, "[scrub, finetune]"), trials=self.trials,
            seeds=yaml_list("--seeds", self.seeds, int, "[0, 1, 2]"), search=self.search, attacks=self.attacks,
            validation_seed=self.validation_seed, search_seed=self.search_seed,
        )  # fmt: skip
        sweep.prepare_sweep(cfg, what, self.out)
        if self.submit or self.dry_run:
            stage = self._next_stage(sweep)
            tell(stage, {"stage": stage})
        else:
            page = sweep.run_sweep(self.out, self.jobs, self.processes, report=self.report)
            tell(str(page), {"results": page})
        return 0

    def _next_stage(self, sweep: ModuleType) -> str:
        """Submit the array of the first unfinished stage, or print its script; with none left, the results' path."""
        for stage, tasks in sweep.open_stages(self.out, self.report):
            left = [str(task.index) for task in tasks]
            if left:
                at_once = f"%{self.jobs}" if self.jobs > 1 else ""
                job = dataclasses.replace(self.job, array=",".join(left) + at_once, name=f"{self.job.name}-{stage}")
                text = script(job, None, self.out / stage, verb=("sweep", "--task"))
                if self.dry_run:
                    return text
                number = submit(text, job, self.out / stage)
                return f"{stage}: {len(left)} tasks submitted as job {number}; the same command goes on after them"
        return str(sweep.write_results(self.out) if self.report else self.out / "chosen.json")
