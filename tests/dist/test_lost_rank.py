"""A rank that is killed ends the others within seconds, with 5 and a sentence; the run then goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from processes import environment, free_port

from distunlearn.distributed.process_group import lost_rank

pytestmark = pytest.mark.slow
RUN = [sys.executable, "-m", "distunlearn", "run", "digits"]
LONG = ("backend=ddp", "unlearn.steps=200", "unlearn.checkpoint_every=5")
ENOUGH = (*LONG, "unlearn.steps=70")  # to be killed twice, and to end


def start(out: Path, settings: tuple[str, ...] = LONG) -> list[subprocess.Popen]:
    """Two ranks without a launcher: nobody but themselves ends them. Each has a log beside the run directory."""
    port, started = str(free_port()), []
    for rank in range(2):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        with open(f"{out}.{rank}.log", "w") as log:
            started.append(subprocess.Popen(
                [*RUN, "--out", str(out), *tiny.settings(*settings)], stdout=subprocess.DEVNULL, stderr=log,
                env=environment(**variables, MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            ))  # fmt: skip
    return started


def end(ranks: list[subprocess.Popen]) -> None:
    for rank in ranks:
        rank.kill()
        rank.wait()


def wait_for_step(out: Path, step: int, ranks: list[subprocess.Popen]) -> None:
    needle = f'"event":"step","phase":"unlearn","step":{step},'
    deadline = time.monotonic() + 200
    while not (out / "ledger.jsonl").exists() or needle not in (out / "ledger.jsonl").read_text():
        assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
        time.sleep(0.01)


def test_the_survivor_of_a_killed_rank_ends_with_5_and_says_so(tmp_path):
    out, step = tmp_path / "run", 6
    for victim in (1, 0):
        ranks = start(out, ENOUGH)
        try:
            wait_for_step(out, step, ranks)
            ranks[victim].send_signal(signal.SIGKILL)
            ranks[1 - victim].wait(timeout=60)
        finally:
            end(ranks)
        said = Path(f"{out}.{1 - victim}.log").read_text()
        assert ranks[victim].returncode == -signal.SIGKILL  # the fault fired
        assert ranks[1 - victim].returncode == 5, said[-3000:]
        gone = (
            f"error: rank {victim} is gone (process {ranks[victim].pid}, without a word); rank {1 - victim} of 2 lost"
        )
        assert gone in said and "Traceback" not in said
        step += 10  # the next attempt goes on from a checkpoint, and the owner that was killed is no obstacle
    assert (out / "owner.json").exists()  # of the main rank that was killed
    ranks = start(out, ENOUGH)
    for rank in ranks:
        assert rank.wait(timeout=200) in (0, 6, 7)
    assert not (out / "owner.json").exists() and (out / "report.html").exists()
    starts = [line for line in (out / "ledger.jsonl").read_text().splitlines() if '"start","phase":"unlearn"' in line]
    assert len(starts) == 3 and '"step":0' in starts[0] and '"step":0' not in starts[1]


def test_a_second_start_is_refused_while_the_first_is_at_work(tmp_path):
    out = tmp_path / "run"
    ranks = start(out)
    try:
        wait_for_step(out, 3, ranks)
        second = tiny.run(out, *LONG)
        assert second.returncode == 2 and f"is in use by process {ranks[0].pid} on" in second.stderr
        assert "Traceback" not in second.stderr and all(rank.poll() is None for rank in ranks)
        (out / "stop").touch()
        assert [rank.wait(timeout=60) for rank in ranks] == [75, 75]
    finally:
        end(ranks)
    assert not (out / "owner.json").exists()


def test_other_errors_stay_what_they_are():
    assert lost_rank(RuntimeError("[gloo/pair.cc:1] Connection closed by peer")) is None  # one process
