"""Starting N processes of one script as torchrun would, with a hard time limit, and reading what each left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import distunlearn


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(**extra: str) -> dict[str, str]:
    """One thread, the loopback, this very package, none of a surrounding launcher's variables."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in launcher and not k.startswith(("ACCELERATE_", "SLURM_"))}
    root = str(Path(distunlearn.__file__).parents[1])
    fixed = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    return {**kept, **fixed, **extra}


def launch(script: str, world: int, folder: Path, *args: str, timeout: float = 200) -> list[Any]:
    """Run `python script FOLDER ARGS` once per rank; each writes FOLDER/rank-R.pt, whose contents are returned.

    A world of 1 gets no variables: it is what a user starts without a launcher.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, started = str(free_port()), []
    for rank in range(world):
        variables = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }
        with open(folder / f"rank-{rank}.log", "w") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, script, str(folder), *args],
                    env=environment(**(variables if world > 1 else {})), stdout=log, stderr=subprocess.STDOUT,
                )
            )
    limit = time.monotonic() + timeout
    try:
        # One failure ends all: the others would wait for it in a collective.
        while any(p.poll() is None for p in started) and not any(p.poll() for p in started):
            assert time.monotonic() < limit, f"{world} processes took more than {timeout} s\n{logs(folder, world)}"
            time.sleep(0.05)
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [p.returncode for p in started] == [0] * world, logs(folder, world)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(world)]


def logs(folder: Path, world: int) -> str:
    return "\n".join((folder / f"rank-{rank}.log").read_text()[-4000:] for rank in range(world))
