"""The loop: what micro-batches add up to, and what an interrupted attempt hands on; tiny runs in this process."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from distunlearn.config.load import load_config
from distunlearn.engine import loop
from distunlearn.errors import StoppedError
from distunlearn.run import pipeline
from distunlearn.verify.ledger import effective_steps, read_ledger

SETTINGS = [
    "data.members=48", "data.forget=12", "data.holdout=24", "data.calibration=12", "data.third_party=12",
    "data.third_party_audit=12", "pretrain.epochs=1", "pretrain.batch=24", "unlearn.steps=3",
    "unlearn.retain_batch=16", "unlearn.forget_batch=4", "unlearn.third_party_batch=4", "unlearn.checkpoint_every=1",
    "unlearn.optimizer=sgd", "runtime.threads=1",
]  # fmt: skip
# No batch statistics and no contrast within the batch: a loss that is a mean over images, whatever the parts.
SEPARABLE = ["objective.name=supervised", "method.name=finetune", "precision=fp32"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Shards and an original encoder, a vision transformer."""
    out = tmp_path_factory.mktemp("base")
    cfg = load_config("digits_vit", None, [*SETTINGS, *SEPARABLE])
    pipeline.prepare(cfg, out)
    pipeline.pretrain(cfg, out)
    return out


def unlearn(base: Path, out: Path, *more: str) -> None:
    pipeline.unlearn(load_config("digits_vit", None, [*SETTINGS, *SEPARABLE, f"runtime.reuse={base}", *more]), out)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in load_file(out / "training_state.safetensors").items() if k.startswith("model.")}


def figures(out: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["values"] for row in rows if row["phase"] == "unlearn" and "loss" in row["values"]]


def test_micro_batches_make_the_step_of_the_whole_batch(base, tmp_path):
    for name, more in (("whole", []), ("parts", ["unlearn.accumulate=2"]), ("control", ["unlearn.lr=0.01"])):
        unlearn(base, tmp_path / name, *(more or ["unlearn.accumulate=1"]))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6)
    moved = max(float((weights(tmp_path / "control")[name] - value).abs().max()) for name, value in whole.items())
    assert moved > 1e-4  # the comparison can fail
    logged = [figures(tmp_path / name) for name in ("whole", "parts")]
    for one, other in zip(*logged, strict=True):
        assert one.keys() == other.keys()
        for name in ("loss", "grad_norm", "task_loss"):
            assert other[name] == pytest.approx(one[name], rel=1e-4), name


class Killed(Exception):
    pass


def test_images_and_seconds_of_an_interrupted_attempt_are_counted(base, tmp_path, monkeypatch):
    unlearn(base, tmp_path / "whole")
    step, out = loop._Runner._step, tmp_path / "killed"

    def stopping(self, number):
        if number == 2:
            raise Killed
        return step(self, number)

    clock = itertools.count(step=100.0)
    with monkeypatch.context() as patched:  # a first attempt of minutes
        patched.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        patched.setattr(loop._Runner, "_step", stopping)
        with pytest.raises(Killed):
            unlearn(base, out)
    unlearn(base, out)
    done, whole = (json.loads((folder / "done.json").read_text()) for folder in (out, tmp_path / "whole"))
    assert done["attempts"] == 2 and whole["attempts"] == 1
    assert done["images"] == whole["images"] > 0
    assert done["seconds"] >= 100 > whole["seconds"]
    assert all(torch.equal(value, weights(out)[name]) for name, value in weights(tmp_path / "whole").items())


def test_every_attempt_gets_on_by_a_step_even_if_it_is_stopped_at_once(base, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for made in (1, 2):
        (out / "stop").touch()
        with pytest.raises(StoppedError, match=f"after step {made} of 3"):
            unlearn(base, out)
        assert sorted(effective_steps(read_ledger(out / "ledger.jsonl"), "unlearn")) == list(range(made))
    unlearn(base, out)
    assert json.loads((out / "done.json").read_text())["attempts"] == 3
