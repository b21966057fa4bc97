"""Asked to stop, a run ends with 75 in a state from which the same command ends in the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import tiny
import torch
import zygote
from safetensors.torch import load_file

from distunlearn.engine.checkpoint.format import latest_checkpoint

LONG = ["pretrain.epochs=12", "pretrain.checkpoint_every=1000", "unlearn.steps=40", "unlearn.checkpoint_every=1000"]
STOPPED = 75


def started(out: Path, *extra: str, world: int = 1) -> zygote.Group:
    return zygote.shared().start(world, ["run", "digits", "--out", str(out), *tiny.settings(*LONG, *extra)], limit=240)


def wait_for(out: Path, phase: str, step: int, group: zygote.Group) -> None:
    needle = f'"event":"step","phase":"{phase}","step":{step},'
    while group.alive():
        ledger = out / "ledger.jsonl"
        if ledger.exists() and needle in ledger.read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"the run never came to step {step} of {phase}: {group.wait()} {group.said()[-3000:]}")


def ended(group: zygote.Group) -> tuple[int, str]:
    """The exit code of all ranks, and what the first one said."""
    [code] = set(group.wait())
    return code, group.said()


def steps_done(out: Path, phase: str) -> int:
    lines = map(json.loads, filter(None, (out / "ledger.jsonl").read_text().splitlines()))
    return max(line["step"] for line in lines if line["event"] == "step" and line["phase"] == phase) + 1


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "training_state.safetensors")


def check_stopped(code: int, said: str, out: Path, phase: str, reason: str) -> None:
    folder = out / ("original" if phase == "pretrain" else ".")
    done = steps_done(out, phase)
    assert code == STOPPED, said[-3000:]
    assert f"{phase} was stopped by {reason} after step {done} of" in said and "Traceback" not in said
    assert latest_checkpoint(folder / "checkpoints")[0].step == done  # not one step is lost
    assert not (folder / "done.json").exists()


def test_signals_and_the_stop_file_lose_no_step(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    expected = ended(started(whole))[0]
    process = started(out)
    wait_for(out, "pretrain", 5, process)
    os.kill(process.pids[0], signal.SIGTERM)
    check_stopped(*ended(process), out, "pretrain", "SIGTERM")
    process = started(out)
    wait_for(out, "unlearn", 4, process)
    os.kill(process.pids[0], signal.SIGUSR1)
    check_stopped(*ended(process), out, "unlearn", "SIGUSR1")
    process = started(out)
    wait_for(out, "unlearn", 15, process)
    (out / "stop").touch()
    check_stopped(*ended(process), out, "unlearn", "the file stop")
    assert not (out / "stop").exists()
    process = started(out)
    wait_for(out, "unlearn", 25, process)
    os.kill(process.pids[0], signal.SIGINT)
    check_stopped(*ended(process), out, "unlearn", "SIGINT")
    process = started(out)
    wait_for(out, "unlearn", 32, process)
    os.kill(process.pids[0], signal.SIGHUP)
    check_stopped(*ended(process), out, "unlearn", "SIGHUP")
    last = ended(started(out))[0]
    assert last == expected and last in (0, 6, 7)
    assert all(torch.equal(weights(out)[name], value) for name, value in weights(whole).items())
    coverage = [json.loads((f / "audit/summary.json").read_text())["coverage"] for f in (whole, out)]
    assert coverage[0] == coverage[1]
    attempts = json.loads((out / "done.json").read_text())["attempts"]
    assert attempts == 5


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    """Here it comes while the first one is not yet honoured, for the process is held before its next step."""
    group = started(tmp_path / "run")
    wait_for(tmp_path / "run", "pretrain", 2, group)
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGCONT):
        os.kill(group.pids[0], number)
    time.sleep(0.002)
    os.kill(group.pids[0], signal.SIGTERM)
    assert ended(group)[0] in (-signal.SIGTERM, STOPPED)  # the latter if the step was over in between


@pytest.mark.slow
def test_one_rank_is_asked_and_all_stop_after_the_same_step(tmp_path):
    out, whole = tmp_path / "stopped", tmp_path / "whole"
    group = started(out, "backend=ddp", world=2)
    wait_for(out, "pretrain", 5, group)
    os.kill(group.pids[1], signal.SIGUSR1)
    check_stopped(*ended(group), out, "pretrain", "SIGUSR1")
    for folder in (out, whole):
        assert "SIGUSR1" not in ended(started(folder, "backend=ddp", world=2))[1]
    assert all(torch.equal(weights(out)[name], value) for name, value in weights(whole).items())
