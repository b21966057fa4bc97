"""A checkpoint is whole or passed over."""

from __future__ import annotations

import json

import pytest
import torch

from distunlearn.engine.checkpoint import latest_checkpoint, save_checkpoint
from distunlearn.engine.optim import learning_rate, make_optimizer
from distunlearn.errors import DataError


def save(folder, step, value):
    return save_checkpoint(folder, step, {"model.w": torch.full((3,), value)}, {"lr": value}, {"digest": "d"})


def test_round_trip_and_retention(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, float(step))
    checkpoint, rejected = latest_checkpoint(tmp_path)
    assert (checkpoint.step, rejected, checkpoint.facts["digest"]) == (30, [], "d")
    assert torch.equal(checkpoint.tensors()["model.w"], torch.full((3,), 30.0))
    assert checkpoint.optimizer() == {"lr": 30.0}
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000020", "step-00000030"]
    assert (tmp_path / "LATEST").read_text() == "step-00000030\n"


@pytest.mark.parametrize("damage", ["flip", "missing", "commit", "no_commit"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    save(tmp_path, 10, 10.0)
    newest = save(tmp_path, 20, 20.0)
    assert latest_checkpoint(tmp_path)[0].step == 20  # sound before the damage
    path = newest / "state.safetensors"
    if damage == "flip":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    elif damage == "missing":
        path.unlink()
    elif damage == "commit":
        commit = json.loads((newest / "COMMIT.json").read_text())
        commit["files"] = {}
        (newest / "COMMIT.json").write_text(json.dumps(commit))
    else:
        (newest / "COMMIT.json").unlink()
    checkpoint, rejected = latest_checkpoint(tmp_path)
    assert (checkpoint.step, rejected) == (10, ["step-00000020"])


def test_no_sound_checkpoint_is_an_error_and_none_at_all_is_a_start(tmp_path):
    assert latest_checkpoint(tmp_path / "absent") == (None, [])
    (save(tmp_path, 10, 1.0) / "COMMIT.json").unlink()
    with pytest.raises(DataError, match="step-00000010"):
        latest_checkpoint(tmp_path)


def test_a_temporary_folder_left_by_a_kill_is_ignored(tmp_path):
    save(tmp_path, 10, 1.0)
    (tmp_path / ".step-00000020.tmp").mkdir()
    assert latest_checkpoint(tmp_path)[0].step == 10
    save(tmp_path, 20, 2.0)
    assert latest_checkpoint(tmp_path)[0].step == 20


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[-1] < 0.001
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_weight_decay_spares_vectors():
    layer = torch.nn.Linear(3, 2)
    groups = make_optimizer("adamw", layer.parameters(), 0.1, 0.5).param_groups
    assert [(g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in groups] == [
        (0.5, [(2, 3)]),
        (0.0, [(2,)]),
    ]
