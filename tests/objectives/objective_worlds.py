"""Starting the gloo processes of one world for the tests of this folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import distunlearn


def launch(script: str, world: int, folder: Path) -> list[dict[str, dict[str, torch.Tensor]]]:
    """What every rank of `python script RANK WORLD FOLDER` left in FOLDER/rank-RANK.pt."""
    root = str(Path(distunlearn.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": root}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(world), str(folder)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        errors = [process.communicate(timeout=200)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    codes = [process.returncode for process in ranks]
    assert codes == [0] * world, "\n".join(errors)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(world)]
