"""The recipes for photos: nothing of digits comes in unsaid; a plan, and two steps of both trainings on the CPU."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import math

import numpy as np
import pytest
import tiny
from PIL import Image

from distunlearn.config import photo_recipes
from distunlearn.config.recipes import RECIPES

RECIPES_HERE = ("photos_64", "photos_224")
OF_OTHER_OPTIMIZERS = {"adamw": {"momentum", "nesterov", "trust"}, "sgd": {"trust"}, "lars": set()}
NOT_FOR_FRESH_ONES = {"checkpoint", "prefix", "ignore", "trained_with", "similarity_mib"}
SMALL = [
    "data.workers=0", "data.members=20", "data.forget=4", "data.holdout=8", "data.calibration=4", "data.third_party=4",
    "data.third_party_audit=4", "data.max_forget_share=0.5", "precision=fp32", "pretrain.epochs=1", "pretrain.batch=10",
    "unlearn.steps=2", "unlearn.retain_batch=4", "unlearn.forget_batch=2", "unlearn.third_party_batch=2",
    "objective.hidden_dim=16", "objective.output_dim=8", "audit.views=2", "audit.bootstrap=100", "audit.tier=0",
    "audit.relearn_steps=0", "runtime.threads=1",
]  # fmt: skip
SIZES = {
    "photos_64": ["encoder.args={channels: [8, 8, 8, 8], layers: [1, 1, 1, 1]}", "encoder.embed_dim=32",
                  "objective.queue_size=20"],
    "photos_224": ["encoder.args={embed_dim: 12, depth: 1, num_heads: 2}", "encoder.embed_dim=12"],
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(44):
        (folder / f"class-{number % 2}").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (80, 96, 3), dtype=np.uint8)).save(
            folder / f"class-{number % 2}" / f"{number}.jpg"
        )
    return folder


def given(recipe: str) -> dict[str, set[str]]:
    """Names that the recipe's own code gives to every group of settings."""
    tree = ast.parse(inspect.getsource(getattr(photo_recipes, recipe)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = {}
    for call in calls:
        kind = call.func.id
        if kind == "settings_of":
            kind = call.args[0].id
        named[kind] = {word.arg for word in call.keywords}
    return named


@pytest.mark.parametrize("recipe", RECIPES_HERE)
def test_every_setting_that_matters_is_written_out(recipe):
    cfg, named = RECIPES[recipe](), given(recipe)
    groups = {
        "EncoderConfig": cfg.encoder, "OBJECTIVE": cfg.objective, "PretrainConfig": cfg.pretrain,
        "UnlearnConfig": cfg.unlearn,
    }  # fmt: skip
    for kind, settings in groups.items():
        free = NOT_FOR_FRESH_ONES | ({"name"} if kind == "OBJECTIVE" else set())
        free |= OF_OTHER_OPTIMIZERS.get(getattr(settings, "optimizer", ""), set())
        unsaid = {field.name for field in dataclasses.fields(settings)} - named[kind] - free
        assert not unsaid, f"{recipe}: {kind} takes {sorted(unsaid)} from somewhere else"
    assert cfg.views.recipe == cfg.objective.name.replace("moco", "mocov2").replace("v2v3", "v3")
    assert cfg.data.source == "imagefolder" and cfg.encoder.mean and cfg.data.forget == "forget.txt"


@pytest.mark.parametrize("recipe", RECIPES_HERE)
def test_a_plan_and_two_steps(photos, tmp_path, recipe):
    overrides = [part for value in (f"data.root={photos}", *SMALL, *SIZES[recipe]) for part in ("--set", value)]
    planned = tiny.command("plan", recipe, *overrides)
    assert planned.returncode == 0, planned.stderr[-2000:]
    small = {"images": 20 if recipe == "photos_224" else 0, "looked_at": 20}  # members, of 80 pixels
    assert json.loads(planned.stdout)["request"]["smaller_than_the_encoder"] == small
    done = tiny.command("run", recipe, "--out", str(tmp_path / "run"), *overrides)
    assert done.returncode in (0, 6, 7), done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [(row["phase"], row["values"]["loss"]) for row in rows if "loss" in row["values"]]
    assert [phase for phase, _ in losses] == ["pretrain"] * 2 + ["unlearn"] * 2
    assert all(math.isfinite(loss) for _, loss in losses)
    indexed = tiny.command("plan", recipe, "--out", str(tmp_path / "run"), *overrides)
    assert indexed.returncode == 0, indexed.stderr[-2000:]
    every = {name: 2 * count for name, count in small.items()}  # 40 images have a role
    assert json.loads(indexed.stdout)["request"]["smaller_than_the_encoder"] == every
    unnamed = tiny.command("plan", recipe)
    assert unnamed.returncode == 2 and "data.root" in unnamed.stderr
