"""Every objective, a ResNet and a ViT: each trains, forgets, is audited and reported."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file

from distunlearn.verify.ledger import effective_steps, read_ledger

SUMMARY_KEYS = {"auc", "auc_low", "auc_high", "tpr_at_1pct_fpr", "ks_p"}
RECIPES = ["digits", "digits_moco", "digits_mocov3", "digits_byol", "digits_supervised", "digits_vit"]


@pytest.fixture(scope="module", params=RECIPES)
def finished(request, finished_run):
    """Recipe, folder, exit code."""
    return request.param, *finished_run(request.param)


def test_the_run_directory_is_complete(finished):
    _, out, _ = finished
    for name in (
        "run.yaml",
        "plan.json",
        "env.json",
        "ledger.jsonl",
        "metrics.jsonl",
        "report.html",
        "done.json",
        "training_state.safetensors",
        "export/config.json",
        "export/model.safetensors",
        "audit/summary.json",
        "audit/scores-original.json",
        "audit/scores-unlearned.json",
        "audit/scores-retrained.json",
        "original/done.json",
        "original/export/model.safetensors",
        "retrained/done.json",
        "shards/index.arrow",
        "shards/summary.json",
        "request.json",
        "roles.arrow",
        "checkpoints/LATEST",
    ):
        assert (out / name).exists(), name


def test_summary_has_the_names_that_others_read(finished):
    _, out, code = finished
    summary = json.loads((out / "audit/summary.json").read_text())
    assert {"view_agreement", "encodermi_vector", "bank_loss"} <= set(summary["attacks"])
    for attack in summary["attacks"].values():
        for encoder in ("original", "unlearned", "retrained"):
            assert set(attack[encoder]) >= SUMMARY_KEYS
        assert set(attack["gap"]) >= {"auc", "low", "high", "verdict"}
    assert set(summary["utility"]) == {"knn", "linear_probe"}
    assert summary["gates"]["verdict"] == {0: "pass", 6: "fail", 7: "inconclusive"}[code]


def test_coverage_is_what_the_ledger_says_and_forget_never_trains_as_retain(finished):
    _, out, _ = finished
    summary = json.loads((out / "audit/summary.json").read_text())
    steps = effective_steps(read_ledger(out / "ledger.jsonl"), "unlearn")
    assert len(steps) == 6
    rows = [i for line in steps.values() for i in line["forget"]]
    coverage = summary["coverage"]
    assert coverage["requested"] == 24 == len(set(rows))
    assert (coverage["consumed_min"], coverage["consumed_max"], coverage["used_as_retain"]) == (2, 2, 0)


def test_cost_counts_every_view(finished):
    recipe, out, _ = finished
    cost = json.loads((out / "audit/summary.json").read_text())["cost"]
    per_image = {"digits_moco": 2, "digits_mocov3": 4, "digits_byol": 4}.get(recipe, 2)  # momentum views count too
    assert cost["pretrain_images"] == math.ceil(2 * 96 / 32) * 32 * per_image
    assert cost["retrain_images"] == math.ceil(2 * 72 / 32) * 32 * per_image
    planned = json.loads((out / "plan.json").read_text())["phases"]["unlearn"]
    climbed = 8 if recipe == "digits" else 0  # forgotten images beside the retained ones, and for Phi once more
    assert planned["images"] == 6 * (32 + climbed + 8 + 8) * per_image
    # Four draws of one pair of views of 24 + 24 images; no image's views are counted in a bank that is a queue.
    bank = 4 * 32 * per_image if recipe != "digits_moco" and recipe != "digits_supervised" else 0
    labels = 48 * per_image if recipe == "digits_supervised" else 0
    assert planned["calibration_images"] == 4 * 48 * per_image + bank + labels
    assert cost["unlearn_images"] == planned["images"] + planned["calibration_images"]
    assert planned["share_of_retraining"] == round(cost["unlearn_images"] / cost["retrain_images"], 4)


def test_metrics_show_a_live_constraint(finished):
    _, out, _ = finished
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row["values"] for row in rows if row["phase"] == "unlearn" and "loss" in row["values"]]
    assert len(steps) == 6
    assert all(math.isfinite(values["loss"]) for values in steps)
    assert steps[0]["constraint_gradient"] > 0
    assert any(values["phi_gradient"] != 0 for values in steps)


@pytest.mark.parametrize("recipe", ["digits", "digits_vit"])  # a ResNet and a ViT: the others export the same
def test_export_loads_with_timm_alone(finished_run, tmp_path, recipe):
    """A fresh process that knows only timm gets the very weights that the run kept."""
    out, _ = finished_run(recipe)
    code = (
        "import sys, timm, torch; m = timm.create_model('local-dir:' + sys.argv[1], pretrained=True).eval();"
        "torch.save(m.state_dict(), sys.argv[2]); print(tuple(m(torch.zeros(2, 1, 32, 32)).shape));"
        "assert 'distunlearn' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(out / "export"), str(tmp_path / "loaded.pt")], capture_output=True, text=True,
        timeout=120, env=tiny.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("(2, 128)", "(2, 96)")
    kept = load_file(out / "training_state.safetensors")
    loaded = torch.load(tmp_path / "loaded.pt", weights_only=True)
    assert loaded and all(torch.equal(value, kept[f"model.backbone.{name}"]) for name, value in loaded.items())
