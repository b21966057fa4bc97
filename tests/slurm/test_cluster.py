"""Runs over two nodes of a real SLURM, interrupted in every way it has: each ends in the weights of a run left alone.

pytest -m slurm tests/slurm         needs slurmctld, slurmd and sbatch (Debian: slurm-wlm) and root
"""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from cluster import Cluster, has_step, log_of
from safetensors.torch import load_file

from distunlearn.run.slurm import Job, script
from distunlearn.verify.ledger import read_ledger

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
LONG = ("pretrain.epochs=8", "pretrain.checkpoint_every=1000", "unlearn.steps=60", "unlearn.checkpoint_every=1000")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    missing = [name for name in ("slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    assert not missing, f"{missing} not found; install slurm-wlm"
    made = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    made.start()
    yield made
    made.stop()


def left_alone(out: Path, settings: tuple[str, ...]) -> subprocess.Popen:
    """The same run on two processes by torchrun, never interrupted."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [*launcher, "-m", "distunlearn", "run", "digits", "--out", str(out), *tiny.settings("backend=ddp", *settings)],
        env=tiny.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    left_alone(out, LONG).wait(timeout=300)
    assert (out / "report.html").exists()
    return out


def check_weights(out: Path, alone: Path) -> None:
    """The weights of all encoders, bit for bit, and every image to forget consumed."""
    for folder in (".", "original", "retrained"):
        state, expected = (load_file(run / folder / "training_state.safetensors") for run in (out, alone))
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected), folder
    summary = json.loads((out / "audit" / "summary.json").read_text())
    assert summary["coverage"]["consumed_min"] >= 1 and summary["coverage"]["used_as_retain"] == 0
    assert (out / "report.html").exists() and not (out / "stop").exists()


def check(out: Path, alone: Path, attempts: int) -> None:
    """The same weights, and no attempt that was not meant."""
    check_weights(out, alone)
    starts = [line for line in read_ledger(out / "ledger.jsonl") if line["event"] == "start"]
    assert {line["world"] for line in starts} == {2}
    assert len(starts) - 3 == attempts - 1  # three phases, and one more start for each interrupted one


def started(cluster: Cluster, out: Path, *arguments: str, phase: str = "pretrain") -> str:
    """A job over two nodes in the midst of a phase."""
    job = cluster.submit(out, "--nodes", "2", *arguments, settings=LONG)
    cluster.wait(f"a step of {phase}", lambda: has_step(out, phase, 3), 200)
    return job


def completed(cluster: Cluster, out: Path, job: str, attempts: int) -> str:
    """Its log, when it has ended by itself."""
    cluster.wait_for_state(job, *ENDED, limit=300)
    log = log_of(out, job)
    assert all(line.startswith(("[", "slurmstepd")) for line in log.splitlines()), log
    assert f"[{attempts}] ended with" in log and f"[{attempts + 1}]" not in log and "not requeued" not in log
    assert int(cluster.job(job)["Restarts"]) == attempts - 1
    return log


def test_two_warnings_in_two_phases(cluster, alone, tmp_path):
    """The signal that SLURM sends before a time limit and at preemption: the job asks for itself again."""
    out = tmp_path / "run"
    job = started(cluster, out)
    for attempt, phase in enumerate(("pretrain", "unlearn"), start=1):
        cluster.wait(f"a step of {phase}", lambda phase=phase: has_step(out, phase, 3), 200)
        cluster.ask("scancel", "--signal=USR1", "--batch", job)
        cluster.wait(f"attempt {attempt} to end", lambda n=attempt: f"[{n}] ended with 75" in log_of(out, job))
        cluster.again(job)
    completed(cluster, out, job, attempts=3)
    check(out, alone, attempts=3)
    jobs = json.loads(tiny.command("status", str(out)).stdout)["jobs"]
    assert jobs == [job]


def test_time_limit(cluster, tmp_path):
    """A minute, of which SLURM warns some time before, for a run that needs longer: as many attempts as it takes.

    SLURM looks every half minute, and warns when the warning would come before it looks again: 20 to 50 seconds remain.
    """
    out, longer = tmp_path / "run", (*LONG, "unlearn.steps=400")
    with left_alone(tmp_path / "alone", longer) as expected:  # beside it: both get slower
        job = cluster.submit(out, "--nodes", "2", "--time", "1", "--warning", "10", settings=longer)
        attempts = 0
        while cluster.state(job) not in ENDED:
            attempts += 1
            cluster.wait(f"attempt {attempts}", lambda n=attempts: f"[{n}] job" in log_of(out, job))
            cluster.wait("an end or a requeue", lambda: cluster.state(job) in (*ENDED, "PENDING"), 200)
            if cluster.state(job) == "PENDING":
                cluster.again(job)
        assert attempts > 1, "the limit never came"  # the fault fired
        log = completed(cluster, out, job, attempts)
        # By the signal, or by the stop file that the job's script makes before it passes the signal on.
        stopped = log.count("stopped by SIGUSR1") + log.count("stopped by the file stop")
        assert stopped == attempts - 1 and "stopped by SIGUSR1" in log and "DUE TO TIME LIMIT" not in log
        expected.wait(timeout=200)
    check_weights(out, tmp_path / "alone")


def test_scontrol_requeue(cluster, alone, tmp_path):
    """SLURM ends the ranks by TERM and starts the job again by itself."""
    out = tmp_path / "run"
    job = started(cluster, out, phase="unlearn")
    cluster.ask("scontrol", "requeue", job)
    cluster.again(job)
    log = completed(cluster, out, job, attempts=2)
    assert "stopped by SIGTERM" in log
    check(out, alone, attempts=2)


def test_preemption(cluster, alone, tmp_path):
    """A job of a partition that comes first takes the nodes, and gives them back."""
    out = tmp_path / "run"
    job = started(cluster, out)
    first = ["sbatch", "--parsable", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2"]
    other = cluster.ask(*first)
    cluster.wait_for_state(other, "RUNNING", "COMPLETED")
    cluster.wait_for_state(other, "COMPLETED")
    cluster.again(job)
    log = completed(cluster, out, job, attempts=2)
    assert "[1] ended with 75" in log
    check(out, alone, attempts=2)


def test_signals_in_a_row_and_scancel(cluster, alone, tmp_path):
    """Whatever they hit, nothing is torn; a cancelled job is not requeued; a new one goes on."""
    out = tmp_path / "run"
    job = started(cluster, out)
    cluster.ask("scancel", "--signal=USR1", "--batch", job)
    for name in ("TERM", "KILL"):
        cluster.ask("scancel", f"--signal={name}", job)
    cluster.wait_for_state(job, *ENDED)
    assert cluster.job(job)["Restarts"] == "0"
    second = started(cluster, out, phase="unlearn")
    cluster.ask("scancel", second)
    cluster.wait_for_state(second, "CANCELLED")
    assert cluster.job(second)["Restarts"] == "0" and not (out / "report.html").exists()
    third = cluster.submit(out, "--nodes", "2", settings=LONG)
    completed(cluster, out, third, attempts=1)
    check_weights(out, alone)


def test_a_lost_node(cluster, alone, tmp_path):
    """The daemon of the first node dies and the node is given up: SLURM starts the job again by itself.

    tests/engine/test_lease.py has what a rank that lives on may no longer do.
    """
    out = tmp_path / "run"
    job = started(cluster, out, phase="unlearn")
    cluster.script("kill-node", "n1")
    cluster.ask("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=test")
    cluster.wait_for_state(job, "PENDING")
    assert not (out / "report.html").exists()  # the fault came in time
    cluster.ask("slurmd", "-N", "n1", "-f", str(cluster.folder / "slurm.conf"))
    cluster.again(job)
    cluster.wait_for_state(job, *ENDED, limit=300)
    assert cluster.job(job)["Restarts"] == "1"
    check(out, alone, attempts=2)


def test_what_fails_at_once_is_not_tried_again(cluster, tmp_path):
    out, empty = tmp_path / "run", tmp_path / "empty"  # a folder that is not there is refused by submit itself
    empty.mkdir()
    job = cluster.submit(out, "--nodes", "2", settings=("data.source=imagefolder", f"data.root={empty}"))
    cluster.wait_for_state(job, *ENDED)
    found = cluster.job(job)
    assert (found["JobState"], found["Restarts"], found["ExitCode"]) == ("FAILED", "0", "3:0"), log_of(out, job)
    assert "[1] ended with 3" in log_of(out, job) and "Traceback" not in log_of(out, job)


def test_tasks_of_an_array_are_requeued_each_by_itself(cluster, tmp_path):
    job = cluster.submit(tmp_path, "--array", "0-1", settings=("backend=single", "pretrain.epochs=8"))
    cluster.wait("a step of the second", lambda: has_step(tmp_path / "1", "pretrain", 3), 100)
    cluster.ask("scancel", "--signal=USR1", "--batch", f"{job}_1")
    cluster.wait("the first to end", lambda: cluster.state(f"{job}_0") in ENDED)
    cluster.again(f"{job}_1")
    cluster.wait_for_state(f"{job}_1", *ENDED)
    assert [cluster.job(f"{job}_{index}")["Restarts"] for index in (0, 1)] == ["0", "1"]
    for index in ("0", "1"):
        assert f"seed: {index}\n" in (tmp_path / index / "run.yaml").read_text()
        assert (tmp_path / index / "report.html").exists()


def test_scaling_over_the_nodes_of_an_allocation(cluster, tmp_path):
    """The template for scaling, with one task a node and no GPU: a figure on one node, then one on both."""
    root = Path(__file__).parents[2]
    template = runpy.run_path(str(root / "slurm" / "make_examples.py"))["scaling"]
    script, out = tmp_path / "scaling.sbatch", tmp_path / "out"
    script.write_text(template(nodes=2, tasks=1, gpus=0, python=sys.executable))
    asked = ("-p", "low", "--chdir", str(root), "--output", str(tmp_path / "scaling.log"), "--export", "ALL,STEPS=2")
    job = cluster.ask("sbatch", "--parsable", *asked, str(script), str(out), "vit_tiny16-64", "4", "ddp", "fp32")
    cluster.wait_for_state(job, *ENDED, limit=300)
    assert cluster.state(job) == "COMPLETED", (tmp_path / "scaling.log").read_text()
    for nodes, backend in ((1, "single"), (2, "ddp")):
        found = json.loads((out / f"nodes-{nodes}.json").read_text())
        assert (found["cell"]["backend"], found["cell"]["world"], found["images"]) == (backend, nodes, 4 * nodes)
        assert len(found["samples"]) == 2 and all(sample["seconds"] > 0 for sample in found["samples"])


def test_what_a_job_asks_for_reaches_slurm_and_its_tasks(cluster, tmp_path):
    """cpus per task in srun, a setup file like conda's, a reservation, a qos, a day in minutes, any other option."""
    python, setup, seen = tmp_path / "python", tmp_path / "setup.sh", tmp_path / "variables"
    python.write_text(f"#!/bin/bash\nenv > {seen}\n")
    python.chmod(0o755)
    setup.write_text('[ -z "$PS1" ] || echo interactive\nexport FROM_SETUP=1\n')
    cluster.ask("scontrol", "create", "reservation", "ReservationName=mine", "StartTime=now", "Duration=60",
                "Users=root", "Nodes=n1")  # fmt: skip
    job = Job(
        cpus=1, setup=str(setup), reservation="mine", qos="normal", time="50", exclude="n2", sbatch=("comment=x",)
    )
    path = tmp_path / "job.sbatch"
    path.write_text(script(job, None, tmp_path / "run", python=str(python)))
    number = cluster.ask("sbatch", "--parsable", f"--output={tmp_path / 'log'}", str(path))
    cluster.wait_for_state(number, *ENDED, limit=60)
    assert cluster.state(number) == "COMPLETED", (tmp_path / "log").read_text()
    told = cluster.job(number)
    cluster.ask("scontrol", "delete", "ReservationName=mine")
    wanted = {"CPUs/Task": "1", "Reservation": "mine", "TimeLimit": "00:50:00", "ExcNodeList": "n2", "Comment": "x"}
    assert {key: told[key] for key in wanted} == wanted
    found = dict(line.split("=", 1) for line in seen.read_text().splitlines() if "=" in line)
    assert found["SLURM_CPUS_PER_TASK"] == found["SRUN_CPUS_PER_TASK"] == "1" and found["FROM_SETUP"] == "1"
    assert len(found["DISTUNLEARN_LAUNCH_TOKEN"]) == 32
