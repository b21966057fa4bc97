"""Asked to stop, a run ends with 75 in a state from which the same command ends in the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from distunlearn.engine.checkpoint.format import latest_checkpoint

LONG = ["pretrain.epochs=12", "pretrain.checkpoint_every=1000", "unlearn.steps=40", "unlearn.checkpoint_every=1000"]
ALONE = [sys.executable, "-m", "distunlearn"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "distunlearn"]
STOPPED = 75


def started(launcher: list[str], out: Path, *extra: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*launcher, "run", "digits", "--out", str(out), *tiny.settings(*LONG, *extra)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=tiny.environment(), start_new_session=True,
    )  # fmt: skip


def wait_for(out: Path, phase: str, step: int, process: subprocess.Popen) -> None:
    needle = f'"event":"step","phase":"{phase}","step":{step},'
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        ledger = out / "ledger.jsonl"
        if ledger.exists() and needle in ledger.read_text():
            return
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(f"the run never came to step {step} of {phase}: {process.communicate()[1][-3000:]}")


def ended(process: subprocess.Popen) -> tuple[int, str]:
    try:
        said = process.communicate(timeout=120)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


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
    expected = started(ALONE, whole)
    process = started(ALONE, out)
    wait_for(out, "pretrain", 5, process)
    process.send_signal(signal.SIGTERM)
    check_stopped(*ended(process), out, "pretrain", "SIGTERM")
    process = started(ALONE, out)
    wait_for(out, "unlearn", 4, process)
    process.send_signal(signal.SIGUSR1)
    check_stopped(*ended(process), out, "unlearn", "SIGUSR1")
    process = started(ALONE, out)
    wait_for(out, "unlearn", 15, process)
    (out / "stop").touch()
    check_stopped(*ended(process), out, "unlearn", "the file stop")
    assert not (out / "stop").exists()
    process = started(ALONE, out)
    wait_for(out, "unlearn", 25, process)
    process.send_signal(signal.SIGINT)
    check_stopped(*ended(process), out, "unlearn", "SIGINT")
    last = ended(started(ALONE, out))[0]
    assert last == ended(expected)[0] and last in (0, 6, 7)
    assert all(torch.equal(weights(out)[name], value) for name, value in weights(whole).items())
    coverage = [json.loads((f / "audit/summary.json").read_text())["coverage"] for f in (whole, out)]
    assert coverage[0] == coverage[1]
    attempts = json.loads((out / "done.json").read_text())["attempts"]
    assert attempts == 4


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    """Here it comes while the first one is not yet honoured, for the process is held before its next step."""
    process = started(ALONE, tmp_path / "run")
    wait_for(tmp_path / "run", "pretrain", 2, process)
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] in (-signal.SIGTERM, STOPPED)  # the latter if the step was over in between


def children(process: subprocess.Popen) -> list[int]:
    """The workers of a launcher, in rank order."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return sorted(int(pid) for pid in found.split())


@pytest.mark.slow
def test_one_rank_is_asked_and_all_stop_after_the_same_step(tmp_path):
    out, whole = tmp_path / "stopped", tmp_path / "whole"
    process = started(TWO, out, "backend=ddp")
    wait_for(out, "pretrain", 5, process)
    os.kill(children(process)[-1], signal.SIGUSR1)
    code, said = ended(process)
    assert code == 1 and said.count(f"exitcode  : {STOPPED}") >= 1, said[-3000:]  # what torchrun makes of it
    done = steps_done(out, "pretrain")
    assert f"pretrain was stopped by SIGUSR1 after step {done} of" in said
    assert latest_checkpoint(out / "original/checkpoints")[0].step == done
    for folder in (out, whole):
        assert "SIGUSR1" not in ended(started(TWO, folder, "backend=ddp"))[1]
    assert all(torch.equal(weights(out)[name], value) for name, value in weights(whole).items())
