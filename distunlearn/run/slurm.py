"""SLURM jobs: a batch script that launches one process per task, survives signals, and asks for itself again.

The script is plain bash without any value from outside but those quoted here. What it does about signals:

    time limit, preemption   SLURM sends USR1 to the batch shell some time before; the shell hands it to srun, the ranks
                             agree on a step, save and end with 75, and the job is requeued, if it made progress and has
                             attempts left
    scancel, scontrol requeue   SLURM sends TERM to the ranks: they save and end with 75; the shell requeues nothing
"""

from __future__ import annotations

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

from distunlearn.common.records import LineFile
from distunlearn.common.text import printable
from distunlearn.errors import ConfigError

TEMPLATE = Path(__file__).with_name("job.sbatch")
_WORD = re.compile(r"[A-Za-z0-9_.,:@/+=*&|\[\]-]+")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d{2}))?(?::(\d{2}))?")
_PASSED = re.compile(r"[a-z][a-z0-9-]*(=[^\s#].*)?")
_ARRAY = re.compile(r"[0-9][0-9,:-]*(%\d+)?")

# Fields that are options of sbatch as they are.
_OPTIONS = (
    ("memory", "mem"), ("time", "time"), ("partition", "partition"), ("account", "account"), ("qos", "qos"),
    ("reservation", "reservation"), ("constraint", "constraint"), ("exclude", "exclude"), ("mail_type", "mail-type"),
    ("mail_user", "mail-user"), ("array", "array"),
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What a job asks for. `tasks`: processes on each node, one per GPU where `gpus` is not 0.

    What is empty is the cluster's default.
    """

    nodes: int = 1
    tasks: int = 1
    gpus: int = 0
    gpu_type: str = ""  # such as a100
    cpus: int = 0  # per task; 0: the cluster's default
    memory: str = ""  # per node, as sbatch writes it
    time: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    reservation: str = ""
    constraint: str = ""
    exclude: str = ""  # nodes
    mail_type: str = ""  # such as END,FAIL
    mail_user: str = ""
    logs: str = ""  # folder of the job's log; empty: DIR/slurm
    sbatch: tuple[str, ...] = ()  # further options of sbatch without their dashes, such as licenses=x exclusive
    array: str = ""
    name: str = "distunlearn"
    warning: int = 120  # seconds before the time limit at which the run is told to save
    requeues: int = 10
    container: str = ""  # image for srun's --container-image (pyxis), with a python of its own; empty: none
    setup: str = ""  # file that the script sources first, such as one that activates an environment

    def check(self) -> list[str]:
        """All reasons why this cannot be a job, one sentence each."""
        problems = []
        for key, least in (("nodes", 1), ("tasks", 1), ("gpus", 0), ("cpus", 0), ("warning", 1), ("requeues", 0)):
            if getattr(self, key) < least:
                problems.append(f"--{key} is {getattr(self, key)}, expected at least {least}")
        if self.gpus and self.tasks != self.gpus:
            problems.append(f"--tasks is {self.tasks} and --gpus {self.gpus}, expected one process for each GPU")
        for key in (*(key for key, _ in _OPTIONS if key not in ("time", "array")), "gpu_type", "name"):
            value = getattr(self, key)
            if value and (not _WORD.fullmatch(value) or value.startswith("-")):
                problems.append(
                    f"--{key.replace('_', '-')} is {printable(value, 60)!r}, expected letters, digits and any of "
                    "_.,:@/+=*&|[]-"
                )
        if self.gpu_type and not self.gpus:
            problems.append(f"--gpu-type is {printable(self.gpu_type, 60)!r} and --gpus 0, expected a number of GPUs")
        seconds = _seconds(self.time) if self.time else None
        if self.time and seconds is None:
            problems.append(f"--time is {printable(self.time, 60)!r}, expected minutes, HH:MM:SS or D-HH:MM:SS")
        elif seconds is not None and seconds <= self.warning:
            problems.append(
                f"--time is {self.time} ({seconds} s) and --warning {self.warning} s, expected a limit that is longer "
                "than the warning before it"
            )
        for text in self.sbatch:
            if not _PASSED.fullmatch(text) or any(ord(c) < 32 for c in text):
                problems.append(
                    f"--sbatch is {printable(text, 60)!r}, expected an option without its dashes, such as licenses=x"
                )
        if self.setup and not Path(self.setup).is_file():
            problems.append(f"--setup is {printable(self.setup, 120)}, which is no file; check the path")
        if self.array and not _ARRAY.fullmatch(self.array):
            problems.append(f"--array is {printable(self.array, 60)!r}, expected such as 0-9 or 1,3,5 or 0-99%4")
        return problems


def script(
    job: Job,
    recipe: str | None,
    out: Path,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    python: str | None = None,
    verb: Sequence[str] | None = None,
) -> str:
    """The batch script of a run by the interpreter `python`; None: this one, or the container's own.

    In an array every task is a run of its own: DIR/<index>, with `seed=<index>` unless the seed is set. verb: another
    command than `run` of a recipe; another verb than `run` has no seeds.

    Raises:
        ConfigError: the job cannot be.
    """
    problems = job.check()
    python = python or ("python" if job.container else sys.executable)
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
    seeded = arguments[0] != "run" or any(text.startswith("seed=") for text in overrides)
    values = {
        "directives": "\n".join(f"#SBATCH {line}" for line in _directives(job)),
        "out": shlex.quote(str(Path(out).resolve())),
        "setup": f"set +u # it is not ours\nsource {shlex.quote(str(Path(job.setup).resolve()))}\nset -u\n"
        if job.setup
        else "",
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
    logs = Path(job.logs).resolve() if job.logs else folder
    logs.mkdir(parents=True, exist_ok=True)
    log = str(logs).replace("%", "%%") + ("/%A-%a.log" if job.array else "/%j.log")
    done = subprocess.run(
        ["sbatch", "--parsable", f"--output={log}", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ConfigError(f"sbatch refuses the job: {printable(done.stderr.strip() or done.stdout.strip(), 300)}.")
    number = done.stdout.strip().split(";")[0]
    jobs = LineFile(folder / "jobs.jsonl")
    jobs.record({"job": number, "time": round(time.time(), 3), "nodes": job.nodes, "tasks": job.tasks,
                 "host": os.uname().nodename})  # fmt: skip
    jobs.close()
    return number


def _directives(job: Job) -> list[str]:
    lines = [
        f"--job-name={job.name}", f"--nodes={job.nodes}", f"--ntasks-per-node={job.tasks}",
        "--requeue", "--open-mode=append", f"--signal=B:USR1@{job.warning}",
    ]  # fmt: skip
    kind = f"{job.gpu_type}:" if job.gpu_type else ""
    lines += [f"--gpus-per-node={kind}{job.gpus}"] if job.gpus else []
    lines += [f"--cpus-per-task={job.cpus}"] if job.cpus else []
    lines += [f"--{option}={getattr(job, key)}" for key, option in _OPTIONS if getattr(job, key)]
    return [*lines, *(f"--{text}" for text in job.sbatch)]


def _seconds(time: str) -> int | None:
    """A time as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None: none of these."""
    found = _TIME.fullmatch(time)
    if found is None:
        return None
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1)
    return 86_400 * int(days or 0) + sum(number * unit for number, unit in zip(numbers, units, strict=False))
