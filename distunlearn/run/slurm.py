"""SLURM jobs: a batch script that launches one process per task, survives signals, and asks for itself again.

The script is plain bash without any value from outside but those quoted here. What it does about signals:

    time limit, preemption   SLURM sends USR1 to the batch shell some time before; the shell hands it to srun, the ranks
                             agree on a step, save and end with 75, and the job is requeued, if it made progress and has
                             attempts left
    scancel, scontrol requeue   SLURM sends TERM to the ranks: they save and end with 75; the shell requeues nothing
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distunlearn.common.text import printable
from distunlearn.errors import ConfigError

TEMPLATE = Path(__file__).with_name("job.sbatch")
_WORD = re.compile(r"[A-Za-z0-9_.,:@/+=*&|-]+")
_TIME = re.compile(r"(\d+-)?\d{1,3}(:\d{2}){0,2}")
_ARRAY = re.compile(r"[0-9][0-9,:-]*(%\d+)?")


@dataclass(frozen=True)
class Job:
    """What a job asks for. `tasks`: processes on each node, one per GPU where `gpus` is not 0."""

    nodes: int = 1
    tasks: int = 1
    gpus: int = 0
    cpus: int = 0  # per task; 0: the cluster's default
    memory: str = ""  # per node, as sbatch writes it; empty: the cluster's default
    time: str = ""
    partition: str = ""
    account: str = ""
    constraint: str = ""
    array: str = ""
    name: str = "distunlearn"
    warning: int = 120  # seconds before the time limit at which the run is told to save
    requeues: int = 10
    container: str = ""  # image for srun's --container-image (pyxis); empty: none
    setup: str = ""  # file that the script sources first, such as one that activates an environment

    def check(self) -> list[str]:
        """All reasons why this cannot be a job, one sentence each."""
        problems = []
        for key, least in (("nodes", 1), ("tasks", 1), ("gpus", 0), ("cpus", 0), ("warning", 1), ("requeues", 0)):
            if getattr(self, key) < least:
                problems.append(f"--{key} is {getattr(self, key)}, expected at least {least}")
        if self.gpus and self.tasks != self.gpus:
            problems.append(f"--tasks is {self.tasks} and --gpus {self.gpus}, expected one process for each GPU")
        for key in ("memory", "partition", "account", "constraint", "name"):
            value = getattr(self, key)
            if value and (not _WORD.fullmatch(value) or value.startswith("-")):
                problems.append(
                    f"--{key} is {printable(value, 60)!r}, expected letters, digits and any of _.,:@/+=*&|-"
                )
        if self.time and not _TIME.fullmatch(self.time):
            problems.append(f"--time is {printable(self.time, 60)!r}, expected minutes, HH:MM:SS or D-HH:MM:SS")
        if self.array and not _ARRAY.fullmatch(self.array):
            problems.append(f"--array is {printable(self.array, 60)!r}, expected such as 0-9 or 1,3,5 or 0-99%4")
        return problems


def script(
    job: Job,
    recipe: str | None,
    out: Path,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    python: str = sys.executable,
    verb: Sequence[str] | None = None,
) -> str:
    """The batch script of a run by the interpreter `python`.

    In an array every task is a run of its own: DIR/<index>, with `seed=<index>` unless the seed is set. verb: another
    command than `run` of a recipe, which is given `--out DIR/<index>` and the settings alone.

    Raises:
        ConfigError: the job cannot be.
    """
    problems = job.check()
    if any(ord(c) < 32 or ord(c) == 127 for text in (str(out), str(config), job.setup, job.container, *overrides)
           for c in text):  # fmt: skip
        problems.append("a path or setting contains a control character; remove it")
    if problems:
        raise ConfigError("; ".join(problems) + ".")
    arguments = list(verb) if verb else ["run", *([recipe] if recipe else [])]
    if config is not None:
        arguments += ["--config", str(Path(config).resolve())]
    for text in overrides:
        arguments += ["--set", text]
    command = " ".join(shlex.quote(part) for part in (python, "-m", "distunlearn", *arguments))
    seeded = verb is not None or any(text.startswith("seed=") for text in overrides)
    values = {
        "directives": "\n".join(f"#SBATCH {line}" for line in _directives(job)),
        "out": shlex.quote(str(Path(out).resolve())),
        "setup": f"source {shlex.quote(str(Path(job.setup).resolve()))}\n" if job.setup else "",
        "array": 'out="$out/$SLURM_ARRAY_TASK_ID"\n' if job.array else "",
        "seed": ' --set "seed=$SLURM_ARRAY_TASK_ID"' if job.array and not seeded else "",
        "command": command,
        "container": f" --container-image={shlex.quote(job.container)}" if job.container else "",
        "requeues": str(job.requeues),
    }
    return re.sub(r"@(\w+)@", lambda place: values[place[1]], TEMPLATE.read_text(encoding="utf-8"))


def submit(text: str, job: Job, out: Path) -> str:
    """Write the script to DIR/slurm/job.sbatch and give it to sbatch; returns the job's id.

    Raises:
        ConfigError: sbatch is not here, or refuses.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch is not found; submit from a machine of the cluster, or use --dry-run.")
    folder = Path(out).resolve() / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.sbatch"
    path.write_text(text, encoding="utf-8")
    # Values that SLURM would expand (%j) or split in a directive go as an argument, past any shell.
    log = str(folder).replace("%", "%%") + ("/%A-%a.log" if job.array else "/%j.log")
    done = subprocess.run(
        ["sbatch", "--parsable", f"--output={log}", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ConfigError(f"sbatch refuses the job: {printable(done.stderr.strip() or done.stdout.strip(), 300)}.")
    number = done.stdout.strip().split(";")[0]
    with open(folder / "jobs.jsonl", "a", encoding="utf-8") as handle:
        handle.write(json.dumps({"job": number, "time": round(time.time(), 3), "nodes": job.nodes, "tasks": job.tasks,
                                 "host": os.uname().nodename}) + "\n")  # fmt: skip
    return number


def _directives(job: Job) -> list[str]:
    lines = [
        f"--job-name={job.name}", f"--nodes={job.nodes}", f"--ntasks-per-node={job.tasks}",
        "--requeue", "--open-mode=append", f"--signal=B:USR1@{job.warning}",
    ]  # fmt: skip
    lines += [f"--gpus-per-node={job.gpus}"] if job.gpus else []
    lines += [f"--cpus-per-task={job.cpus}"] if job.cpus else []
    for key, option in (("memory", "mem"), ("time", "time"), ("partition", "partition"), ("account", "account"),
                        ("constraint", "constraint"), ("array", "array")):  # fmt: skip
        lines += [f"--{option}={getattr(job, key)}"] if getattr(job, key) else []
    return lines
