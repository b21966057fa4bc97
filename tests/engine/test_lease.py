"""One owner of a run directory: a living one keeps it, a dead one and SLURM's next attempt do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from whole_checkpoint import save_checkpoint

from distunlearn.engine import run_lock as module
from distunlearn.engine.checkpoint.format import latest_checkpoint
from distunlearn.engine.ledger import Ledger
from distunlearn.engine.run_lock import OWNER, STALE, Lease
from distunlearn.errors import ConfigError, RankLostError
from distunlearn.verify.ledger import read_ledger

NO_MOMENTS = {"optimizer": "SGD", "state": {}}
CHILD = """
import sys
from distunlearn.engine.run_lock import Lease
Lease(sys.argv[1])
print("claimed", flush=True)
input()
"""


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def rewrite(folder, **changes):
    owner = json.loads((folder / OWNER).read_text())
    (folder / OWNER).write_text(json.dumps({**owner, **changes}))


def test_claimed_checked_and_given_back(tmp_path):
    lease = Lease(tmp_path)
    lease.check()
    assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on .*; wait for it"):
        Lease(tmp_path)
    lease.check()  # a refused attempt changes nothing
    lease.release()
    assert not list(tmp_path.iterdir())
    Lease(tmp_path).release()


def test_a_dead_owner_and_a_number_used_again_are_no_owners(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "claimed\n"
    with pytest.raises(ConfigError, match=f"process {process.pid} "):
        Lease(tmp_path)
    process.kill()
    process.communicate()
    Lease(tmp_path)
    rewrite(tmp_path, pid=os.getppid(), born=1)  # alive, but not the process that claimed
    Lease(tmp_path).release()


def test_an_owner_on_another_machine_lives_while_it_renews(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RENEWED", 0.05)
    first = Lease(tmp_path)
    rewrite(tmp_path, host="elsewhere")
    old = time.time() - STALE - 30
    os.utime(tmp_path / OWNER, (old, old))
    deadline = time.monotonic() + 10
    while (tmp_path / OWNER).stat().st_mtime < old + STALE:  # renewed by its thread
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(ConfigError, match="on elsewhere"):
        Lease(tmp_path)
    first._ended.set()
    time.sleep(0.2)
    os.utime(tmp_path / OWNER, (old, old))
    second = Lease(tmp_path)
    with pytest.raises(RankLostError, match="taken over by process"):
        first.check()
    first.release()  # what is another's stays
    second.check()
    assert sorted(p.name for p in tmp_path.iterdir()) == [OWNER]
    second.release()


def test_the_next_attempt_of_a_slurm_job_takes_over_from_one_that_lives(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    orphan = Lease(tmp_path)
    with monkeypatch.context() as other:
        other.setenv("SLURM_JOB_ID", "4712")
        with pytest.raises(ConfigError, match=r"\(SLURM job 4711\)"):
            Lease(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    heir = Lease(tmp_path)
    with pytest.raises(RankLostError, match="writes no more"):
        orphan.check()
    heir.check()
    heir.release()


def test_an_orphan_can_neither_commit_nor_write_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    orphan = Lease(tmp_path)
    ledger = Ledger(tmp_path / "ledger.jsonl", may_write=orphan.check)
    ledger.start("pretrain", 0, attempt=1)
    save_checkpoint(tmp_path / "checkpoints", 1, {}, NO_MOMENTS, {}, orphan.check)
    heir = []

    def in_between():  # taken over while the orphan writes its files: the second question
        if len(asked) == 1:
            heir.append(Lease(tmp_path))
        asked.append(True)
        orphan.check()

    asked = []
    with pytest.raises(RankLostError):
        save_checkpoint(tmp_path / "checkpoints", 2, {}, NO_MOMENTS, {}, in_between)
    assert len(asked) == 2
    checkpoint, rejected = latest_checkpoint(tmp_path / "checkpoints")
    assert (checkpoint.step, rejected) == (1, [])
    with pytest.raises(RankLostError):
        ledger.step("pretrain", 1, {"members": ["a"]}, frozenset())
    ledger.close()
    assert [line["event"] for line in read_ledger(tmp_path / "ledger.jsonl")] == ["start"]
    save_checkpoint(tmp_path / "checkpoints", 2, {}, NO_MOMENTS, {}, heir[0].check)  # control: its owner can
    assert latest_checkpoint(tmp_path / "checkpoints")[0].step == 2
    heir[0].release()


def test_a_deleted_claim_ends_its_owner(tmp_path):
    lease = Lease(tmp_path)
    (tmp_path / OWNER).unlink()
    with pytest.raises(RankLostError, match="deleted owner.json"):
        lease.check()
    lease.release()


@pytest.mark.parametrize(("age", "lives"), [(20, True), (60, True), (STALE + 5, False)])
def test_an_owner_on_another_machine_may_miss_a_few_renewals(tmp_path, monkeypatch, age, lives):
    monkeypatch.setattr(module, "RENEWED", 3600.0)  # nobody renews
    first = Lease(tmp_path)
    rewrite(tmp_path, host="elsewhere")
    old = time.time() - age
    os.utime(tmp_path / OWNER, (old, old))
    if lives:
        with pytest.raises(ConfigError, match="on elsewhere"):
            Lease(tmp_path)
        first.check()
    else:
        Lease(tmp_path).release()
