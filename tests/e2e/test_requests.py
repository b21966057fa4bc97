"""Requests of several kinds, end to end on tiny runs: one image, a foreign checkpoint, strangers from elsewhere."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

from distunlearn.data.manifest.manifest import Manifest

ENDED = (0, 6, 7)


@pytest.fixture(scope="module")
def first(finished_run):
    """A finished tiny run."""
    return finished_run()[0]


def summary(out):
    return json.loads((out / "audit/summary.json").read_text())


def test_one_single_image_is_forgotten_and_the_verdict_is_inconclusive(first, tmp_path):
    sample = Manifest.of_run(first).ids("forget")[0]
    (tmp_path / "request.txt").write_text(f"{sample}\n")
    done = tiny.run(tmp_path / "run", f"data.forget={tmp_path / 'request.txt'}")
    assert done.returncode == 7, done.stderr[-3000:]
    found = summary(tmp_path / "run")
    assert found["coverage"]["requested"] == 1 and found["coverage"]["consumed_min"] >= 1
    assert found["coverage"]["used_as_retain"] == 0 and found["gates"]["verdict"] == "inconclusive"
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any(row["values"].get("phi_gradient", 0) != 0 for row in metrics if row["phase"] == "unlearn")


@pytest.mark.parametrize("recipe", ["digits", "digits_byol"])
def test_a_foreign_checkpoint_is_the_original_encoder(first, tmp_path, recipe):
    checkpoint = first / "export/model.safetensors"
    out = tmp_path / "run"
    done = tiny.run(out, f"encoder.checkpoint={checkpoint}", tiny.named_roles(tmp_path), recipe=recipe)
    assert done.returncode in ENDED, done.stderr[-3000:]
    given = load_file(checkpoint)
    original, unlearned, retrained = (
        load_file(folder / "export/model.safetensors") for folder in (out / "original", out, out / "retrained")
    )
    assert all(torch.equal(given[name], original[name]) for name in given)  # running statistics too
    assert any(not torch.equal(given[name], unlearned[name]) for name in given)
    assert any(not torch.equal(given[name], retrained[name]) for name in given)
    notes = json.loads((out / "original/done.json").read_text())["checkpoint"]
    assert any("new ones are trained on its backbone" in note for note in notes)
    rows = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    steps = [row["count"] for row in rows if row["event"] == "step" and row["phase"] == "pretrain"]
    assert steps and all(set(count) == {"retain"} for count in steps), "no head of the run knows an image to forget"


def test_a_finished_run_is_kept_and_its_verdict_repeated(first):
    lines = [json.loads(line) for line in (first / "ledger.jsonl").read_text().splitlines()]
    weights = (first / "training_state.safetensors").read_bytes()
    code = {"pass": 0, "fail": 6, "inconclusive": 7}[summary(first)["gates"]["verdict"]]
    before = summary(first)
    again = tiny.run(first)
    assert again.returncode == code, again.stderr[-3000:]
    assert [json.loads(line) for line in (first / "ledger.jsonl").read_text().splitlines()] == lines
    assert (first / "training_state.safetensors").read_bytes() == weights and summary(first) == before


def test_the_plan_counts_what_the_run_then_passes_through_the_encoder(first):
    planned = json.loads((first / "plan.json").read_text())["phases"]
    cost = summary(first)["cost"]
    assert cost["pretrain_images"] == planned["pretrain"]["images"]
    assert cost["retrain_images"] == planned["retrain"]["images"]
    unlearn = planned["unlearn"]
    assert cost["unlearn_images"] == unlearn["images"] + unlearn["calibration_images"]


def test_third_party_from_another_source(tmp_path):
    root = tmp_path / "strangers"
    root.mkdir()
    generator = np.random.default_rng(0)
    for i in range(60):
        Image.fromarray(generator.integers(0, 255, (8, 8), dtype=np.uint8)).save(root / f"{i:02d}.png")
    out = tmp_path / "run"
    done = tiny.run(out, "data.third_party_source=imagefolder", f"data.third_party_root={root}")
    assert done.returncode in ENDED, done.stderr[-3000:]
    rows = [json.loads(line)["values"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    start = next(row for row in rows if "start/phi_star_output" in row)
    assert start["start/calibration_p_output"] <= 0.01 and start["start/phi_star_output"] > 0
    assert summary(out)["controls"]["third_party_against_holdout"]["original"]["p"] <= 0.01


@pytest.mark.parametrize("method", ["finetune", "grad_ascent", "retrain", "none", "random_init"])
def test_references_run_on_the_encoders_of_another_run(first, tmp_path, method):
    out = tmp_path / "run"
    done = tiny.run(out, f"method.name={method}", f"runtime.reuse={first}")
    assert done.returncode in ENDED, done.stderr[-3000:]
    expected, found = (load_file(folder / "original/training_state.safetensors") for folder in (first, out))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    unlearned = load_file(out / "training_state.safetensors")
    assert all(torch.equal(unlearned[name], found[name]) for name in found) == (method == "none")
    assert summary(out)["coverage"]["used_as_retain"] == 0
    if method == "none":
        assert summary(out)["cost"]["unlearn_images"] == 0
