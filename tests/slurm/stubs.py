"""A SLURM made of small scripts: srun runs one task here, scontrol and sbatch write down what they were asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SRUN = """#!/bin/bash
while [ "$1" != bash ]; do shift; done
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=2 SLURM_NNODES=1
exec "$@"
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo first-node && echo second-node
[ "$1" = requeue ] && echo "$2" >> "$STUBS/requeued"
exit "${SCONTROL_CODE:-0}"
"""
SBATCH = """#!/bin/bash
printf '%s\\n' "$@" > "$STUBS/asked"
[ -z "${SBATCH_SAYS:-}" ] || { echo "$SBATCH_SAYS" >&2; exit 1; }
echo "4711;cluster"
"""
# A rank: writes down its arguments and variables, adds a step to the ledger where told to, waits for USR1 or not.
RANK = """
import json, os, signal, sys, time
from pathlib import Path
told = json.loads(os.environ["RANK_DOES"])
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
more = ("SRUN_CPUS_PER_TASK", "DISTUNLEARN_LAUNCH_TOKEN")
seen = {"arguments": sys.argv[1:], "variables": {n: os.environ.get(n) for n in names}}
seen["more"] = {n: os.environ.get(n) for n in more}
out = Path(sys.argv[sys.argv.index("--out") + 1])
if told.get("step"):
    with open(out / "ledger.jsonl", "a") as handle:
        handle.write('{"event":"step"}\\n')
got = []
if told.get("wait"):
    signal.signal(signal.SIGUSR1, lambda *_: got.append("USR1"))
    signal.signal(signal.SIGTERM, lambda *_: got.append("TERM"))
seen["stop_at_start"] = (out / "stop").exists()
Path(os.environ["STUBS"], "rank.json").write_text(json.dumps(seen))
limit = time.monotonic() + 20
while told.get("wait") and not got and time.monotonic() < limit:
    time.sleep(0.01)
seen |= {"got": got, "stop_at_end": (out / "stop").exists()}
Path(os.environ["STUBS"], "rank.json").write_text(json.dumps(seen))
sys.exit(told["code"])
"""


class Stubs:
    """A folder of stand-ins, the environment that finds them, and what they wrote down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "sbatch": SBATCH}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (folder / "rank.py").write_text(RANK)
        # What the script calls `python -m distunlearn`:
        (folder / "python").write_text(f'#!/bin/bash\nshift 2\nexec {sys.executable} {folder / "rank.py"} "$@"\n')
        (folder / "python").chmod(0o755)

    @property
    def python(self) -> str:
        return str(self.folder / "python")

    def environment(self, **extra: str) -> dict[str, str]:
        fixed = {
            "PATH": f"{self.folder}:{os.environ['PATH']}", "STUBS": str(self.folder), "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "n[1-2]",
        }  # fmt: skip
        return {**os.environ, **fixed, **extra}

    def install(self, monkeypatch: pytest.MonkeyPatch, **extra: str) -> None:
        """This process finds the stand-ins too."""
        for name, value in self.environment(**extra).items():
            monkeypatch.setenv(name, value)

    def run(self, text: str, told: dict, send: signal.Signals | None = None, **extra: str) -> tuple[int, str]:
        """The batch script by bash, as on a node; `send` goes to the batch shell once the rank is up."""
        environment = self.environment(RANK_DOES=json.dumps(told), **extra)
        (self.folder / "rank.json").unlink(missing_ok=True)
        path = self.folder / "job.sbatch"
        path.write_text(text)
        process = subprocess.Popen(
            ["bash", str(path)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if send is not None:
            limit = time.monotonic() + 20
            while not (self.folder / "rank.json").exists():
                assert time.monotonic() < limit, "the rank never came up"
                time.sleep(0.01)
            process.send_signal(send)
        said = process.communicate(timeout=60)[0]
        return process.returncode, said

    def rank(self) -> dict:
        return json.loads((self.folder / "rank.json").read_text())

    def requeued(self) -> list[str]:
        path = self.folder / "requeued"
        return path.read_text().splitlines() if path.exists() else []
