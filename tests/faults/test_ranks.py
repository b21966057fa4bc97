"""Ranks that hang, fail, die or do not run the same: named, and the job ends in time with the right code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from distunlearn.config.schema import RunConfig
from distunlearn.distributed.world import World
from distunlearn.engine import loop
from distunlearn.engine.backends.base import Backend

FIRED = "fault injected: {} at {}, rank {}, unlearn step 2"


def state(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "training_state.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def clean(trained, forget, tmp_path_factory) -> Path:
    """The same run without a fault."""
    out = Path(shutil.copytree(trained, tmp_path_factory.mktemp("clean") / "run"))
    group = forget(out)
    assert group.wait() == [0, 0], group.said() + group.said(1)
    assert not list((out / "watch").iterdir())
    return out


def test_a_rank_that_hangs_is_named_and_the_job_ends(copied, forget):
    group = forget(copied, "runtime.watchdog_s=8", DISTUNLEARN_FAULT="sleep@point=backward,rank=1,step=2")
    assert group.wait() == [5, 5], group.said()
    assert FIRED.format("sleep", "backward", 1) in group.said(1)
    for rank in (0, 1):
        assert f"rank {rank}: error: rank 1 of 2 hangs in unlearn step 2, backward (fault_injection.py:" in group.said(
            rank
        )
        assert "Traceback" not in group.said(rank)
    stack = (copied / "watch/rank-0001.stack.txt").read_text()
    assert "in reach" in stack and "in _micro_batch" in stack
    assert not (copied / "owner.json").exists()  # given back: the next attempt need not wait
    report = json.loads((copied / "watch/rank-0001.json").read_text())
    assert report["stuck"] and 8 < report["age"] < 80


def test_a_collective_left_out_is_told_from_a_slow_rank(copied, forget):
    group = forget(copied, "runtime.watchdog_s=16", DISTUNLEARN_FAULT="skip@point=norm_check,rank=1,step=2")
    assert group.wait() == [5, 5], group.said() + group.said(1)
    assert FIRED.format("skip", "norm_check", 1) in group.said(1)
    told = [group.said(rank) for rank in (0, 1)]
    assert any("the ranks wait for different things" in text for text in told), told
    ages = [json.loads((copied / f"watch/rank-000{rank}.json").read_text())["age"] for rank in (0, 1)]
    assert max(ages) < 16  # not by waiting the whole time


def test_the_error_of_a_rank_reaches_the_others(copied, forget):
    group = forget(copied, DISTUNLEARN_FAULT="raise@point=data,rank=1,step=2")
    assert group.wait() == [5, 70], group.said()
    assert FIRED.format("raise", "data", 1) in group.said(1)
    assert "rank 1 failed:" in group.said(1) and "RuntimeError: injected at data" in group.said(1)
    assert "rank 1 failed (RuntimeError: injected at data); rank 0 of 2 lost another one" in group.said(0)
    assert "Traceback" not in group.said(0)


def test_a_killed_rank_is_named(copied, forget):
    group = forget(copied, DISTUNLEARN_FAULT="kill@point=update,rank=1,step=2")
    assert group.wait() == [5, -9], group.said()
    assert FIRED.format("kill", "update", 1) in group.said(1)
    assert f"rank 1 is gone (process {group.pids[1]}, without a word)" in group.said(0)
    assert group.seconds[0] - group.seconds[1] < 20


SLOW = """
import sys, time
from pathlib import Path
from distunlearn.engine.watchdog import Watch
with Watch(Path(sys.argv[1]), 0, 1, limit=1.0, slow_limit=600.0) as watch, watch.training():
    watch.at("checkpoint", "unlearn", 2, slow=True)
    time.sleep(4)
    print("the checkpoint was in no hurry", flush=True)
    watch.at("update", "unlearn", 3)
    time.sleep(600)
"""


def test_a_slow_checkpoint_is_no_hang_and_the_same_time_in_a_step_is(tmp_path):
    done = subprocess.run([sys.executable, "-c", SLOW, str(tmp_path)], capture_output=True, text=True, timeout=250)
    assert done.returncode == 5 and done.stdout == "the checkpoint was in no hurry\n"
    assert "error: rank 0 of 1 hangs in unlearn step 3, update" in done.stderr
    assert "time.sleep" not in done.stderr and "Current thread" in (tmp_path / "watch/rank-0000.stack.txt").read_text()


def test_checkpoints_are_marked_as_slow_by_the_loop():
    marks = []
    runner = object.__new__(loop._Runner)
    runner.watch = SimpleNamespace(at=lambda place, phase, step, slow: marks.append((place, step, slow)))
    runner.phase = SimpleNamespace(name="unlearn", method=SimpleNamespace(state_dict=dict))
    runner.ctx, runner.first, runner.head = SimpleNamespace(momentum=None, queue=None), 0, ""
    runner.backend = Backend(RunConfig(), World(0, 1, torch.device("cpu")))
    runner._save = lambda step, heads: marks.append("saved")
    runner._at("update", 1)
    runner._save_watched(2)
    assert marks == [("update", 1, False), ("checkpoint", 2, True), "saved"]


def test_ranks_that_do_not_run_the_same_are_refused_at_the_start(copied, forget):
    group = forget(copied, last=("unlearn.lr=0.5", "precision=bf16"))
    assert group.wait() == [5, 5], group.said()
    assert "rank 0 and rank 1 do not run the same (precision: 'fp32' and 'bf16'; unlearn.lr:" in group.said(0)
    assert "0.5" in group.said(0) and not (copied / "checkpoints").exists()


# -- numerics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("action", "point", "what"), [("nan", "loss", "loss"), ("inf", "gradient", "gradient norm")])
def test_a_value_that_is_not_finite_on_one_rank_stops_all_before_the_update(copied, clean, forget, action, point, what):
    fault = f"{action}@point={point},rank=1,step=2"
    group = forget(copied, DISTUNLEARN_FAULT=fault)
    assert group.wait() == [4, 4], group.said() + group.said(1)
    assert FIRED.format(action, point, 1) in group.said(1)
    capture = copied / "nan-step-00000002.json"
    assert f"error: unlearn: the {what} at step 2 is not finite" in group.said(0) and str(capture) in group.said(0)
    found = json.loads(capture.read_text())
    assert (found["phase"], found["step"], found["what"]) == ("unlearn", 2, what)
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    if point == "loss":
        assert [rank["finite"] for rank in found["ranks"]] == [True, False] and "on rank 1" in group.said(0)
        assert found["ranks"][0]["parts"][0]["task_loss"] > 0
    else:
        assert all(rank["gradients"]["not_finite"] > 0 for rank in found["ranks"])
    assert {role: len(ids) for role, ids in found["ids"].items()} == {"retain": 32, "forget": 8, "third_party": 8}
    assert found["ids"]["forget"] == [i for rank in found["ranks"] for i in rank["ids"]["forget"]]
    assert len(found["ranks"][0]["torch_rng"]) > 5000 and found["learning_rate"] > 0
    assert not (copied / "done.json").exists()
    if point == "gradient":
        return
    again = forget(copied)  # had the step changed anything, these weights would be others
    assert again.wait() == [0, 0], again.said()
    assert same(state(copied), state(clean))
