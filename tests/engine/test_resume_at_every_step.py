"""Every method and objective, resumed at every step: the same weights, bit for bit, and the same ids in the ledger."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distunlearn.cli import main
from distunlearn.config.load import load_config
from distunlearn.engine.checkpoint import format
from distunlearn.engine.checkpoint.tensors import read_state
from distunlearn.engine.run_lock import Lease
from distunlearn.errors import ConfigError
from distunlearn.run import pipeline
from distunlearn.verify.ledger import effective_steps, read_ledger

STEPS = 3
SETTINGS = [
    "data.members=48", "data.forget=12", "data.holdout=24", "data.calibration=12", "data.third_party=12",
    "data.third_party_audit=12", "pretrain.epochs=2", "pretrain.batch=32", "pretrain.checkpoint_every=1",
    "unlearn.steps=3", "unlearn.retain_batch=16", "unlearn.forget_batch=4", "unlearn.third_party_batch=4",
    "unlearn.checkpoint_every=1", "objective.hidden_dim=16", "objective.output_dim=8",
    "encoder.args={channels: [8, 8, 8, 8], layers: [1, 1, 1, 1]}", "encoder.embed_dim=8", "runtime.threads=1",
    "constraint.view_pairs=1",
]  # fmt: skip
# Trainings with a state of their own: spread and running means, queue and momentum encoder, target network, SGD.
CASES = {
    "third_party": ("unlearn", "digits", []),
    "finetune": ("unlearn", "digits", ["method.name=finetune", "unlearn.optimizer=sgd"]),
    "grad_ascent": ("unlearn", "digits", ["method.name=grad_ascent"]),
    "moco": ("pretrain", "digits_moco", ["pretrain.accumulate=2", "objective.queue_size=32"]),
    "retrain": ("unlearn", "digits", ["method.name=retrain"]),
    "byol": ("pretrain", "digits_byol", []),
}


def settings(recipe: str, shards: Path, *more: str):
    return load_config(recipe, None, [*SETTINGS, f"data.shards={shards}", *more])


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    pipeline.prepare(settings("digits", folder), folder)
    return folder


def rewound(whole: Path, out: Path, phase: str, step: int, keep: Path) -> Path:
    """A copy of the run as a kill after `step` steps would have left it."""
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "logs"))
    folder = out / ("original" if phase == "pretrain" else ".")
    for name in ("done.json", "training_state.safetensors"):
        (folder / name).unlink()
    for number in range(1, step + 1):
        name = f"step-{number:08d}"
        shutil.copytree(keep / name, folder / "checkpoints" / name)
    lines = (out / "ledger.jsonl").read_text().splitlines()
    begun = next(i for i, line in enumerate(lines) if f'"start","phase":"{phase}"' in line)
    torn = '{"n":7,"event":"st' if step % 2 else ""  # of the line at which the process was killed
    (out / "ledger.jsonl").write_text("\n".join([*lines[: begun + step + 2], torn]))  # and a step that was not saved
    return folder


def told(out: Path, phase: str) -> dict[int, tuple]:
    steps = effective_steps(read_ledger(out / "ledger.jsonl"), phase)
    return {number: (line["count"], line.get("forget")) for number, line in steps.items()}


@pytest.mark.parametrize("case", CASES)
def test_resumed_at_every_step_it_ends_in_the_same_state(shards, tmp_path, monkeypatch, case):
    phase, recipe, more = CASES[case]
    cfg = settings(recipe, shards, *more)
    train = getattr(pipeline, phase)
    monkeypatch.setattr(format, "KEEP", 99)
    whole = tmp_path / "whole"
    if phase == "unlearn":
        pipeline.pretrain(cfg, whole)
    train(cfg, whole)
    folder = whole / ("original" if phase == "pretrain" else ".")
    saved = sorted(p.name for p in (folder / "checkpoints").glob("step-*"))
    assert saved == [f"step-{number:08d}" for number in range(1, STEPS)]
    final = load_file(folder / "training_state.safetensors")
    last = format.read_commit(folder / "checkpoints" / saved[-1])
    assert told(whole, phase).keys() == set(range(STEPS))

    for step in range(1, STEPS):
        out = tmp_path / f"from-{step}"
        again = rewound(whole, out, phase, step, folder / "checkpoints")
        torch.manual_seed(1000 + step)  # no training draws from the global generators: none has a state to save
        np.random.seed(1000 + step)
        train(cfg, out)
        starts = [line["step"] for line in read_ledger(out / "ledger.jsonl")
                  if line["event"] == "start" and line["phase"] == phase]  # fmt: skip
        assert starts == [0, step]  # it resumed there and nowhere else
        found = load_file(again / "training_state.safetensors")
        assert found.keys() == final.keys()
        assert all(torch.equal(found[name], final[name]) for name in final)
        assert told(out, phase) == told(whole, phase)
        if step < STEPS - 1:  # optimizer and method too, as the last checkpoint has them
            state = read_state(format.read_commit(again / "checkpoints" / saved[-1]))
            assert state.keys() == read_state(last).keys()
            assert all(torch.equal(state[name], value) for name, value in read_state(last).items())

    # Control: weights of one checkpoint with the optimizer of the one before end elsewhere.
    out = tmp_path / "mixed"
    again = rewound(whole, out, phase, 2, folder / "checkpoints")
    newest, before = (again / "checkpoints" / name for name in (saved[1], saved[0]))
    shutil.copy(before / "optimizer.safetensors", newest / "optimizer.safetensors")
    content = json.loads((newest / "COMMIT.json").read_text())
    del content["commit"]
    content["files"]["optimizer.safetensors"]["sha256"] = format.file_sha256(newest / "optimizer.safetensors")
    (newest / "COMMIT.json").write_text(json.dumps(content | {"commit": format._digest(content)}))
    train(cfg, out)
    found = load_file(again / "training_state.safetensors")
    assert any(not torch.equal(found[name], final[name]) for name in final)


@pytest.fixture(scope="module")
def pretrained(shards, tmp_path_factory):
    """Two checkpoints of three are kept."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    pipeline.pretrain(settings("digits", shards), out)
    return out


def unfinished(pretrained: Path, out: Path) -> Path:
    shutil.copytree(pretrained, out)
    for name in ("done.json", "training_state.safetensors"):
        (out / "original" / name).unlink()
    return out


def ended_as(pretrained: Path, out: Path) -> bool:
    expected, found = (load_file(run / "original" / "training_state.safetensors") for run in (pretrained, out))
    return all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_moved_run_goes_on_and_a_copy_of_a_living_one_only_when_told_to(shards, pretrained, tmp_path):
    cfg = settings("digits", shards)
    out = unfinished(pretrained, tmp_path / "here")
    lease = Lease(out)  # its owner is at work
    shutil.copytree(out, tmp_path / "copy")
    lease.release()
    shutil.move(out, tmp_path / "else" / "where")
    pipeline.pretrain(cfg, tmp_path / "else" / "where")
    starts = [line["step"] for line in read_ledger(tmp_path / "else/where/ledger.jsonl") if line["event"] == "start"]
    assert starts == [0, STEPS - 1] and ended_as(pretrained, tmp_path / "else" / "where")
    with pytest.raises(ConfigError, match="is in use by process .* delete owner.json there"):
        pipeline.pretrain(cfg, tmp_path / "copy")
    (tmp_path / "copy" / "owner.json").unlink()  # taken over by hand
    pipeline.pretrain(cfg, tmp_path / "copy")
    assert ended_as(pretrained, tmp_path / "copy")


def test_a_limit_of_the_system_on_files_ends_a_run_in_one_sentence(shards, pretrained, tmp_path, capsys):
    """The kernel refuses the write, not a stand-in for it."""
    out = unfinished(pretrained, tmp_path / "run")
    shutil.rmtree(out / "original" / "checkpoints")
    size = max(p.stat().st_size for p in (pretrained / "original" / "checkpoints").rglob("state.safetensors"))
    arguments = ["pretrain", "digits", "--out", str(out)]
    for value in (*SETTINGS, f"data.shards={shards}"):
        arguments += ["--set", value]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        code = main.main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 3 and len(said) == 1 and "File too large" in said[0] and "the one before is intact" in said[0]
    assert not list((out / "original" / "checkpoints").glob("step-*"))
    assert main.main(arguments) == 0 and ended_as(pretrained, out)
