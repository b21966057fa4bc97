"""A rank that is killed ends the others within seconds, with 5 and a sentence; the run then goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import zygote
from processes import environment

from distunlearn.distributed.process_group import lost_rank

pytestmark = pytest.mark.slow
LONG = ("backend=ddp", "unlearn.steps=200", "unlearn.checkpoint_every=5")
ENOUGH = (*LONG, "unlearn.steps=70")  # to be killed twice, and to end


def start(out: Path, settings: tuple[str, ...] = LONG) -> zygote.Group:
    """Two ranks without a launcher: nobody but themselves ends them."""
    return zygote.shared().start(2, ["run", "digits", "--out", str(out), *tiny.settings(*settings)], limit=240)


def wait_for_step(out: Path, step: int, ranks: zygote.Group) -> None:
    needle = f'"event":"step","phase":"unlearn","step":{step},'
    while not (out / "ledger.jsonl").exists() or needle not in (out / "ledger.jsonl").read_text():
        assert ranks.alive(), f"{ranks.wait()} {ranks.said()}"
        time.sleep(0.01)


def test_the_survivor_of_a_killed_rank_ends_with_5_and_says_so(tmp_path):
    out, step = tmp_path / "run", 6
    for victim in (1, 0):
        ranks = start(out, ENOUGH)
        wait_for_step(out, step, ranks)
        os.kill(ranks.pids[victim], signal.SIGKILL)
        codes, said = ranks.wait(), ranks.said(1 - victim)
        assert codes[victim] == -signal.SIGKILL  # the fault fired
        assert codes[1 - victim] == 5 and ranks.seconds[1 - victim] - ranks.seconds[victim] < 60, said[-3000:]
        gone = (
            f"error: rank {victim} is gone (process {ranks.pids[victim]}, without a word); rank {1 - victim} of 2 lost"
        )
        assert gone in said and "Traceback" not in said
        step += 10  # the next attempt goes on from a checkpoint, and the owner that was killed is no obstacle
    assert (out / "owner.json").exists()  # of the main rank that was killed
    assert set(start(out, ENOUGH).wait()) <= {0, 6, 7}
    assert not (out / "owner.json").exists() and (out / "report.html").exists()
    starts = [line for line in (out / "ledger.jsonl").read_text().splitlines() if '"start","phase":"unlearn"' in line]
    assert len(starts) == 3 and '"step":0' in starts[0] and '"step":0' not in starts[1]


def test_a_second_start_is_refused_while_the_first_is_at_work(tmp_path):
    out = tmp_path / "run"
    ranks = start(out)
    wait_for_step(out, 3, ranks)
    second = subprocess.run(  # for real: the process that forks waits for the first one
        [sys.executable, "-m", "distunlearn", "run", "digits", "--out", str(out), *tiny.settings(*LONG)],
        env=environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert second.returncode == 2 and f"is in use by process {ranks.pids[0]} on" in second.stderr
    assert "Traceback" not in second.stderr and ranks.alive()
    (out / "stop").touch()
    assert ranks.wait() == [75, 75]
    assert not (out / "owner.json").exists()


def test_other_errors_stay_what_they_are():
    assert lost_rank(RuntimeError("[gloo/pair.cc:1] Connection closed by peer")) is None  # one process
