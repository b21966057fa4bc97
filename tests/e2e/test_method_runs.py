"""Every method in whole unlearning runs on SimCLR, MoCo and BYOL: what it trains, counts and keeps; in this process."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from parts import TRAINED
from safetensors.torch import load_file

from distunlearn.config.load import load_config
from distunlearn.data.views.draws import id_hashes
from distunlearn.engine import loop
from distunlearn.errors import ConfigError, DataError
from distunlearn.methods import random_target, sure
from distunlearn.plan.plan import make_plan
from distunlearn.run import pipeline
from distunlearn.verify.ledger import coverage, read_ledger

RECIPES = {"simclr": "digits", "moco": "digits_moco", "byol": "digits_byol"}
METHODS_HERE = [name for name in TRAINED if name not in ("third_party", "retrain")]


def before_the_first_step(method: str, objective: str) -> int:
    """Images that methods with a calibration pass through the original encoder: 72 retained, 24 to forget, a bank."""
    online = {"simclr": 2, "moco": 1, "byol": 2}[objective]
    both = online * (1 if objective == "simclr" else 2)  # with the momentum encoder's views
    places = 72 * online
    bank = 0 if objective == "moco" else 32 * both  # the queue is a bank without any pass
    return {"random_target": places, "salun": places + 24 * both + bank}.get(method, 0)


def config(objective: str, *extra: str):
    return load_config(RECIPES[objective], None, [*tiny.TINY, *extra], world=1)


@pytest.fixture(scope="module")
def bases(finished_run) -> dict[str, Path]:
    """Shards and an original encoder for each objective."""
    return {objective: finished_run(recipe)[0] for objective, recipe in RECIPES.items()}


def unlearn(objective: str, bases: dict[str, Path], out: Path, method: str, *extra: str):
    cfg = config(objective, f"runtime.reuse={bases[objective]}", f"method.name={method}", *extra)
    pipeline.unlearn(cfg, out)
    return cfg


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in load_file(out / "training_state.safetensors").items() if k.startswith("model.")}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def pairs() -> list:
    """Each method with one of the objectives in turn; all with all: pytest -m matrix."""
    return [
        pytest.param(method, objective, marks=() if number % 3 == row % 3 else pytest.mark.matrix)
        for row, method in enumerate(METHODS_HERE) for number, objective in enumerate(RECIPES)
    ]  # fmt: skip


@pytest.mark.parametrize(("method", "objective"), pairs())
def test_a_run(bases, tmp_path, method, objective):
    extra = ["method.max_share=0.5"] if method == "scrub" else []  # 3 of 6 steps reach all 24 images
    cfg = unlearn(objective, bases, tmp_path, method, *extra)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row["values"] for row in rows if row["phase"] == "unlearn" and "loss" in row["values"]]
    assert len(steps) == 6 and all(math.isfinite(value) for step in steps for value in step.values())
    done, planned = json.loads((tmp_path / "done.json").read_text()), make_plan(cfg, tmp_path)
    counted, expected = planned["phases"]["unlearn"], before_the_first_step(method, objective)
    assert done["images"] == counted["images"] + expected
    assert counted.get("calibration_images", 0) == expected
    found = coverage(read_ledger(tmp_path / "ledger.jsonl"), [f"{i}" for i in forget_ids(bases[objective])])
    times = {"finetune": 0, "l1_sparse": 0, "scrub": 1}.get(method, 2)
    assert (found.consumed_min, found.used_as_retain) == (times, 0)
    before, after = weights(bases[objective] / "original"), weights(tmp_path)
    moved = [key for key in before if key.endswith("weight") and not torch.equal(before[key], after[key])]
    assert moved
    if method == "salun":
        share = sum(int((before[k] != after[k]).sum()) for k in before if k.endswith(("weight", "bias")))
        whole = sum(before[k].numel() for k in before if k.endswith(("weight", "bias")))
        assert 0.25 < share / whole <= 0.5
    if objective == "moco":  # nothing of an image to forget is left in the queue that is exported
        state = load_file(tmp_path / "training_state.safetensors")
        held = state["queue.ids"][state["queue.valid"]]
        forgotten = torch.from_numpy(id_hashes(forget_ids(bases[objective])))
        before = load_file(bases[objective] / "original" / "training_state.safetensors")
        assert torch.isin(before["queue.ids"], forgotten).any(), "control: they were there"
        assert len(held) and not torch.isin(held, forgotten).any()


def forget_ids(base: Path) -> list[str]:
    from distunlearn.data.manifest.manifest import Manifest

    return Manifest.of_run(base).ids("forget")


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", ["random_target", "salun", "sure"])
def test_what_a_method_has_learned_survives_a_kill_bit_for_bit(bases, tmp_path, monkeypatch, method):
    unlearn("byol", bases, tmp_path / "whole", method)
    step = loop._Runner._step

    def stopping(self, number):
        if number == 3:  # the checkpoint is that of step 2
            raise Killed
        return step(self, number)

    for name in ("killed", "control"):
        with monkeypatch.context() as patched:
            patched.setattr(loop._Runner, "_step", stopping)
            with pytest.raises(Killed):
                unlearn("byol", bases, tmp_path / name, method)
    unlearn("byol", bases, tmp_path / "killed", method)
    assert json.loads((tmp_path / "killed/done.json").read_text())["attempts"] == 2
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    with monkeypatch.context() as patched:  # the check can fail: a state that comes back a little wrong
        where = sure.Critic if method == "sure" else random_target.RandomTarget
        right = where.load_state_dict
        patched.setattr(where, "load_state_dict", lambda self, state: right(self, {
            key: value.flip(-1) if value.is_floating_point() and value.dim() else value for key, value in state.items()
        }))  # fmt: skip
        unlearn("byol", bases, tmp_path / "control", method)
    assert not same(weights(tmp_path / "control"), weights(tmp_path / "whole"))


def test_what_cannot_be_done_is_refused_before_anything_is_written(bases, tmp_path):
    supervised = load_config("digits_supervised", None, [*tiny.TINY, "method.name=alignment_calibration"], world=1)
    with pytest.raises(ConfigError, match="needs an objective that compares views"):
        pipeline.run(supervised, tmp_path / "run")
    short = config("simclr", "method.name=scrub", "method.max_share=0.2")
    with pytest.raises(DataError, match=r"the 2 of 6 that see them.* cannot reach all 24"):
        pipeline.run(short, tmp_path / "run")
    assert not (tmp_path / "run").exists()
