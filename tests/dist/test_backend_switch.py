"""A checkpoint of sharded encoder and momentum encoder goes on: bit for bit as it was, under another backend, and by
another number of processes."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import torch
from processes import start_ranks
from safetensors.torch import load_file
from test_launchers import OF_RECIPE, SETTINGS, deviation, execute, logged
from whole_checkpoint import save_checkpoint

from distunlearn.engine.backends.tensor_shards import Stored
from distunlearn.engine.backends.tensor_shards import whole as whole_tensor
from distunlearn.engine.checkpoint import format
from distunlearn.engine.checkpoint.tensors import optimizer_state, read_state
from distunlearn.verify.ledger import read_ledger

pytestmark = pytest.mark.slow

CLOSE = 1e-4  # of the loss, over the whole curve
FEW = "pretrain.checkpoint_every=1000"
RECIPE = "digits_byol"
WRITER = ("backend=fsdp2", "checkpoint.sharded=always")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    execute(1, "prepare", RECIPE, out)
    execute(2, "pretrain", RECIPE, out, *WRITER, FEW)
    return out


@pytest.fixture(scope="module")
def stopped(whole, tmp_path_factory) -> Path:
    """Asked to stop in the middle of pretraining."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    settings = (*SETTINGS, *OF_RECIPE[RECIPE], *WRITER, f"data.shards={whole / 'shards'}", FEW)
    chosen = [part for value in settings for part in ("--set", value)]
    ranks = start_ranks(2, ["pretrain", RECIPE, "--out", str(out), *chosen])
    while not (out / "ledger.jsonl").exists() or '"step":6,' not in (out / "ledger.jsonl").read_text():
        assert ranks.alive(), ranks.said()
        time.sleep(0.005)
    (out / "stop").touch()
    assert ranks.wait() == [75, 75], ranks.said()
    step = format.latest_checkpoint(out / "original" / "checkpoints")[0].step
    assert 6 < step < 20 and not (out / "original" / "done.json").exists()
    return out


def go_on(stopped: Path, whole: Path, out: Path, backend: str) -> float:
    """The largest difference of the losses from those of the run that was left alone."""
    shutil.copytree(stopped, out)
    execute(
        1 if backend == "single" else 2,
        "pretrain",
        RECIPE,
        out,
        f"backend={backend}",
        f"data.shards={whole / 'shards'}",
        FEW,
    )
    starts = [line for line in read_ledger(out / "ledger.jsonl") if line["event"] == "start"]
    assert [line["world"] for line in starts] == [2, 1 if backend == "single" else 2] and starts[1]["step"] > 6
    return deviation(logged(out, "pretrain"), logged(whole, "pretrain"))


@pytest.mark.parametrize("backend", ["single", "fsdp2", "ddp"])
def test_it_loses_what_the_uninterrupted_run_loses(stopped, whole, tmp_path, backend):
    found = go_on(stopped, whole, tmp_path / "run", backend)
    print(f"{backend}: {found:.1e}")
    assert found <= CLOSE
    states = [load_file(run / "original" / "training_state.safetensors") for run in (tmp_path / "run", whole)]
    assert any(name.startswith("momentum.") for name in states[0])
    alike = all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert alike == (backend != "single")  # two processes by ddp, too; control: sums of one round otherwise


def test_control_without_its_moments_it_does_not(stopped, whole, tmp_path):
    """SGD that has lost its momentum takes smaller steps: the comparison sees an optimizer state that was lost."""
    changed = tmp_path / "changed"
    shutil.copytree(stopped, changed)
    folder = changed / "original" / "checkpoints"
    newest = format.latest_checkpoint(folder)[0]
    optimizer = optimizer_state(newest)
    for entries in optimizer["state"].values():
        for key, value in entries.items():
            if isinstance(value, Stored):
                entries[key] = torch.zeros_like(whole_tensor(value))
    tensors = {n: whole_tensor(t) for n, t in read_state(newest).items() if not n.startswith("optimizer.")}
    save_checkpoint(folder, newest.step, tensors, optimizer, newest.facts)
    assert go_on(changed, whole, tmp_path / "run", "single") > 10 * CLOSE
