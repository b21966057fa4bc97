"""`distunlearn submit`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from distunlearn.cli.arguments import Config, Out, Overrides, Previous, Recipe, settings_of
from distunlearn.cli.output import Verb, tell
from distunlearn.run.slurm import Job, script, submit


@dataclass(frozen=True)
class Submit(Verb):
    """Give a run to SLURM, as a job that saves at signals and asks for itself again; --dry-run prints the script."""

    recipe: Recipe = None
    out: Out = tyro.MISSING
    config: Config = None
    previous: Previous = None
    overrides: Overrides = ()
    job: Annotated[Job, tyro.conf.arg(name="")] = Job()
    dry_run: Annotated[bool, tyro.conf.arg(help="print the script", help_behavior_hint="")] = False

    def __call__(self) -> int:
        if not self.job.check():  # else `script` says it all
            world = self.job.nodes * self.job.tasks
            settings_of(self, world, needed_by=self.out)
        verb = ("run", "--previous", str(self.previous.resolve())) if self.previous else None
        text = script(self.job, self.recipe, self.out, self.config, self.overrides, verb=verb)
        job = None if self.dry_run else submit(text, self.job, self.out)
        tell(text if job is None else f"submitted as job {job}", {"job": job, "script": text})
        return 0
