"""Killed without warning and started again: the same final weights, bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time

import pytest
import tiny
import torch
import zygote
from safetensors.torch import load_file

LONG = ["pretrain.epochs=12", "pretrain.checkpoint_every=5", "unlearn.steps=40", "unlearn.checkpoint_every=5"]


def states(out):
    return {
        name: load_file(out / folder / "training_state.safetensors")
        for name, folder in (("original", "original"), ("unlearned", "."), ("retrained", "retrained"))
    }


def kill_at(out, recipe, phase, step, extra):
    """Start a run, SIGKILL it once the ledger shows that `phase` passed `step`; returns the steps seen."""
    argv = ["run", recipe, "--out", str(out), *tiny.settings(*LONG, *extra)]
    group = zygote.shared().start(1, argv, limit=240)
    needle = f'"event":"step","phase":"{phase}","step":{step},'
    ledger = out / "ledger.jsonl"
    while group.alive() and not (ledger.exists() and needle in ledger.read_text()):
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.kill(group.pids[0], signal.SIGKILL)
    assert group.wait() == [-signal.SIGKILL], "the run ended before it could be killed"


# The process is killed while the memory is partly filled.
POOLED = ["constraint.memory_steps=6", "objective.queue_size=64"]
IN_PARTS = ["pretrain.accumulate=2", "unlearn.accumulate=4"]


@pytest.mark.parametrize(
    ("recipe", "extra"),
    [pytest.param("digits", [], marks=pytest.mark.matrix), ("digits_moco", [*IN_PARTS, *POOLED])],
)
def test_killed_mid_pretrain_and_mid_unlearn_ends_in_the_same_weights(tmp_path, recipe, extra):
    whole = tiny.run(tmp_path / "whole", *LONG, *extra, recipe=recipe)
    assert whole.returncode in (0, 6, 7), whole.stderr[-3000:]
    out = tmp_path / "killed"
    kill_at(out, recipe, "pretrain", 13, extra)
    assert not (out / "original/done.json").exists()
    kill_at(out, recipe, "unlearn", 17, extra)
    assert (out / "original/done.json").exists() and not (out / "done.json").exists()
    again = tiny.run(out, *LONG, *extra, recipe=recipe)
    assert again.returncode == whole.returncode, again.stderr[-3000:]

    starts = [
        (line["phase"], line["step"])
        for line in map(json.loads, filter(None, (out / "ledger.jsonl").read_text().splitlines()))
        if line.get("event") == "start"
    ]
    assert ("pretrain", 10) in starts and ("unlearn", 15) in starts  # it resumed, it did not start anew
    for name, expected in states(tmp_path / "whole").items():
        found = states(out)[name]
        assert expected.keys() == found.keys()
        for key in expected:
            assert torch.equal(expected[key], found[key]), (name, key)
    other = tiny.run(tmp_path / "other", *LONG, *extra, "seed=1", recipe=recipe)  # negative control: the check can fail
    assert other.returncode in (0, 6, 7)
    control = states(tmp_path / "other")["unlearned"]
    assert any(not torch.equal(control[k], states(out)["unlearned"][k]) for k in control)

    summaries = [json.loads((folder / "audit/summary.json").read_text()) for folder in (tmp_path / "whole", out)]
    assert summaries[0]["coverage"] == summaries[1]["coverage"]
    assert summaries[0]["attacks"] == summaries[1]["attacks"]
    assert summaries[0]["cost"]["unlearn_images"] == summaries[1]["cost"]["unlearn_images"]


def test_another_configuration_does_not_resume_into_the_folder(tmp_path):
    out = tmp_path / "run"
    assert tiny.run(out).returncode in (0, 6, 7)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    done = tiny.run(out, "unlearn.lr=0.5")
    assert done.returncode == 2
    assert "unlearn.lr" in done.stderr and "Traceback" not in done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
