"""Starting N processes of one script as torchrun would, with a hard time limit, and reading what each left behind.

They are forks of a process that has imported everything (tests/e2e/zygote.py); what is about starting starts for real.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import zygote
from zygote import free_port, launched

import distunlearn

__all__ = ["environment", "execute_ranks", "free_port", "launch", "start_ranks"]


def environment(**extra: str) -> dict[str, str]:
    """One thread, the loopback, this very package, none of a surrounding launcher's variables, no transformers."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in launcher and not k.startswith(("ACCELERATE_", "SLURM_"))}
    shared = Path(zygote.__file__).parent
    places = (shared.parent / "without_extras", Path(distunlearn.__file__).parents[1], shared.parent, shared)
    root = os.pathsep.join(map(str, places))
    fixed = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    return {**kept, **fixed, **extra}


def launch(script: str, world: int, folder: Path, *args: str, timeout: float = 200) -> list[Any]:
    """Run `python script FOLDER ARGS` once per rank; each writes FOLDER/rank-R.pt, whose contents are returned.

    A world of 1 gets no variables: it is what a user starts without a launcher.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    jobs = [
        ([str(folder), *args], environment(**(launched(rank, world, port) if world > 1 else {})))
        for rank in range(world)
    ]
    group = zygote.shared().scripts(script, jobs, timeout)
    codes = group.wait()
    for rank in range(world):
        (folder / f"rank-{rank}.log").write_text(group.said(rank))
    said = logs(folder, world)
    assert max(group.seconds) <= timeout, f"{world} processes took more than {timeout} s\n{said}"
    assert codes == [0] * world, said
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(world)]


def start_ranks(world: int, arguments: Sequence[str], timeout: float = 120) -> zygote.Group:
    """`distunlearn ARGUMENTS` on so many ranks, as torchrun's processes but forked."""
    port = free_port()
    environments = [environment(**(launched(rank, world, port) if world > 1 else {})) for rank in range(world)]
    return zygote.shared().commands([(arguments, variables) for variables in environments], timeout)


def execute_ranks(world: int, arguments: Sequence[str], timeout: float = 120) -> tuple[list[int], str]:
    """Exit codes of `start_ranks`, and all that was said."""
    group = start_ranks(world, arguments, timeout)
    return group.wait(), "".join(group.said(rank) for rank in range(world))


def logs(folder: Path, world: int) -> str:
    return "\n".join((folder / f"rank-{rank}.log").read_text()[-4000:] for rank in range(world))
