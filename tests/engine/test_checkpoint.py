"""A checkpoint is whole or passed over."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from whole_checkpoint import save_checkpoint

from distunlearn.config.schema import OptimizerConfig
from distunlearn.engine.backends.tensor_shards import Piece, StoredTensor, part, whole
from distunlearn.engine.checkpoint import format as module
from distunlearn.engine.checkpoint import tensors as tensors_module
from distunlearn.engine.checkpoint.format import FORMAT, begin, commit, latest_checkpoint
from distunlearn.engine.checkpoint.tensors import OPTIMIZER, optimizer_state, read_state, write_pieces
from distunlearn.engine.optimizer import make_optimizer
from distunlearn.errors import DataError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from start_and_restore import by_elements, by_rows, opens  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint_format_3"


def moments(value):
    return {"optimizer": "AdamW", "state": {"w": {"step": torch.tensor(value), "exp_avg": torch.full((3,), value)}}}


def save(folder, step, value):
    return save_checkpoint(folder, step, {"model.w": torch.full((3,), value)}, moments(value), {"digest": "d"})


def rewrite(path, **changes):
    """An edit that knows the format: the digest is that of the changed content."""
    content = json.loads(path.read_text()) | changes
    content.pop("commit", None)
    path.write_text(json.dumps(content | {"commit": module._digest(content)}))


def test_round_trip_and_retention(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, float(step))
    checkpoint, rejected = latest_checkpoint(tmp_path)
    assert (checkpoint.step, rejected, checkpoint.facts["digest"]) == (30, [], "d")
    assert torch.equal(whole(read_state(checkpoint)["model.w"]), torch.full((3,), 30.0))
    found = optimizer_state(checkpoint)
    assert found["optimizer"] == "AdamW" and found["state"].keys() == {"w"}
    assert found["state"]["w"]["step"] == 30 and torch.equal(found["state"]["w"]["exp_avg"], torch.full((3,), 30.0))
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000020", "step-00000030"]
    assert (tmp_path / "LATEST").read_text() == "step-00000030\n"


DAMAGES = ("flip", "flip_optimizer", "missing", "emptied", "no_commit", "not_json", "edited", "other_step", "escape")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    save(tmp_path, 10, 10.0)
    newest = save(tmp_path, 20, 20.0)
    assert latest_checkpoint(tmp_path)[0].step == 20  # sound before the damage
    path = newest / ("optimizer.safetensors" if damage == "flip_optimizer" else "state.safetensors")
    manifest = newest / "COMMIT.json"
    if damage.startswith("flip"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    elif damage == "missing":
        path.unlink()
    elif damage == "emptied":
        rewrite(manifest, files={})
    elif damage == "no_commit":
        manifest.unlink()
    elif damage == "not_json":
        manifest.write_bytes(manifest.read_bytes()[:-9])
    elif damage == "edited":  # a value that no file's digest covers
        manifest.write_text(manifest.read_text().replace('"digest": "d"', '"digest": "e"'))
    elif damage == "other_step":  # the very files of another step
        rewrite(manifest, step=10)
    else:
        outside = tmp_path / "outside.safetensors"
        shutil.move(path, outside)
        files = json.loads(manifest.read_text())["files"]
        files["../outside.safetensors"] = files.pop("state.safetensors")
        rewrite(manifest, files=files)
    checkpoint, rejected = latest_checkpoint(tmp_path)
    assert (checkpoint.step, rejected) == (10, ["step-00000020"])


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"step-00000099\n", b"../../elsewhere\n", None])
def test_nothing_is_read_where_latest_points(tmp_path, content):
    """LATEST is for people; what it says decides nothing, so that it can neither mislead nor lead outside."""
    save(tmp_path / "own", 10, 10.0)
    if content is None:
        (tmp_path / "own" / "LATEST").unlink()
    else:
        (tmp_path / "own" / "LATEST").write_bytes(content)
    assert latest_checkpoint(tmp_path / "own")[0].step == 10
    save(tmp_path / "other", 20, 20.0)
    (tmp_path / "own" / "step-00000020").symlink_to(tmp_path / "other" / "step-00000020")
    checkpoint, rejected = latest_checkpoint(tmp_path / "own")  # nor does a link lead outside
    assert (checkpoint.step, rejected) == (10, ["step-00000020"])


def test_no_sound_checkpoint_is_an_error_and_none_at_all_is_a_start(tmp_path):
    assert latest_checkpoint(tmp_path / "absent") == (None, [])
    (save(tmp_path, 10, 1.0) / "COMMIT.json").unlink()
    with pytest.raises(DataError, match="step-00000010"):
        latest_checkpoint(tmp_path)


def test_a_temporary_folder_left_by_a_kill_is_ignored_and_removed(tmp_path):
    save(tmp_path, 10, 1.0)
    left = [tmp_path / ".step-00000020.0.tmp", tmp_path / ".step-00000020.18a1.tmp", tmp_path / ".step-00000015.tmp"]
    for folder in left:
        folder.mkdir()
        (folder / "state.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path)[0].step == 10
    save(tmp_path, 20, 2.0)
    assert latest_checkpoint(tmp_path)[0].step == 20
    assert not any(folder.exists() for folder in left)


def test_the_choice_is_by_step_whatever_the_clock_said(tmp_path):
    for step, age in ((10, 0), (20, 10**6), (30, -(10**6))):  # the newest from the future, the one before it the oldest
        when = time.time() - age
        for path in [*save(tmp_path, step, float(step)).iterdir(), tmp_path / f"step-{step:08d}"]:
            os.utime(path, (when, when))
    assert latest_checkpoint(tmp_path)[0].step == 30
    save(tmp_path, 40, 40.0)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000030", "step-00000040"]  # retention likewise


def test_a_damaged_one_of_a_later_step_costs_no_sound_one_and_is_made_anew(tmp_path):
    for step in (10, 20):
        save(tmp_path, step, float(step))
    (tmp_path / "step-00000020" / "state.safetensors").write_bytes(b"damaged")
    assert latest_checkpoint(tmp_path)[0].step == 10
    for step, names in ((15, [10, 15, 20]), (20, [15, 20])):
        temporary = begin(tmp_path, step)
        files = write_pieces(temporary, [Piece("model.w", torch.full((3,), float(step)), (3,))], 0, 1, sharded=False)
        commit(temporary, step, files, {"optimizer": "SGD"}, sound={10, 15})
        assert latest_checkpoint(tmp_path)[0].step == step
        assert sorted(p.name for p in tmp_path.glob("step-*")) == [f"step-{number:08d}" for number in names]
    assert not list(tmp_path.glob(".step-*"))


# -- formats ---------------------------------------------------------------------------------------------------------


def golden():
    """What the committed checkpoints hold: 2 steps of AdamW on a layer, in numbers that floats hold exactly."""
    weights = {"weight": torch.arange(6.0).view(2, 3) / 8, "bias": torch.tensor([0.5, -0.25])}
    tensors = {f"model.{name}": value for name, value in weights.items()}
    for name, value in weights.items():
        entries = {"step": torch.tensor(2.0), "exp_avg": value / 4, "exp_avg_sq": value.square()}
        tensors |= {f"optimizer.{name}/{key}": entry for key, entry in entries.items()}
    return tensors


@pytest.mark.parametrize("layout", ["whole", "sharded"])
def test_the_committed_checkpoint_is_read(layout):
    """Written once, by format 3: a change that can no longer read it needs another number."""
    checkpoint, rejected = latest_checkpoint(GOLDEN / layout)
    assert (checkpoint.step, rejected, checkpoint.facts["world"], checkpoint.facts["format"]) == (2, [], 2, FORMAT)
    assert len(checkpoint.facts["files"]) == (2 if layout == "whole" else 4)
    state, expected = read_state(checkpoint), golden()
    assert state.keys() == expected.keys()
    assert all(torch.equal(whole(state[name]), value) for name, value in expected.items())
    found = optimizer_state(checkpoint)
    assert found["optimizer"] == "AdamW" and found["state"].keys() == {"weight", "bias"}
    layer = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(OptimizerConfig(lr=0.1, weight_decay=0.5), layer)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    for name, value in layer.named_parameters():  # the keys of torch's own AdamW
        assert found["state"][name].keys() == optimizer.state[value].keys()


@pytest.mark.parametrize("number", [FORMAT - 1, FORMAT + 1])
def test_another_format_is_refused_by_its_number_and_not_passed_over(tmp_path, number):
    save(tmp_path, 10, 1.0)
    rewrite(save(tmp_path, 20, 2.0) / "COMMIT.json", format=number)
    with pytest.raises(DataError, match=f"has format {number}, but this version reads format {FORMAT}"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("exposure", ["mode", "owner"])
def test_a_folder_that_others_may_write_into_is_named(tmp_path, exposure):
    folder = save(tmp_path, 10, 1.0)
    folder.chmod(0o755)
    assert module.exposed(folder) is None
    if exposure == "mode":
        folder.chmod(0o777)
    elif os.geteuid() == 0:
        os.chown(folder, 12345, -1)
    else:
        pytest.skip("only root can give a folder away")
    reason = "every user of this machine" if exposure == "mode" else "belongs to user 12345"
    assert str(folder) in module.exposed(folder) and reason in module.exposed(folder)


# -- pieces ----------------------------------------------------------------------------------------------------------


def sharded(folder: Path, step: int, tensors: dict[str, torch.Tensor], world: int) -> Path:
    """As `world` ranks write it, each a share of the flattened tensors that is not the even one."""
    temporary, files = begin(folder, step), {}
    for rank in range(world):
        pieces = []
        for name, value in tensors.items():
            edges = [round(value.numel() * (r / world) ** 1.5) for r in (rank, rank + 1)]
            pieces.append(Piece(name, value.flatten()[edges[0] : edges[1]].clone(), tuple(value.shape), edges[0]))
        files |= write_pieces(temporary, pieces, rank, world, sharded=True)
    return commit(temporary, step, files, {"optimizer": "AdamW"})[0]


def test_pieces_of_any_number_of_ranks_are_read_whole_and_in_parts(tmp_path):
    tensors = {"model.w": torch.randn(7, 5), "model.one": torch.randn(1), "optimizer.w/exp_avg": torch.randn(7, 5)}
    for world in (1, 2, 3, 8):
        sharded(tmp_path, world, tensors, world)
        checkpoint, _ = latest_checkpoint(tmp_path)
        assert checkpoint.step == world and len(checkpoint.facts["files"]) == world
        state = read_state(checkpoint)
        assert state.keys() == tensors.keys()
        for name, value in tensors.items():
            assert state[name].shape == tuple(value.shape) and torch.equal(whole(state[name]), value)
            flat = value.flatten()
            for start in range(value.numel() + 1):
                for count in range(value.numel() + 1 - start):
                    assert torch.equal(part(state[name], start, count), flat[start : start + count])
        assert torch.equal(whole(optimizer_state(checkpoint)["state"]["w"]["exp_avg"]), tensors["optimizer.w/exp_avg"])


SHAPES = ((48, 48), (144, 48), (192, 48), (48,), (144,), (192,), (1, 16, 48))  # of a vision transformer


@pytest.mark.parametrize("cut", [by_rows, by_elements])
def test_a_rank_opens_three_files_and_where_fewer_ranks_read_those_of_its_share(tmp_path, monkeypatch, cut):
    """W ranks wrote a file each and W' read: W / W' of them at least. Control: one who needs all of it opens W."""
    world, opened = 16, set()
    weights = {f"w{n}": torch.randn(shape) for n, shape in enumerate(SHAPES)}
    temporary, files = begin(tmp_path, 1), {}
    for rank in range(world):
        names = ("model.steps", *(f"{OPTIMIZER}{name}/step" for name in weights))
        pieces = [Piece(name, torch.tensor(3.0), ()) for name in names if rank == 0]
        for name, value in weights.items():
            first, last = cut(tuple(value.shape), world, rank)
            for full in (f"model.{name}", f"{OPTIMIZER}{name}/exp_avg", f"momentum.{name}"):
                pieces.append(Piece(full, value.flatten()[first:last].clone(), tuple(value.shape), first))
        files |= write_pieces(temporary, pieces, rank, world, sharded=True)
    commit(temporary, 1, files, {"optimizer": "AdamW"})
    checkpoint = module.read_commit(tmp_path / "step-00000001")
    real = tensors_module.safe_open
    monkeypatch.setattr(tensors_module, "safe_open", lambda path, **more: opened.add(path.name) or real(path, **more))

    def read(rank: int, ranks: int) -> int:
        opened.clear()
        state = read_state(checkpoint)
        moments = optimizer_state(checkpoint, state)
        assert whole(state["model.steps"]) == 3
        for name, value in weights.items():
            assert whole(moments["state"][name]["step"]) == 3
            first, last = cut(tuple(value.shape), ranks, rank)
            for one in (state[f"model.{name}"], state[f"momentum.{name}"], moments["state"][name]["exp_avg"]):
                assert torch.equal(part(one, first, last - first), value.flatten()[first:last])
        return len(opened)

    assert len(list((tmp_path / "step-00000001").iterdir())) == world + 1
    assert max(read(rank, world) for rank in range(world)) == 2
    assert max(read(rank, ranks) for ranks in (24, 48) for rank in range(ranks)) <= 3
    assert max(read(rank, 4) for rank in range(4)) <= 16 / 4 + 2
    assert read(0, 1) == world
    counted = [opens(SHAPES, (cut, world), (cut, ranks), rank) for ranks in (4, 24) for rank in range(ranks)]
    assert counted == [read(rank, ranks) for ranks in (4, 24) for rank in range(ranks)]  # the benchmark's own count


def test_a_rank_file_of_another_step_or_none_at_all_is_refused(tmp_path):
    for step in (1, 2):
        sharded(tmp_path, step, {"model.w": torch.full((6,), float(step))}, 2)
    name = "state-00001-of-00002.safetensors"
    right = (tmp_path / "step-00000002" / name).read_bytes()
    assert latest_checkpoint(tmp_path)[0].step == 2
    shutil.copy(tmp_path / "step-00000001" / name, tmp_path / "step-00000002" / name)  # it fits in every other way
    assert latest_checkpoint(tmp_path)[0].step == 1
    (tmp_path / "step-00000002" / name).unlink()
    assert latest_checkpoint(tmp_path)[0].step == 1
    (tmp_path / "step-00000002" / name).write_bytes(right)
    assert latest_checkpoint(tmp_path)[0].step == 2


@pytest.mark.parametrize("pieces", [[(0, 2), (3, 3)], [(0, 3), (2, 4)], [(0, 5)], [(1, 5)], [(0, 7)], []])
def test_pieces_that_leave_a_gap_or_overlap_are_refused(pieces):
    def read(a, b):
        raise AssertionError

    StoredTensor("w", (2, 3), [(4, 2, read), (0, 4, read)])  # control: in any order
    with pytest.raises(DataError, match="do not make up a tensor of shape"):
        StoredTensor("w", (2, 3), [(start, count, read) for start, count in pieces])
