"""What surrounds a process: the current folder, variables, signals, the launcher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import tiny
from sizes import SMALL

from distunlearn.cli.doctor import doctor_text
from distunlearn.cli.main import main
from distunlearn.engine.environment import environment
from distunlearn.engine.preemption import StopRequest, stop_kept
from distunlearn.engine.run_lock import OWNER, Lease

# -- what runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm.py", "tyro.py", "safetensors.py"])
def test_a_module_in_the_current_folder_is_not_run(tmp_path, name):
    (tmp_path / name).write_text("print('EXECUTED'); raise SystemExit(99)")
    done = subprocess.run(
        [sys.executable, "-m", "distunlearn", "list", "methods"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "third_party" in done.stdout and "EXECUTED" not in done.stdout + done.stderr
    control = subprocess.run(
        [sys.executable, "-m", name[:-3]], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert "EXECUTED" in control.stdout


@pytest.mark.parametrize("backend", ["EAGER", "INDUCTOR"])
def test_accelerates_wish_to_compile_is_not_heard(trained, tmp_path, zygote, backend):
    """Of its configuration file, by a variable: the weights are those of a run without it, and env.json names it."""
    digests = []
    for variables in ({}, {"ACCELERATE_DYNAMO_BACKEND": backend}):
        out = tmp_path / str(len(variables))
        shutil.copytree(trained, out)
        shutil.rmtree(out / "original")
        (out / "run.yaml").unlink()
        (out / "env.json").unlink()
        group = zygote.start(
            1, ["pretrain", "digits", "--out", str(out), *tiny.settings(*SMALL, "backend=ddp")], **variables
        )
        assert group.wait() == [0], group.said()
        digests.append(json.loads((out / "original" / "done.json").read_text())["state"])
    assert digests[0] == digests[1]
    assert json.loads((out / "env.json").read_text())["variables"]["ACCELERATE_DYNAMO_BACKEND"] == backend


# -- what is shown ---------------------------------------------------------------------------------------------------

SECRETS = {
    "HF_BEARER": "hf_AAAASECRET", "HF_HUB_READ": "hf_BBBSECRET", "SLURM_JOB_COMMENT": "pw=CSECRET",
    "WDS_STORE": 'pipe:curl -H "Authorization: Bearer DSECRET" https://x', "LC_APP": "ESECRET",
    "TORCH_URL2": "user:FSECRET@h",
    # Not among the scripts: names that are shown, with values that look like secrets.
    "TORCH_HOME": "https://me:GSECRET@store/x", "MASTER_ADDR": "ghp_HSECRET0123456789abcdef", "LANG": "token=ISECRET",
    "NCCL_DEBUG": "Bearer JSECRET", "CUDA_HOME": "-----BEGIN KEY----- KSECRET", "TMPDIR": "AKIALSECRET000000000",
    "WANDB_MODE": "MSECRET0123456789abcdefghij", "DISTUNLEARN_PASSPHRASE": "NSECRET",
    "DISTUNLEARN_LAUNCH_TOKEN": "OSECRET", "NO_PROXY": "u:PSECRET@h", "HTTPS_PROXY": "QSECRET:x@proxy:3128",
}  # fmt: skip


def test_no_variable_shows_a_secret_whatever_its_name(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    shown = environment()["variables"]
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    variables = environment()["variables"]
    text = json.dumps(variables) + doctor_text()
    assert "SECRET" not in text.replace("SECRETS", "") and set(SECRETS) <= set(variables)  # named, not shown
    assert variables["NCCL_SOCKET_IFNAME"] == "ib0" == shown["NCCL_SOCKET_IFNAME"]  # control


def test_what_a_variable_says_is_one_line(monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO\n- warnings:\n  none\x1b[31m\u202e")
    text = doctor_text()
    assert "\x1b" not in text and "\u202e" not in text and "\n  none\x1b" not in text and "INFO\\n- warnings" in text


# -- signals and launchers -------------------------------------------------------------------------------------------


def test_a_stray_rank_silences_nothing(monkeypatch, capsys, run):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    assert main(["plan", "digits", "--set", "foo=1"]) == 2
    assert "foo" in capsys.readouterr().err
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0 and (run / "report.html").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_between_two_verbs_is_heard_by_the_next(tmp_path, number):
    before = signal.getsignal(number)
    with stop_kept():
        with StopRequest(tmp_path) as first:
            pass
        os.kill(os.getpid(), number)  # between
        assert first.reason is None
        with StopRequest(tmp_path) as second:
            assert second.reason == number.name
    assert signal.getsignal(number) == before
    with stop_kept():
        with StopRequest(tmp_path) as first:
            os.kill(os.getpid(), number)  # after the last step of the first
        assert first.reason == number.name
        with StopRequest(tmp_path) as second:
            assert second.reason == number.name
    with StopRequest(tmp_path) as alone:
        assert alone.reason is None


def test_nohup_is_respected(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_kept(), StopRequest(tmp_path) as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked.reason is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("left", "code"), [("2", 0), ("0", 6), (None, 6)])
def test_a_verdict_is_no_crash_to_torchrun(run, monkeypatch, capsys, left, code):
    """With restarts left it would start an audit that has ended again."""
    from distunlearn.run import pipeline

    monkeypatch.setattr(pipeline, "audit", lambda run_dir: 6)
    for name, value in (("TORCHELASTIC_MAX_RESTARTS", left), ("TORCHELASTIC_RESTART_COUNT", "0")):
        monkeypatch.setenv(name, value) if left is not None else monkeypatch.delenv(name, raising=False)
    assert main(["audit", str(run)]) == code
    assert ("audit/summary.json" in capsys.readouterr().out) == (left == "2")


@pytest.mark.parametrize("value", ["", "2"])
def test_a_restart_count_that_is_empty_is_none(tmp_path, monkeypatch, value):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", value)
    lease = Lease(tmp_path)
    assert json.loads((tmp_path / OWNER).read_text())["restart"] == int(value or 0)
    lease.release()
