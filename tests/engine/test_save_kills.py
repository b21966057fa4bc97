"""SIGKILL at every point inside a save: what is found afterwards is whole, the last checkpoint or the new one.

As a run saves: in a thread beside training; and sharded, where the threads of two ranks write into one folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from whole_checkpoint import save_checkpoint

from distunlearn.engine.backends.tensor_shards import whole
from distunlearn.engine.checkpoint.format import latest_checkpoint
from distunlearn.engine.checkpoint.tensors import optimizer_state, read_state

KILLS = 100
# Forks a process for each kill: in it the N-th event of a save (before or after a call that writes, syncs, renames,
# makes or removes) is SIGKILL. With N = 0 it prints how many events there are.
CHILD = """
import dataclasses, json, os, signal, sys, threading
import torch
from pathlib import Path
from distunlearn.config.schema import CheckpointConfig, RunConfig
from distunlearn.common import files as f
from distunlearn.common import tensors as t
from distunlearn.engine.checkpoint import format as c
from distunlearn.engine.checkpoint import tensors as d
from distunlearn.engine.backends.base import Backend
from distunlearn.distributed.world import World
from distunlearn.engine.ledger import Ledger
from distunlearn.engine.checkpoint.async_save import Saver
from distunlearn.engine.preemption import StopRequest
count = last = 0
lock = threading.Lock()
def event():
    global count
    with lock:
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()
def around(owner, name):
    right = getattr(owner, name)
    def wrapped(*args, **kwargs):
        event()
        result = right(*args, **kwargs)
        event()
        return result
    setattr(owner, name, wrapped)
for owner, name in ((d, "save_file"), (t, "save_file"), (f, "sync_path"), (c, "sync_path"),
                    (d, "sync_path"), (d, "file_sha256"), (os, "replace"), (os, "fsync"), (os, "unlink"),
                    (os, "rmdir"), (os, "mkdir")):
    around(owner, name)
class Rank(World):
    def broadcast_object(self, value):
        return f"{os.getpid():x}"  # of the ranks, which are threads here, and of no other attempt
    def gather_objects(self, value):
        return [value]
def saver(folder, step, rank, world):
    backend = Backend(RunConfig(), Rank(rank, world, torch.device("cpu")))
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.full((1000,), float(step)))
    backend.model, backend.optimizer = model, torch.optim.SGD(model.parameters(), 0.0, momentum=0.9)
    backend.optimizer.state[model.w] = {"momentum_buffer": torch.full((1000,), step / 2)}
    ledger = Ledger(Path(folder).with_suffix(f".{rank}"))
    settings = CheckpointConfig(sharded="always")
    made = Saver(Path(folder), backend, settings, ledger, StopRequest(Path(folder)), print)
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if name.startswith("step-"):
            made.resumed(int(name[5:]))
    made.save(step, {"momentum.w": torch.full((7,), -float(step))}, {"digest": "d", "phase": "unlearn", "ranks": []})
    return made
def save(mode, folder, step):
    world = 2 if mode == "sharded" else 1
    savers = [saver(folder, step, rank, world) for rank in range(world)]  # all at work at once
    for made in savers:
        made.wait()
for line in sys.stdin:
    mode, jobs = json.loads(line)
    results = []
    for folder, step, kill in jobs:
        child = os.fork()
        if child == 0:
            count, last = 0, kill
            save(mode, folder, step)
            os._exit(count if kill == 0 else 0)
        status = os.waitpid(child, 0)[1]
        results.append(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
    print(json.dumps(results), flush=True)
"""
Saves = Callable[[str, list[tuple[str, int, int]]], list[int]]


@pytest.fixture(scope="module")
def saves() -> Iterator[Saves]:
    """mode, [(folder, step, event to be killed at or 0)] -> exit codes. One process forks them all."""
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(mode: str, jobs: list[tuple[str, int, int]]) -> list[int]:
        process.stdin.write(json.dumps([mode, jobs]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield run
    process.stdin.close()
    process.stdout.close()
    assert process.wait(timeout=60) == 0


def check(folder, step: int) -> None:
    checkpoint, rejected = latest_checkpoint(folder)
    assert (checkpoint.step, rejected) == (step, [])
    tensors = {n: whole(t) for n, t in read_state(checkpoint).items() if not n.startswith("optimizer.")}
    assert torch.equal(tensors["model.w"], torch.full((1000,), float(step)))
    assert torch.equal(tensors["momentum.w"], torch.full((7,), -float(step)))
    moments = optimizer_state(checkpoint)["state"]["w"]["momentum_buffer"]
    assert torch.equal(whole(moments), torch.full((1000,), step / 2))


@pytest.fixture
def where(tmp_path):
    """In memory if possible: a kill loses nothing that was written, synced or not, and thousands of syncs take time."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["thread", "sharded"])
def test_every_kill_leaves_a_whole_checkpoint_and_the_next_save_works(where, saves, mode):
    """With one checkpoint before, and with two, of which the third save removes one."""
    templates = {before: where / f"template-{before}" for before in (1, 2)}
    prepare = [(str(folder), step, 0) for before, folder in templates.items() for step in range(1, before + 1)]
    counted = []
    assert -9 not in saves(mode, prepare)
    for before, folder in templates.items():
        shutil.copytree(folder, where / f"count-{before}")
        counted.append((str(where / f"count-{before}"), before + 1, 0))
    events = dict(zip(templates, saves(mode, counted), strict=True))
    assert 25 < events[1] < events[2] < 200

    jobs = []
    for number in range(KILLS):
        before = 1 + number % 2
        point = 1 + (number // 2) * (events[before] - 1) // (KILLS // 2 - 1)  # all points, evenly
        jobs.append((where / f"kill-{number}", before, point))
        shutil.copytree(templates[before], where / f"kill-{number}")
    codes = saves(mode, [(str(folder), before + 1, point) for folder, before, point in jobs])
    assert codes == [-9] * KILLS  # every fault fired
    new = []
    for folder, before, _ in jobs:
        found = latest_checkpoint(folder)[0].step
        assert found in (before, before + 1)
        check(folder, found)
        new.append(found == before + 1)
    assert 5 < sum(new) < KILLS - 5 and not new[0] and new[-1]  # both sides of the commit were hit
    again = saves(mode, [(str(folder), before + 1, 0) for folder, before, _ in jobs])
    assert -9 not in again
    for folder, before, _ in jobs:
        check(folder, before + 1)
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["LATEST", f"step-{before:08d}", f"step-{before + 1:08d}"]  # nothing of the killed one is left
        assert (folder / "LATEST").read_text() == f"step-{before + 1:08d}\n"


def test_control_a_torn_file_under_the_final_name_is_rejected(tmp_path):
    """What the order of writing and renaming is for."""
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"model.w": torch.zeros(3)}, {"optimizer": "SGD", "state": {}}, {"digest": "d"})
    path = tmp_path / "step-00000002" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    checkpoint, rejected = latest_checkpoint(tmp_path)
    assert (checkpoint.step, rejected) == (1, ["step-00000002"])
