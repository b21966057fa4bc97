"""Two agents of torchrun, as on two nodes: a worker is killed, all are started again and go on to the same weights.

pytest -m matrix tests/dist/test_restarts.py
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from processes import environment, free_port
from zygote import shared

SETTINGS = ("pretrain.epochs=12", "pretrain.checkpoint_every=2", "unlearn.steps=30", "unlearn.checkpoint_every=2",
            "backend=ddp", "audit.tier=0")  # fmt: skip
RUN = ["run", "digits"]


def states(out: Path) -> list[str]:
    return [json.loads((out / place / "done.json").read_text())["state"] for place in ("original", ".")]


def agent(node: int, port: str, out: Path, log: Path) -> subprocess.Popen:
    """One of two nodes, with one process and two restarts."""
    with log.open("w") as handle:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank",
             str(node), "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "restarts",
             "--local_addr", "127.0.0.1", "--max_restarts", "2", "-m", "distunlearn", *RUN, "--out", str(out),
             *tiny.settings(*SETTINGS)],
            env=environment(), stdout=handle, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def worker_in(out: Path, rank: int, phase: str, step: int, agents: list[subprocess.Popen]) -> int:
    """The process id of a rank that has come to a step of a phase."""
    limit = time.monotonic() + 180
    while time.monotonic() < limit:
        with contextlib.suppress(OSError, ValueError):
            report = json.loads((out / "watch" / f"rank-{rank:04d}.json").read_text())
            if report["phase"] == phase and report["step"] >= step:
                return report["pid"]
        lines = (out / "ledger.jsonl").read_text().splitlines() if (out / "ledger.jsonl").exists() else []
        if any(f'"step","phase":"{phase}","step":{step},' in line for line in lines):
            return json.loads((out / "watch" / f"rank-{rank:04d}.json").read_text())["pid"]
        assert all(one.poll() is None for one in agents), "an agent has ended"
        time.sleep(0.01)
    raise AssertionError(f"no rank {rank} in {phase}")


@pytest.mark.matrix
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [(1, 0), (0, 1)])
def test_workers_of_two_agents_that_are_killed_go_on(tmp_path, ranks):
    group = shared().start(2, [*RUN, "--out", str(tmp_path / "whole"), *tiny.settings(*SETTINGS)], 200)
    assert set(group.wait()) <= {0, 6, 7}, group.said()
    out, port = tmp_path / "run", free_port()
    logs = [tmp_path / f"agent-{node}.log" for node in (0, 1)]
    agents = [agent(node, port, out, logs[node]) for node in (0, 1)]
    try:
        for rank, phase, step in zip(ranks, ("pretrain", "unlearn"), (4, 5), strict=True):
            os.kill(worker_in(out, rank, phase, step, agents), signal.SIGKILL)
        codes = [one.wait(timeout=200) for one in agents]
    finally:
        for one in agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.pid, signal.SIGKILL)
    told = "\n".join(log.read_text()[-3000:] for log in logs)
    assert "in two processes" not in told, told
    starts = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines() if '"start"' in line]
    assert len(starts) == 4, starts  # each phase was begun twice: both kills hit
    assert states(out) == states(tmp_path / "whole") and set(codes) <= {0, 1}, told
