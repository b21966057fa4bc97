"""Encoders trained elsewhere, on tiny runs: the audit says of them what it said where they are from."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

ENDED = (0, 6, 7)
CLOSE = 0.005  # of an AUC
GREY_IMAGENET = ("encoder.mean=[0.449]", "encoder.std=[0.226]")


def original_aucs(out: Path) -> dict[str, float]:
    attacks = json.loads((out / "audit/summary.json").read_text())["attacks"]
    return {name: found["original"]["auc"] for name, found in attacks.items()}


def apart(first: Path, second: Path) -> float:
    ours, theirs = original_aucs(first), original_aucs(second)
    return max(abs(ours[name] - theirs[name]) for name in ours)


def moco_file(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """As facebookresearch/moco saves it: both encoders with their heads, and the queue."""
    state = {}
    for part, place in (("model", "module.encoder_q."), ("momentum", "module.encoder_k.")):
        state |= renamed(kept, f"{part}.", place)
    return state | {"module.queue": kept["queue.keys"].T}


def simclr_file(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """As sthalles/SimCLR saves it: the head in the place of the classifier."""
    return renamed(kept, "model.", "backbone.")


def renamed(kept: dict[str, Tensor], part: str, place: str) -> dict[str, Tensor]:
    form = {"backbone.": "", "projector.body.0.": "fc.0.", "projector.last.": "fc.2."}
    return {
        place + new + name.removeprefix(part + old): value
        for old, new in form.items() for name, value in kept.items() if name.startswith(part + old)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "form", "pixels"),
    [
        ("digits_moco", moco_file, ("encoder.mean=[0.5]", "encoder.std=[0.5]")),
        pytest.param("digits_moco", moco_file, GREY_IMAGENET, marks=pytest.mark.matrix),
        pytest.param("digits", simclr_file, ("encoder.mean=[0.5]", "encoder.std=[0.5]"), marks=pytest.mark.matrix),
        ("digits", simclr_file, GREY_IMAGENET),
    ],
    ids=["moco", "moco by ImageNet's mean", "simclr", "simclr by ImageNet's mean"],
)
def test_official_files_come_back_as_what_they_were(tmp_path, recipe, form, pixels):
    """Backbone, head, momentum encoder and queue of published forms: every attack says what it said of the run's."""
    first, again, wrong = tmp_path / "first", tmp_path / "again", tmp_path / "wrong"
    own = (tiny.named_roles(tmp_path), "objective.head_norm=false", "audit.tier=0", "unlearn.steps=3")
    assert tiny.run(first, *own, *pixels, recipe=recipe).returncode in ENDED
    state = form(load_file(first / "original/training_state.safetensors"))
    torch.save({"state_dict": state, "epoch": 200, "arch": "resnet18"}, tmp_path / "w.pth.tar")
    given = (*own, f"encoder.checkpoint={tmp_path / 'w.pth.tar'}")
    assert tiny.run(again, *given, *pixels, recipe=recipe).returncode in ENDED
    assert tiny.run(wrong, *given, "encoder.mean=[0.2]", "encoder.std=[0.1]", recipe=recipe).returncode in ENDED
    notes = " ".join(json.loads((again / "original/done.json").read_text())["checkpoint"])
    assert "own heads were taken" in notes
    assert ("momentum encoder was taken" in notes and "keys were made anew" in notes) == (form is moco_file)
    assert apart(first, again) <= CLOSE < apart(first, wrong), "the control with another mean and std moves them"


def test_the_same_function_under_another_normalisation_is_the_same_encoder(finished_run, tmp_path):
    """The first convolution halved and the std, too: of a power of two every figure of the original is the same."""
    weights = load_file(finished_run()[0] / "export/model.safetensors")
    save_file(weights, tmp_path / "own.safetensors")
    save_file(weights | {"conv1.0.weight": weights["conv1.0.weight"] * 0.5}, tmp_path / "half.safetensors")
    common = (tiny.named_roles(tmp_path), "audit.tier=0", "unlearn.steps=3", "encoder.mean=[0.5]")
    for name, std in (("own", 0.5), ("half", 0.25)):
        given = (f"encoder.checkpoint={tmp_path / name}.safetensors", f"encoder.std=[{std}]")
        done = tiny.run(tmp_path / name, *common, *given)
        assert done.returncode in ENDED, done.stderr[-3000:]
    own, half = original_aucs(tmp_path / "own"), original_aucs(tmp_path / "half")
    by_weights = own.pop("gradient_norm_network"), half.pop("gradient_norm_network")  # whose lengths are others
    assert own == half and by_weights[0] != by_weights[1]
    unsaid = tiny.run(tmp_path / "unsaid", common[0], f"encoder.checkpoint={tmp_path / 'own.safetensors'}")
    assert unsaid.returncode == 2 and "encoder.mean" in unsaid.stderr and not (tmp_path / "unsaid").exists()


def test_classes_with_large_numbers_are_as_many_as_there_are(tmp_path):
    shards, rng = tmp_path / "big", np.random.default_rng(0)
    shards.mkdir()
    with tarfile.open(shards / "00000.tar", "w") as tar:
        for number in range(180):
            data = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(data, "PNG")
            label = str(500_000_000 + number % 3).encode()
            for name, content in ((f"{number:06d}.png", data.getvalue()), (f"{number:06d}.cls", label)):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    small = tiny.settings(
        "data.members=100", "data.forget=20", "data.holdout=30", "data.calibration=20", "data.third_party=20",
        "data.third_party_audit=10", "encoder.in_chans=3", "pretrain.epochs=1", "pretrain.batch=20",
    )  # fmt: skip
    source = ("--set", "data.source=webdataset", "--set", f"data.root={shards}")
    indexed = tiny.command("index", str(shards), *small)
    assert indexed.returncode == 0, indexed.stderr[-2000:]
    planned = tiny.command("plan", "digits_supervised", *source, *small)
    assert planned.returncode == 0, planned.stderr[-2000:]
    assert json.loads(planned.stdout)["encoder"]["classes"] == 3
    out = tmp_path / "run"
    trained = tiny.command(
        "pretrain", "digits_supervised", "--out", str(out), *source, "--set", f"data.shards={shards}", *small
    )
    assert trained.returncode == 0, trained.stderr[-2000:]
    head = load_file(out / "original/training_state.safetensors")["model.projector.last.weight"]
    assert len(head) == 3, "one output a class that occurs, not one a number"
