"""Batch scripts, run by bash with stand-ins for SLURM's commands; tests/slurm/test_cluster.py has the real ones."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from stubs import Stubs

from distunlearn.cli.main import main
from distunlearn.errors import ConfigError
from distunlearn.run.slurm import Job, _seconds, script, submit

ROOT = Path(__file__).parents[2]
WAITS = {"code": 75, "wait": True, "step": True}
HOSTILE = [
    "seed=1; touch pwned", "a=$(touch pwned)", "b=`touch pwned`", "c='\"' && touch pwned", "d=ä ü\\n $HOME *",
    "e=%j %A",
]  # fmt: skip


@pytest.fixture
def stubs(tmp_path):
    return Stubs(tmp_path / "stubs")


# -- what a script holds ---------------------------------------------------------------------------------------------


def test_hostile_values_reach_the_ranks_as_they_are(tmp_path, stubs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, config = tmp_path / "a 'run'; touch pwned $(touch pwned)", tmp_path / 'my "settings" `touch pwned`.yaml'
    text = script(Job(), "digits", out, config, HOSTILE, stubs.python)
    code, said = stubs.run(text, {"code": 0})
    assert code == 0, said
    overrides = [part for value in HOSTILE for part in ("--set", value)]
    assert stubs.rank()["arguments"] == ["run", "digits", "--config", str(config), *overrides, "--out", str(out)]
    assert not list(tmp_path.rglob("pwned"))
    # Control: the values are dangerous where they are not quoted.
    subprocess.run(["bash", "-c", f"echo {HOSTILE[1]}"], check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "pwned").exists()


def test_directives_are_numbers_and_plain_words(tmp_path):
    job = Job(
        nodes=2, tasks=4, gpus=4, cpus=3, memory="64G", time="1-02:03:04", partition="a,b", account="x_y",
        array="0-3%2",
        gpu_type="a100", qos="high", reservation="mine", exclude="n[1-3],n7", mail_type="END,FAIL",
        mail_user="me@x.org",
        sbatch=("licenses=x:1", "exclusive"),
    )  # fmt: skip
    lines = [line for line in script(job, None, tmp_path).splitlines() if line.startswith("#SBATCH")]
    assert set(lines) == {
        "#SBATCH --job-name=distunlearn", "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4", "#SBATCH --requeue",
        "#SBATCH --open-mode=append", "#SBATCH --signal=B:USR1@120", "#SBATCH --gpus-per-node=a100:4",
        "#SBATCH --cpus-per-task=3", "#SBATCH --mem=64G", "#SBATCH --time=1-02:03:04", "#SBATCH --partition=a,b",
        "#SBATCH --account=x_y", "#SBATCH --array=0-3%2", "#SBATCH --qos=high", "#SBATCH --reservation=mine",
        "#SBATCH --exclude=n[1-3],n7", "#SBATCH --mail-type=END,FAIL", "#SBATCH --mail-user=me@x.org",
        "#SBATCH --licenses=x:1", "#SBATCH --exclusive",
    }  # fmt: skip


@pytest.mark.parametrize("wrong", [
    {"nodes": 0}, {"tasks": 0}, {"gpus": -1}, {"warning": 0}, {"requeues": -1}, {"tasks": 2, "gpus": 4},
    {"partition": "a b"}, {"partition": "x\n#SBATCH --uid=0"}, {"account": "--wrap=id"}, {"name": "$(id)"},
    {"constraint": "a;b"}, {"memory": "1 G"}, {"time": "soon"}, {"time": "1:2:3"}, {"array": "a-b"},
    {"container": "x\ny"}, {"setup": "a\0b"}, {"setup": "nowhere.sh"}, {"warning": 600, "time": "1"},
    {"warning": 600, "time": "10"}, {"gpu_type": "a100"}, {"qos": "a b"}, {"sbatch": ("x=1\n#SBATCH --uid=0",)},
    {"sbatch": ("rm -rf",)}, {"sbatch": ("--wrap=id",)}, {"mail_user": "a;b"},
])  # fmt: skip
def test_what_no_job_can_be_is_refused_with_its_option(wrong, tmp_path):
    with pytest.raises(ConfigError) as caught:
        script(Job(**wrong), None, tmp_path)
    said = str(caught.value)
    names = ("control character", "--tasks", f"--{list(wrong)[-1].replace('_', '-')}")
    assert said.count("\n") == 0 and any(name in said for name in names)


def test_all_reasons_are_given_at_once(tmp_path):
    with pytest.raises(ConfigError, match="--nodes is 0.*--time is 'soon'.*control character"):
        script(Job(nodes=0, time="soon"), None, tmp_path / "a\nb")


def test_the_examples_are_what_submit_prints():
    spec = importlib.util.spec_from_file_location("make_examples", ROOT / "slurm" / "make_examples.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    made = maker.examples()
    assert made.keys() == {path.name for path in (ROOT / "slurm").glob("*.sbatch")}
    for name, text in made.items():
        assert (ROOT / "slurm" / name).read_text() == text, "run: python slurm/make_examples.py"
        subprocess.run(["bash", "-n", str(ROOT / "slurm" / name)], check=True)


# -- ranks -----------------------------------------------------------------------------------------------------------


def test_a_rank_finds_the_others(tmp_path, stubs):
    text = script(Job(tasks=2), None, tmp_path / "run", python=stubs.python)
    stubs.run(text, {"code": 0})
    expected = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    assert stubs.rank()["variables"] == {**expected, "MASTER_ADDR": "first-node", "MASTER_PORT": "24742"}
    stubs.run(text, {"code": 0}, DISTUNLEARN_MASTER_ADDR="10.0.0.1")
    assert stubs.rank()["variables"]["MASTER_ADDR"] == "10.0.0.1"
    (stubs.folder / "scontrol").write_text("#!/bin/bash\nexit 127\n")
    stubs.run(text, {"code": 0})
    assert stubs.rank()["variables"]["MASTER_ADDR"] == subprocess.check_output(["hostname"], text=True).strip()


def test_tasks_of_an_array_are_runs_of_their_own(tmp_path, stubs):
    for overrides, seeds in ([], ["--set", "seed=3"]), (["seed=7"], []):
        text = script(Job(array="0-3"), "digits", tmp_path / "runs", overrides=overrides, python=stubs.python)
        assert stubs.run(text, {"code": 0}, SLURM_ARRAY_JOB_ID="4700", SLURM_ARRAY_TASK_ID="3")[0] == 0
        mine = [part for value in overrides for part in ("--set", value)]
        assert stubs.rank()["arguments"] == ["run", "digits", *mine, "--out", str(tmp_path / "runs" / "3"), *seeds]


def test_setup_and_container(tmp_path, stubs):
    setup = tmp_path / "my setup.sh"
    setup.write_text("export RANK_DOES='{\"code\": 9}'\n")
    text = script(Job(setup=str(setup), container="my image.sqsh"), None, tmp_path / "run", python=stubs.python)
    assert "srun --wait=60 --container-image='my image.sqsh' bash" in text
    assert stubs.run(text, {"code": 0})[0] == 9


def test_a_setup_file_may_read_variables_that_are_not_set(tmp_path, stubs, monkeypatch):
    """As conda's activate scripts and ~/.bashrc do; the rest of the script still may not."""
    monkeypatch.delenv("PS1", raising=False)
    (tmp_path / "setup.sh").write_text('[ -z "$PS1" ] || echo interactive\nexport MINE=1 RANK_DOES=\'{"code": 9}\'\n')
    text = script(Job(setup=str(tmp_path / "setup.sh")), None, tmp_path / "run", python=stubs.python)
    code, said = stubs.run(text, {"code": 0})
    assert code == 9 and "unbound variable" not in said
    code, said = stubs.run(
        text.replace("# Every process finds", 'echo "$NOT_SET_AT_ALL"\n# Every process finds'), {"code": 0}
    )
    assert code != 9 and "unbound variable" in said  # control


def test_cpus_per_task_and_a_token_reach_the_tasks(tmp_path, stubs):
    text = script(Job(cpus=8), None, tmp_path / "run", python=stubs.python)
    tokens = set()
    for _ in range(2):
        assert stubs.run(text, {"code": 0}, SLURM_CPUS_PER_TASK="8")[0] == 0
        found = stubs.rank()["more"]
        assert found["SRUN_CPUS_PER_TASK"] == "8"
        tokens.add(found["DISTUNLEARN_LAUNCH_TOKEN"])
    assert len(tokens) == 2 and all(len(token) == 32 for token in tokens)
    assert stubs.run(text, {"code": 0}, SLURM_RESTART_COUNT="")[0] == 0
    assert stubs.rank()["more"]["SRUN_CPUS_PER_TASK"] is None


def test_a_container_brings_its_own_python(tmp_path):
    assert " python -m distunlearn" in script(Job(container="image.sqsh"), None, tmp_path)
    assert f" {sys.executable} -m distunlearn" in script(Job(), None, tmp_path)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("1440", 86_400), ("999", 59_940), ("10:30", 630), ("24:00:00", 86_400), ("1-0", 86_400), ("1-12:30", 131_400),
     ("2-01:02:03", 176_523), ("soon", None), ("1:2", None), ("-5", None)],
)  # fmt: skip
def test_a_time_is_read_as_sbatch_reads_it(time, seconds):
    assert _seconds(time) == seconds


# -- signals and requeueing ------------------------------------------------------------------------------------------


def test_a_warned_run_asks_for_itself_again(tmp_path, stubs):
    text = script(Job(), None, tmp_path / "run", python=stubs.python)
    code, said = stubs.run(text, WAITS, signal.SIGUSR1)
    assert code == 75 and stubs.requeued() == ["4711"], said
    assert stubs.rank()["got"] == ["USR1"] and stubs.rank()["stop_at_end"]  # for a rank that was still starting
    assert not (tmp_path / "run" / "stop").exists()
    assert "[1] job 4711 on n[1-2], 0 steps in the ledger" in said and "[1] ended with 75, 1 steps" in said
    _, said = stubs.run(text, WAITS, signal.SIGUSR1, SLURM_RESTART_COUNT="1")
    assert stubs.rank()["variables"]["MASTER_PORT"] == "24773"  # an orphan of the first attempt may hold its own
    assert "[2] job 4711 on n[1-2], 1 steps in the ledger" in said and stubs.requeued() == ["4711"] * 2
    stubs.run(text, WAITS, signal.SIGUSR1, SLURM_ARRAY_JOB_ID="4700", SLURM_ARRAY_TASK_ID="2")
    assert stubs.requeued()[-1] == "4700_2"


@pytest.mark.parametrize(("told", "sent", "extra", "says"), [
    ({**WAITS, "step": False}, signal.SIGUSR1, {}, "not requeued: this attempt made no step"),
    (WAITS, signal.SIGUSR1, {"SLURM_RESTART_COUNT": "2"}, "not requeued: 2 requeues are used up"),
    (WAITS, signal.SIGTERM, {}, "ended with 75"),  # scancel, or a requeue that SLURM does itself
    ({**WAITS, "code": 5}, signal.SIGUSR1, {}, "ended with 5"),
    ({"code": 2}, None, {}, "ended with 2"),
    ({"code": 75, "step": True}, None, {}, "ended with 75"),  # the file, or Ctrl-C: somebody wanted it to stop
    ({"code": 0}, None, {}, "ended with 0"),
])  # fmt: skip
def test_no_other_run_does(told, sent, extra, says, tmp_path, stubs):
    text = script(Job(requeues=2), None, tmp_path / "run", python=stubs.python)
    if sent == signal.SIGTERM:  # the ranks get it from SLURM
        told = {**told, "wait": False}
    code, said = stubs.run(text, told, None if sent == signal.SIGTERM else sent, **extra)
    assert code == told["code"] and says in said and not stubs.requeued()


def test_where_scontrol_fails_the_log_says_what_to_do(tmp_path, stubs):
    text = script(Job(), None, tmp_path / "run", python=stubs.python)
    code, said = stubs.run(text, WAITS, signal.SIGUSR1, SCONTROL_CODE="1")
    assert code == 75 and "scontrol cannot requeue job 4711; submit again to go on" in said


def test_a_stop_file_of_a_killed_attempt_stops_nobody(tmp_path, stubs):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    stubs.run(script(Job(), None, tmp_path / "run", python=stubs.python), {"code": 0})
    assert stubs.rank()["stop_at_start"] is False


# -- submitting ------------------------------------------------------------------------------------------------------


def test_submit_hands_over_the_script_and_remembers_the_job(tmp_path, stubs, monkeypatch):
    stubs.install(monkeypatch)
    out = tmp_path / "run of 100%"
    text = script(Job(nodes=2), "digits", out)
    assert submit(text, Job(nodes=2), out) == "4711"
    path = out / "slurm" / "job.sbatch"
    assert path.read_text() == text
    asked = (stubs.folder / "asked").read_text().splitlines()
    assert asked == ["--parsable", f"--output={tmp_path}/run of 100%%/slurm/%j.log", str(path)]
    job = json.loads((out / "slurm" / "jobs.jsonl").read_text())
    assert (job["job"], job["nodes"], job["tasks"]) == ("4711", 2, 1)
    submit(text, Job(logs=str(tmp_path / "logs %j")), out)  # a folder of one's own
    assert f"--output={tmp_path}/logs %%j/%j.log" in (stubs.folder / "asked").read_text().splitlines()


def test_a_refusal_of_sbatch_is_passed_on(tmp_path, stubs, monkeypatch, capsys):
    stubs.install(monkeypatch, SBATCH_SAYS="invalid partition specified: gpu")
    assert main(["submit", "digits", "--out", str(tmp_path / "run")]) == 2
    assert "sbatch refuses the job: invalid partition specified: gpu." in capsys.readouterr().err
    assert not (tmp_path / "run" / "slurm" / "jobs.jsonl").exists()


def test_without_sbatch_the_command_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", "digits", "--out", str(tmp_path / "run")]) == 2
    assert "sbatch is not found" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", [
    (["--set", "pretrain.lr=-1"], "pretrain.lr"),
    (["--set", "backend=ddp", "--nodes", "7"], "7"),  # the batches do not divide by the processes of the job
    (["--tasks", "2", "--gpus", "4"], "--tasks"),
    (["--set", "data.forget=nolist.txt"], "nolist.txt: there is no such file or folder"),
    (["--set", "data.source=imagefolder", "--set", "data.root=nowhere"], "nowhere: there is no such file or folder"),
    (["--setup", "does-not-exist.sh"], "--setup is does-not-exist.sh, which is no file"),
    (["--time", "1", "--warning", "600"], "--time is 1 (60 s) and --warning 600 s"),
])  # fmt: skip
def test_what_would_fail_on_the_nodes_is_refused_here(wrong, tmp_path, stubs, monkeypatch, capsys):
    stubs.install(monkeypatch)
    arguments, says = wrong
    assert main(["submit", "digits", "--out", str(tmp_path / "run"), *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not (stubs.folder / "asked").exists() and not (tmp_path / "run").exists()


def test_dry_run_prints_the_script_and_writes_nothing(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "run"), "--set", "seed=3", "--time", "1440", "--qos", "high", "--dry-run"]
    assert main(["submit", "digits", *arguments]) == 0
    said = capsys.readouterr().out
    assert said.startswith("#!/bin/bash\n") and "--set seed=3" in said
    assert "#SBATCH --time=1440\n" in said and "#SBATCH --qos=high\n" in said
    assert not list(tmp_path.iterdir())
