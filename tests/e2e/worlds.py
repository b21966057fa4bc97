"""Starting the gloo processes of one world for the tests of this folder and its neighbours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import zygote


def launch(script: str, world: int, folder: Path) -> list[dict[str, Any]]:
    """What every rank of `python script RANK WORLD FOLDER` left in FOLDER/rank-RANK.pt; ranks are forks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    jobs = [([str(rank), str(world), str(folder)], environment) for rank in range(world)]
    group = zygote.shared().scripts(script, jobs, 200)
    assert group.wait() == [0] * world, "\n".join(group.said(rank)[-4000:] for rank in range(world))
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(world)]
