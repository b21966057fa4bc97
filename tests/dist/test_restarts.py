"""Two agents of torchrun, as on two nodes: a worker is killed in each phase, all are started again and go on, to the
same weights, scores and report.

pytest -m matrix tests/dist/test_restarts.py
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from outcomes import ENDS, has_begun, outcome, phase_of
from processes import environment, free_port
from zygote import shared

SETTINGS = ("pretrain.epochs=8", "pretrain.checkpoint_every=2", "unlearn.steps=24", "unlearn.checkpoint_every=2",
            "backend=ddp")  # fmt: skip
RUN = ["run", "digits"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, object]:
    """What a run that nobody disturbs ends with."""
    out = tmp_path_factory.mktemp("restarts") / "whole"
    group = shared().start(2, [*RUN, "--out", str(out), *tiny.settings(*SETTINGS)], 500)
    assert set(group.wait()) <= {0, 6, 7}, group.said()
    return outcome(out)


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


def worker(rank: int, agents: list[subprocess.Popen]) -> int:
    """The process id of a rank, by the variables that its agent gave it."""
    for one in agents:
        for pid in Path(f"/proc/{one.pid}/task/{one.pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    return int(pid)
    raise AssertionError(f"no process is rank {rank}")


def kill_in(out: Path, rank: int, phase: str, agents: list[subprocess.Popen]) -> None:
    """Kill a rank when it has begun a phase, which does not end by it."""
    limit = time.monotonic() + 500
    while not has_begun(out, phase, 0.0):
        assert all(one.poll() is None for one in agents) and time.monotonic() < limit, f"{phase} did not begin"
        time.sleep(0.005)
    pid = worker(rank, agents)
    assert phase_of(out) == phase
    os.kill(pid, signal.SIGKILL)
    assert not (out / ENDS[phase]).exists(), f"{phase} had ended"


@pytest.mark.matrix
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kills", [
    ((1, "pretrain"), (0, "unlearn")), ((0, "pretrain"), (1, "unlearn")), ((1, "retrain"), (0, "audit")),
    ((0, "retrain"), (1, "audit")), ((0, "report"),), ((1, "report"),),
])  # fmt: skip
def test_workers_of_two_agents_that_are_killed_go_on(whole, tmp_path, kills):
    out, port = tmp_path / "run", free_port()
    logs = [tmp_path / f"agent-{node}.log" for node in (0, 1)]
    agents = [agent(node, port, out, logs[node]) for node in (0, 1)]
    try:
        for rank, phase in kills:
            kill_in(out, rank, phase, agents)
        codes = [one.wait(timeout=500) for one in agents]
    finally:
        for one in agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.pid, signal.SIGKILL)
    told = "\n".join(log.read_text()[-3000:] for log in logs)
    assert "in two processes" not in told, told
    found = outcome(out)
    assert [name for name in whole if found[name] != whole[name]] == [] and set(codes) <= {0, 1}, told
