"""Faults inside training that need no second look at the launcher: bounds, copies that differ, checkpoints, secrets."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from metrics_file import read_metrics
from safetensors.torch import load_file
from sizes import SMALL

from distunlearn.engine import fault_injection
from distunlearn.errors import ConfigError

FIRED = "fault injected: {} at {}, rank {}, {} step {}"


def lines(out: Path) -> list[dict]:
    """The ledger without its times, the links that follow from them, and what a start says of the variable."""
    found = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("time", "faults", "prev")} for line in found]


# -- the injector itself ---------------------------------------------------------------------------------------------


def test_without_the_variable_nothing_happens(monkeypatch):
    monkeypatch.delenv(fault_injection.VARIABLE, raising=False)
    fault_injection._faults.cache_clear()
    monkeypatch.setattr(fault_injection, "_next", None)  # whatever looked for a fault would fail
    value, state = torch.ones(3), torch.get_rng_state()
    for point in fault_injection.POINTS:
        assert fault_injection.reach(point, 0, "unlearn") is False
        assert fault_injection.poison(point, value, 0) is value
        assert fault_injection.poison_gradient(point, value, 0) is value
    assert torch.equal(torch.get_rng_state(), state)


def test_conditions_and_counts(monkeypatch, capsys):
    monkeypatch.setenv(fault_injection.VARIABLE, "skip@point=update,rank=1,step=3,times=2;nan@point=loss")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(fault_injection, "_allowed", True)
    fault_injection._faults.cache_clear()
    try:
        assert not fault_injection.reach("update", 2, "unlearn") and not fault_injection.reach("save", 3, "unlearn")
        assert [fault_injection.reach("update", 3, "unlearn") for _ in range(3)] == [True, True, False]
        assert torch.isnan(fault_injection.poison("loss", torch.ones(1), 0)).all()
        assert capsys.readouterr().err.count("fault injected: skip at update, rank 1, unlearn step 3") == 2
        for text in ("explode@point=update", "kill@point=nowhere", "kill@point=update,colour=red"):
            with pytest.raises(ConfigError, match="for tests only"):
                fault_injection._parse(text)
    finally:
        fault_injection._faults.cache_clear()


def test_a_fault_that_never_fires_changes_no_bit(trained, tmp_path, forget, zygote):
    """And two runs of one seed write the same ledger, but for the times."""
    import shutil

    outs = [Path(shutil.copytree(trained, tmp_path / name)) for name in ("plain", "armed")]
    groups = []
    for out, extra in zip(outs, ({}, {"DISTUNLEARN_FAULT": "kill@point=update,rank=7"}), strict=True):
        groups.append(forget(out, **extra))
        assert groups[-1].wait() == [0, 0], groups[-1].said()
    a, b = (load_file(out / "training_state.safetensors") for out in outs)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert lines(outs[0]) == lines(outs[1]) and len(lines(outs[0])) > 7
    assert not any("fault injected" in group.said(rank) for group in groups for rank in (0, 1))


# -- bounds of a method that climbs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", ["method.loss_bound=5.5", "method.embedding_bound=0.01"])
def test_a_run_that_diverges_is_stopped_by_its_declared_bound(trained, tmp_path, forget, bound):
    out = tmp_path / "run"
    ascent = ("method.name=grad_ascent", "method.ascent_bound=1e9", "unlearn.lr=5e-3", "unlearn.steps=25")
    group = forget(out, f"runtime.reuse={trained}", *ascent, bound, world=1)
    assert group.wait() == [4], group.said()
    key = bound.partition("=")[0]
    assert f"beyond {key} = " in group.said() and "Traceback" not in group.said()
    capture = json.loads(next(out.glob("nan-step-*.json")).read_text())
    assert capture["what"] == "bound" and key in capture["reason"] and len(capture["ids"]["forget"]) == 8
    assert not (out / "done.json").exists()
    free = tmp_path / "free"  # without a bound: the loss climbs far beyond it
    if key == "method.loss_bound":
        assert forget(free, f"runtime.reuse={trained}", *ascent, world=1).wait() == [0]
        losses = [row["values"]["loss"] for row in read_metrics(free) if row["phase"] == "unlearn" and row["step"]]
        assert min(losses) < -5.5


# -- copies that have to be alike ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["", "skip@point=momentum,rank=1,step=1"])
def test_momentum_encoder_and_queue_are_alike_on_all_ranks_or_nothing_is_saved(trained, tmp_path, zygote, fault):
    out = tmp_path / "run"
    settings = tiny.settings(*SMALL, "backend=ddp", f"data.shards={trained / 'shards'}", "pretrain.checkpoint_every=2")
    group = zygote.start(
        2, ["pretrain", "digits_moco", "--out", str(out), *settings], **({"DISTUNLEARN_FAULT": fault} if fault else {})
    )
    codes = group.wait()
    if not fault:
        assert codes == [0, 0], group.said()
        return
    assert codes == [5, 5], group.said()
    assert FIRED.format("skip", "momentum", 1, "pretrain", 1) in group.said(1)
    assert "the momentum encoder of rank 1 is not that of rank 0; nothing is saved" in group.said()
    assert not list((out / "original").glob("checkpoints/step-*"))


# -- a run directory of somebody else --------------------------------------------------------------------------------


class _Touch:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_checkpoint_files_that_were_replaced_by_pickles_are_refused_unread(copied, forget, tmp_path):
    group = forget(copied, world=1, DISTUNLEARN_FAULT="kill@point=saved,step=4")
    assert group.wait() == [-signal.SIGKILL] and FIRED.format("kill", "saved", 0, "unlearn", 4) in group.said()
    marker = tmp_path / "executed"
    replaced = [path for path in (copied / "checkpoints").rglob("*") if path.is_file() and path.suffix in (
        ".pt", ".pth", ".bin", ".safetensors", ".distcp", ".metadata")]  # fmt: skip
    assert replaced
    for path in replaced:
        path.write_bytes(pickle.dumps({"state": _Touch(marker)}))
    again = forget(copied, world=1)
    assert again.wait() == [3], again.said()
    assert not marker.exists() and "Traceback" not in again.said()
    pickle.loads(replaced[0].read_bytes())
    assert marker.exists()  # the payload fires where it is read carelessly


# -- the launcher ----------------------------------------------------------------------------------------------------


def test_ranks_whose_launcher_is_killed_stop_in_a_state_that_resumes(trained, tmp_path):
    out, text = tmp_path / "run", tmp_path / "launcher.log"
    with open(text, "w") as log:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
             "distunlearn", "unlearn", "digits", "--out", str(out), "--set", f"runtime.reuse={trained}",
             *tiny.settings(*SMALL, "backend=ddp", "unlearn.steps=20000", "unlearn.checkpoint_every=10000")],
            stdout=log, stderr=log, env=tiny.environment(GLOO_SOCKET_IFNAME="lo"), start_new_session=True,
        )  # fmt: skip
        ranks: list[int] = []
        try:
            deadline = time.monotonic() + 200
            while '"event":"step"' not in ledger_text(out) and time.monotonic() < deadline:
                assert launcher.poll() is None, text.read_text()[-3000:]
                time.sleep(0.1)
            ranks = [json.loads(path.read_text())["pid"] for path in (out / "watch").glob("rank-*.json")]
            assert len(ranks) == 2 and all(alive(pid) for pid in ranks)
            launcher.kill()
            launcher.wait()
            deadline = time.monotonic() + 100
            while any(alive(pid) for pid in ranks) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not any(alive(pid) for pid in ranks)
        finally:
            for pid in (launcher.pid, *ranks):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            launcher.wait()
    said = text.read_text()
    assert said.count("the launcher of this process is gone; it stops") == 2
    assert "unlearn was stopped by SIGTERM" in said and "its state is saved" in said
    assert list((out / "checkpoints").glob("step-*/COMMIT.json"))


def ledger_text(out: Path) -> str:
    path = out / "ledger.jsonl"
    text = path.read_text() if path.exists() else ""
    return text.partition('"phase":"unlearn"')[2]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


# -- secrets and other traces ----------------------------------------------------------------------------------------

SECRETS = {
    "WANDB_API_KEY": "wandb-5ecret-1111", "HF_TOKEN": "hf_5ecret2222", "AWS_SECRET_ACCESS_KEY": "aws5ecret3333",
    "AWS_SESSION_TOKEN": "aws5ecret4444", "HTTPS_PROXY": "http://me:5ecret5555@proxy.invalid:1",
    "HF_ENDPOINT": "https://me:5ecret6666@hub.invalid/",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole_run(zygote, tmp_path_factory):
    """A whole run under Python's audit hook, with secrets around: its folder, what it said, what it did."""
    folder = tmp_path_factory.mktemp("whole")
    out, log = folder / "run", folder / "audit.log"
    arguments = ["run", "digits", "--out", str(out), *tiny.settings(*SMALL)]
    group = zygote.start(1, arguments, 250, AUDIT_LOG=str(log), **SECRETS)
    assert group.wait()[0] in (0, 6, 7), group.said()
    doctor = zygote.start(1, ["doctor"], **SECRETS)
    assert doctor.wait() == [0]
    return out, group.said() + doctor.said(), log.read_text().splitlines()


def test_no_secret_of_the_environment_is_in_any_file_or_line(whole_run):
    out, said, _ = whole_run
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) > 20 and "HF_TOKEN" in said  # the variables were there, and were seen
    values = [value.encode() for value in (*SECRETS.values(), "5ecret5555", "5ecret6666")]
    for path in files:
        content = path.read_bytes()
        assert not [value for value in values if value in content], path
    assert not [value for value in values if value in said.encode()]


def test_a_run_starts_no_program_opens_no_connection_and_loads_no_foreign_pickle(whole_run):
    out, _, events = whole_run
    assert any(event.startswith("exec\t") for event in events)  # imports and dataclasses: the hook was at work
    outside = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect",
               "socket.getaddrinfo")  # fmt: skip
    assert not [event for event in events if event.split("\t")[0] in outside]
    assert not [event for event in events if event.startswith("pickle.find_class") and "torch" not in event]


def test_only_the_owner_may_read_ids_and_no_temporary_file_is_left(whole_run):
    out, _, _ = whole_run
    assert stat.S_IMODE((out / "ledger.jsonl").stat().st_mode) & 0o077 == 0
    left = [p for p in out.rglob("*") if re.search(r"(^\.)|tmp|partial", p.name) and p.name != ".gitignore"]
    assert not left
    assert not (out / "owner.json").exists() and not list((out / "watch").iterdir())
