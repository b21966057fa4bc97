"""Two virtual nodes of real SLURM daemons on this machine, by slurm/local/cluster.sh."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import tiny

SCRIPT = Path(__file__).parents[2] / "slurm" / "local" / "cluster.sh"


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody listens on.

    Other ones for every process: what lives on of an earlier cluster would report its old jobs to this one.
    """
    start = 21000 + 4 * (os.getpid() % 2000)
    for first in range(start, start + 400, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, each in enumerate(sockets):
                each.bind(("127.0.0.1", first + offset))
            return first
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise AssertionError("no free ports")


class Cluster:
    """Start it, ask it, stop it; every wait has a limit and says what it waited for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **tiny.environment(), "SLURM_CONF": str(folder / "slurm.conf"), "DISTUNLEARN_MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip

    def start(self) -> None:
        self.script("start", str(free_ports(4)))

    def script(self, what: str, *more: str) -> None:
        """Its output goes to a file: the daemons keep what they were started with open."""
        with open(self.folder.parent / f"cluster-{what}.log", "w") as log:
            done = subprocess.run(
                [str(SCRIPT), what, str(self.folder), *more], env=self.environment, stdout=log, stderr=log, timeout=60
            )
        assert done.returncode == 0, (self.folder.parent / f"cluster-{what}.log").read_text()

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def submit(self, out: Path, *arguments: str, settings: tuple[str, ...] = ()) -> str:
        """The id of a job of `distunlearn submit`."""
        done = tiny.command("submit", "digits", "--out", str(out), *arguments, *tiny.settings("backend=ddp", *settings),
                            **self.environment)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    def job(self, number: str) -> dict[str, str]:
        """What scontrol shows of it; an array's job is chosen as ARRAY_INDEX."""
        shown = self.ask("scontrol", "show", "job", "--oneliner", number)
        return dict(part.split("=", 1) for part in shown.split() if "=" in part)

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def wait(self, what: str, true: Callable[[], bool], limit: float = 120) -> None:
        end = time.monotonic() + limit
        while not true():
            assert time.monotonic() < end, f"not within {limit} s: {what}\n{self.ask('squeue')}\n{self.logs()}"
            time.sleep(0.2)

    def wait_for_state(self, number: str, *states: str, limit: float = 120) -> None:
        self.wait(f"job {number} {states}", lambda: self.state(number) in states, limit)

    def again(self, number: str) -> None:
        """Let a requeued job start now; SLURM would wait for two minutes. The nodes must have let go of it first."""
        self.wait_for_state(number, "PENDING")
        self.wait("idle nodes", lambda: self.ask("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split() == ["idle"] * 2)
        time.sleep(3)  # until then a node takes the job's second attempt for its first, which it has ended
        self.ask("scontrol", "update", f"JobId={number}", "StartTime=now")

    def logs(self) -> str:
        found = sorted(self.folder.parent.rglob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in found)

    def stop(self) -> None:
        self.script("stop")


def has_step(out: Path, phase: str, step: int) -> bool:
    ledger = out / "ledger.jsonl"
    return ledger.exists() and f'"event":"step","phase":"{phase}","step":{step},' in ledger.read_text()


def log_of(out: Path, number: str) -> str:
    path = out / "slurm" / f"{number}.log"
    return path.read_text() if path.exists() else ""
