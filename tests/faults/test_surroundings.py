"""What surrounds a process: the current folder, variables, signals, the launcher."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import tiny
from sizes import SMALL

from distunlearn.cli.doctor import doctor_text
from distunlearn.cli.main import main
from distunlearn.common.launcher import is_main
from distunlearn.engine import fault_injection
from distunlearn.engine.environment import FAMILIES, environment
from distunlearn.engine.preemption import StopRequest, stop_kept
from distunlearn.engine.run_lock import OWNER, Lease
from distunlearn.engine.watchdog import WATCH, Watch
from distunlearn.verify.ledger import read_ledger

# -- what runs -------------------------------------------------------------------------------------------------------


BY = {"python": [sys.executable, "-m", "distunlearn"],
      "torchrun": [shutil.which("torchrun", path=os.path.dirname(sys.executable)) or "torchrun", "--standalone",
                   "--nproc_per_node=1", "-m", "distunlearn"]}  # fmt: skip


@pytest.mark.parametrize(
    ("by", "name"),
    [("python", "timm.py"), ("python", "tyro.py"), ("python", "safetensors.py"), ("torchrun", "timm.py")],
)
def test_a_module_in_the_current_folder_is_not_run(tmp_path, by, name):
    (tmp_path / name).write_text("print('EXECUTED'); raise SystemExit(99)")
    done = subprocess.run(
        [*BY[by], "list", "methods"], cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env=tiny.environment(),
    )  # fmt: skip
    assert done.returncode == 0 and "third_party" in done.stdout and "EXECUTED" not in done.stdout + done.stderr
    control = subprocess.run(
        [sys.executable, "-m", name[:-3]], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert "EXECUTED" in control.stdout


@pytest.fixture(scope="module")
def pretrained(trained, tmp_path_factory, zygote):
    """variables -> (digest of the weights that a training by ddp under them makes, variables that env.json names)."""

    def train(**variables: str) -> tuple[str, dict[str, str]]:
        out = tmp_path_factory.mktemp("pretrained") / "run"
        shutil.copytree(trained, out)
        shutil.rmtree(out / "original")
        for name in ("run.yaml", "env.json"):
            (out / name).unlink()
        words = ["pretrain", "digits", "--out", str(out), *tiny.settings(*SMALL, "backend=ddp")]
        group = zygote.start(1, words, **variables)
        assert group.wait() == [0], group.said()
        state = json.loads((out / "original" / "done.json").read_text())["state"]
        return state, json.loads((out / "env.json").read_text())["variables"]

    return train, train()[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("ACCELERATE_DYNAMO_BACKEND", "NO"), ("ACCELERATE_DYNAMO_BACKEND", "EAGER"),
     ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"), ("ACCELERATE_MIXED_PRECISION", "bf16"),
     ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"), ("ACCELERATE_GRADIENT_CLIPPING", "0.01")],
)  # fmt: skip
def test_what_accelerate_is_asked_for_by_a_variable_is_not_heard(pretrained, name, value):
    """Of its configuration file: the weights are those of a run without it, and env.json names it."""
    train, plain = pretrained
    state, variables = train(**{name: value})
    assert state == plain and name in variables and (name == "ACCELERATE_GRADIENT_CLIPPING" or variables[name] == value)


def test_control_accelerate_itself_would_compile(monkeypatch):
    from accelerate.utils import TorchDynamoPlugin

    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    assert TorchDynamoPlugin().backend.value.upper() == "EAGER"


# What starts our processes, and the variables that it sets for them.
LAUNCHERS = {"accelerate": ("utils/launch.py",), "deepspeed": ("launcher/launch.py",),
             "torch": ("distributed/elastic/agent/server/local_elastic_agent.py", "distributed/run.py")}  # fmt: skip


@pytest.mark.parametrize("package", LAUNCHERS)
def test_every_variable_that_a_launcher_sets_is_named_in_the_record(package):
    """Read off the launchers' sources: assignments to an environment, and the tables that become one."""
    sets = re.compile(r"""(?:env\w*|environ)\[\s*["']([A-Z]\w+)["']\s*\]\s*=[^=]|["']([A-Z][A-Z0-9_]{3,})["']:\s""")
    root = os.path.dirname(importlib.util.find_spec(package).origin)
    found = set()
    for name in LAUNCHERS[package]:
        with open(os.path.join(root, name), encoding="utf-8") as file:
            found |= {part for parts in sets.findall(file.read()) for part in parts if part}
    assert len(found) > 3
    assert [name for name in sorted(found) if not FAMILIES.fullmatch(name)] == []


@pytest.mark.parametrize(
    "name",
    ["ATEN_CPU_CAPABILITY", "TORCHDYNAMO_DISABLE", "TIMM_FUSED_ATTN", "ROLE_RANK", "PARALLELISM_CONFIG_TP_SIZE",
     "OMPI_COMM_WORLD_RANK", "HIP_VISIBLE_DEVICES", "XLA_USE_BF16"],
)  # fmt: skip
def test_variables_that_change_numbers_are_named(monkeypatch, name):
    monkeypatch.setenv(name, "x1")
    assert name in environment()["variables"]


def test_the_variable_of_faults_alone_changes_no_weight_and_is_in_the_ledger(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fault_injection, "_allowed", False)
    states, named = [], []
    for asked in (None, "skip@point=update,phase=unlearn,times=1000000"):
        out = shutil.copytree(trained, tmp_path / str(asked is None))
        if asked:
            monkeypatch.setenv(fault_injection.VARIABLE, asked)
        fault_injection._faults.cache_clear()
        assert main(["unlearn", "digits", "--out", str(out), *tiny.settings(*SMALL)]) == 0
        states.append(json.loads((out / "done.json").read_text())["state"])
        starts = [line for line in read_ledger(out / "ledger.jsonl") if line["event"] == "start"]
        named.append(starts[-1].get("faults"))
    fault_injection._faults.cache_clear()
    assert states[0] == states[1] and named == [None, {"asked": asked, "active": False}]
    assert states[0] != json.loads((trained / "original" / "done.json").read_text())["state"]  # control: it forgot
    assert "fault injected" not in capsys.readouterr().err


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


EVIL = "evil\n\x1b[31mok: \u202edone"


@pytest.mark.parametrize("field", ["error", "verdict", "host", "place", "stack"])
def test_what_another_rank_wrote_of_itself_is_shown_on_one_line(tmp_path, monkeypatch, field):
    """Its report in watch/ may be anybody's."""
    watch = Watch(tmp_path, 0, 2, limit=1.0, slow_limit=1.0)
    (tmp_path / WATCH).mkdir()
    mine = {"rank": 0, "host": "a", "pid": os.getpid(), "count": 1, "phase": "unlearn", "step": 1, "place": "update",
            "age": 2.0, "sequence": 1, "waits": False, "stack": ["loop.py:1 step"]}  # fmt: skip
    other = mine | {"rank": 1, "count": 0, field: [EVIL] if field == "stack" else EVIL}
    for report in (mine, other):
        (tmp_path / WATCH / f"rank-000{report['rank']}.json").write_text(json.dumps(report))
    reports = watch._reports()
    assert len(reports) == 2
    if field == "host":
        monkeypatch.setattr(watch, "_silent", lambda reports: [1])
    said = watch._who_failed() if field in ("error", "verdict") else watch._verdict(reports)
    assert "evil\\n" in said and "\n" not in said and "\x1b" not in said and "\u202e" not in said, said


# -- signals and launchers -------------------------------------------------------------------------------------------


def test_a_stray_rank_silences_nothing(monkeypatch, capsys, run):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    assert main(["plan", "digits", "--set", "foo=1"]) == 2
    assert "foo" in capsys.readouterr().err
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0 and (run / "report.html").exists()


@pytest.mark.parametrize(
    ("rank", "world", "speaks"),
    [("1", None, True), ("1", "", True), ("5", "2", True), ("x", "2", True), ("-1", "2", True), ("1", "2", False)],
)
def test_only_a_rank_of_a_world_is_silent(monkeypatch, rank, world, speaks):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("WORLD_SIZE", raising=False) if world is None else monkeypatch.setenv("WORLD_SIZE", world)
    assert is_main() == speaks


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


@pytest.mark.parametrize("verdict", [6, 7])
@pytest.mark.parametrize(("left", "used", "ends"), [("2", "0", True), ("2", "1", True), ("2", "2", False),
                                                    ("0", "0", False), (None, None, False)])  # fmt: skip
def test_a_verdict_is_no_crash_to_torchrun(run, monkeypatch, capsys, verdict, left, used, ends):
    """With restarts left it would start an audit that has ended again."""
    from distunlearn.run import pipeline

    monkeypatch.setattr(pipeline, "audit", lambda run_dir: verdict)
    for name, value in (("TORCHELASTIC_MAX_RESTARTS", left), ("TORCHELASTIC_RESTART_COUNT", used)):
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    assert main(["audit", str(run)]) == (0 if ends else verdict)
    assert ("audit/summary.json" in capsys.readouterr().out) == ends


@pytest.mark.parametrize("value", ["", "2"])
def test_a_restart_count_that_is_empty_is_none(tmp_path, monkeypatch, value):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", value)
    lease = Lease(tmp_path)
    assert json.loads((tmp_path / OWNER).read_text())["restart"] == int(value or 0)
    lease.release()
