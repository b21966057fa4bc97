"""SIGKILL at every point inside a save: what is found afterwards is whole, the last checkpoint or the new one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from distunlearn.engine.checkpoint import latest_checkpoint, save_checkpoint

KILLS = 100
# Forks a process for each kill: in it the N-th event of a save (before or after a call that writes, syncs, renames,
# makes or removes) is SIGKILL. With N = 0 it prints how many events there are.
CHILD = """
import json, os, signal, shutil, sys
import torch
from distunlearn.engine import checkpoint as c
count = last = 0
def event():
    global count
    count += 1
    if count == last:
        os.kill(os.getpid(), signal.SIGKILL)
def around(owner, name):
    right = getattr(owner, name)
    def wrapped(*args, **kwargs):
        event()
        result = right(*args, **kwargs)
        event()
        return result
    setattr(owner, name, wrapped)
for owner, name in ((c, "save_file"), (c, "sync_path"), (c, "file_sha256"), (torch, "save"), (os, "replace"),
                    (os, "unlink"), (os, "rmdir"), (os, "mkdir")):
    around(owner, name)
def save(folder, step):
    tensors = {"model.w": torch.full((1000,), float(step)), "momentum.w": torch.full((7,), -float(step))}
    c.save_checkpoint(c.Path(folder), step, tensors, {"lr": float(step)}, {"digest": "d"})
results = []
for folder, step, kill in json.loads(sys.stdin.read()):
    child = os.fork()
    if child == 0:
        count, last = 0, kill
        save(folder, step)
        os._exit(count if kill == 0 else 0)
    status = os.waitpid(child, 0)[1]
    results.append(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
print(json.dumps(results))
"""


def saves(jobs: list[tuple[str, int, int]]) -> list[int]:
    """(folder, step, event to be killed at or 0) -> exit codes."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(jobs), capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(folder, step: int) -> None:
    checkpoint, rejected = latest_checkpoint(folder)
    assert (checkpoint.step, rejected) == (step, [])
    tensors = checkpoint.tensors()
    assert torch.equal(tensors["model.w"], torch.full((1000,), float(step)))
    assert torch.equal(tensors["momentum.w"], torch.full((7,), -float(step)))
    assert checkpoint.optimizer() == {"lr": float(step)}


@pytest.mark.slow
def test_every_kill_leaves_a_whole_checkpoint_and_the_next_save_works(tmp_path):
    """With one checkpoint before, and with two, of which the third save removes one."""
    folders = {before: tmp_path / f"count-{before}" for before in (1, 2)}
    prepare = [(str(folder), step, 0) for before, folder in folders.items() for step in range(1, before + 1)]
    saves(prepare)
    events = {before: saves([(str(folder), before + 1, 0)])[0] for before, folder in folders.items()}
    assert 25 < events[1] < events[2] < 120

    jobs = []
    for number in range(KILLS):
        before = 1 + number % 2
        point = 1 + (number // 2) * (events[before] - 1) // (KILLS // 2 - 1)  # all points, evenly
        jobs.append((tmp_path / f"kill-{number}", before, point))
    saves([(str(folder), step, 0) for folder, before, _ in jobs for step in range(1, before + 1)])
    codes = saves([(str(folder), before + 1, point) for folder, before, point in jobs])
    assert codes == [-9] * KILLS  # every fault fired
    new = []
    for folder, before, _ in jobs:
        found = latest_checkpoint(folder)[0].step
        assert found in (before, before + 1)
        check(folder, found)
        new.append(found == before + 1)
    assert 5 < sum(new) < KILLS - 5 and not new[0] and new[-1]  # both sides of the commit were hit
    again = saves([(str(folder), before + 1, 0) for folder, before, _ in jobs])
    assert -9 not in again
    for folder, before, _ in jobs:
        check(folder, before + 1)
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["LATEST", f"step-{before:08d}", f"step-{before + 1:08d}"]  # nothing of the killed one is left
        assert (folder / "LATEST").read_text() == f"step-{before + 1:08d}\n"


def test_control_a_torn_file_under_the_final_name_is_rejected(tmp_path):
    """What the order of writing and renaming is for."""
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"model.w": torch.zeros(3)}, {}, {"digest": "d"})
    path = tmp_path / "step-00000002" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    checkpoint, rejected = latest_checkpoint(tmp_path)
    assert (checkpoint.step, rejected) == (1, ["step-00000002"])
