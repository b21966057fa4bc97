"""One owner of a run directory: a living one keeps it, a dead one and SLURM's next attempt do not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from whole_checkpoint import save_checkpoint

from distunlearn.engine import run_lock as module
from distunlearn.engine.checkpoint.format import latest_checkpoint
from distunlearn.engine.ledger import Ledger
from distunlearn.engine.run_lock import OWNER, STALE, Lease
from distunlearn.errors import ConfigError, DataError, RankLostError
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
    rewrite(tmp_path, host="elsewhere", place="elsewhere")
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


@pytest.mark.parametrize("count", [None, "", "2"])
def test_a_second_start_in_one_attempt_of_a_slurm_job_is_refused(tmp_path, monkeypatch, count):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    if count is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
    first = Lease(tmp_path)
    with pytest.raises(ConfigError, match=r"in use by process .*\(SLURM job 4711\)"):
        Lease(tmp_path)
    first.check()
    first.release()


def test_a_process_number_of_another_container_with_this_host_name_tells_nothing(tmp_path, monkeypatch):
    """It lives in the other one, and here it is nobody's or somebody else's: the renewals decide."""
    first = Lease(tmp_path)
    rewrite(tmp_path, pid=2**22 - 1, born=1)  # nobody's here
    with monkeypatch.context() as other:
        other.setattr(module, "_place", lambda: "boot pid:[2]")
        with pytest.raises(ConfigError, match="in use by process"):
            Lease(tmp_path)
    first.release()


def test_what_is_said_of_an_owner_is_one_line(tmp_path):
    first = Lease(tmp_path)
    rewrite(tmp_path, host="evil\n\x1b[31mok: done")
    with pytest.raises(ConfigError) as caught:
        Lease(tmp_path)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value) and "evil" in str(caught.value)
    first.release()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b'{"token": 1, "host": 2, "pid": "x", "place": null}'])
def test_a_claim_that_is_none_is_nobodys(tmp_path, content):
    (tmp_path / OWNER).write_bytes(content)
    lease = Lease(tmp_path)
    lease.check()
    lease.release()


def test_a_restarted_process_waits_until_an_owner_elsewhere_is_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RENEWED", 3600.0)  # nobody renews
    monkeypatch.setattr(module, "RESTARTED", 1.5)
    Lease(tmp_path)
    rewrite(tmp_path, host="elsewhere", place="elsewhere")
    with pytest.raises(ConfigError):  # control: a first start does not wait
        Lease(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    Lease(tmp_path).release()


def test_a_folder_that_is_gone_ends_its_owner_with_a_sentence(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lease = Lease(folder)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="is gone, it was moved or deleted while this run was at work"):
        lease.check()
    lease.release()
    assert not folder.exists()


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        fired.append(1)
        raise OSError(errno.ENOLCK, "No locks available")

    fired = []
    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with pytest.raises(DataError, match="cannot be claimed by a file owner.json \\(No locks available\\)"):
        Lease(tmp_path)
    assert fired


def test_an_orphan_can_neither_commit_nor_write_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    orphan = Lease(tmp_path)
    ledger = Ledger(tmp_path / "ledger.jsonl", may_write=orphan.check)
    ledger.start("pretrain", 0, attempt=1)
    save_checkpoint(tmp_path / "checkpoints", 1, {}, NO_MOMENTS, {}, orphan.check)
    heir = []

    def in_between():  # taken over while the orphan writes its files: the second question
        if len(asked) == 1:
            monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
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
    rewrite(tmp_path, host="elsewhere", place="elsewhere")
    old = time.time() - age
    os.utime(tmp_path / OWNER, (old, old))
    if lives:
        with pytest.raises(ConfigError, match="on elsewhere"):
            Lease(tmp_path)
        first.check()
    else:
        Lease(tmp_path).release()
