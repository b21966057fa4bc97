"""Heads and momentum encoder of published checkpoints: taken where they fit, as they were; else not at all."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from encoder_configs import HIDDEN, OUT, RESNET18, images_for, run_config
from torch import Tensor, nn

from distunlearn.config.load import load_config
from distunlearn.encoders.checkpoint_heads import other_heads, take_heads
from distunlearn.encoders.model import ContrastiveModel, MomentumEncoder, build_model
from distunlearn.encoders.weights import load_backbone
from distunlearn.errors import ConfigError

E = 32  # embedding size of RESNET18


def shaken(*parts: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for part in parts:
            for value in part.state_dict().values():
                if value.is_floating_point():
                    value.add_(torch.rand(value.shape, generator=generator) * 0.2)


def mlp(norm: bool, bias: bool, last_norm: bool = False, dim: int = E, layers: int = 2) -> nn.Sequential:
    """A head as published ones are built, with numbers for names."""
    parts: list[nn.Module] = []
    for number in range(layers - 1):
        parts.append(nn.Linear(HIDDEN if number else dim, HIDDEN, bias=bias))
        parts += [nn.BatchNorm1d(HIDDEN)] * norm + [nn.ReLU()]
    parts.append(nn.Linear(HIDDEN, OUT, bias=not last_norm))
    head = nn.Sequential(*parts, *([nn.BatchNorm1d(OUT, affine=False)] * last_norm))
    shaken(head)
    return head.eval()


def named(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}{k}": v.clone() for k, v in module.state_dict().items()}


def model_for(objective: str, **heads: object) -> tuple[ContrastiveModel, MomentumEncoder]:
    cfg = run_config(objective=objective)
    model = build_model(replace(cfg, objective=replace(cfg.objective, **heads)), None).eval()
    return model, MomentumEncoder(model)


# objective, its settings, projector, prefixes of backbone, projector, predictor, and of the momentum copies of two
FORMS = {
    "moco v2": ("moco", {"head_norm": False}, mlp(False, True),
                "encoder_q.", "encoder_q.fc.", None, "encoder_k.", "encoder_k.fc."),
    "simclr with a last norm": ("simclr", {}, mlp(True, False, True),
                                "convnet.", "projection_head.layers.", None, None, None),
    "solo": ("simclr", {"head_norm": False}, mlp(False, True), "backbone.", "projector.", None, None, None),
    "byol": ("byol", {}, mlp(True, True),
             "backbone.", "projector.", "predictor.", "momentum_backbone.", "momentum_projector."),
    "moco v3": ("mocov3", {"head_layers": 3}, mlp(True, False, True, layers=3), "base_encoder.", "base_encoder.head.",
                "predictor.", "momentum_encoder.", "momentum_encoder.head."),
}  # fmt: skip


def checkpoint(form: str) -> tuple[dict[str, Tensor], nn.Module, nn.Module, nn.Module | None]:
    """What the file holds, its backbone, its projector and its predictor; the momentum copies are others."""
    _, _, projector, *prefixes = FORMS[form]
    backbone = build_model(run_config(seed=1), None).backbone.eval()
    predictor = mlp(True, False, dim=OUT) if prefixes[2] else None
    state = named(prefixes[0], backbone) | named(prefixes[1], projector)
    state |= named(prefixes[2], predictor) if predictor else {}
    if prefixes[3]:
        state |= {f"{prefixes[3]}{k}": v * 2 for k, v in backbone.state_dict().items()}
        state |= {f"{prefixes[4]}{k}": v * 2 for k, v in projector.state_dict().items()}
    return {f"module.{k}": v for k, v in state.items()}, backbone, projector, predictor


@pytest.mark.parametrize("form", FORMS)
def test_heads_are_taken_and_give_what_they_gave(form, tmp_path):
    objective, settings = FORMS[form][:2]
    state, backbone, projector, predictor = checkpoint(form)
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    model, momentum = model_for(objective, **settings)
    loaded = load_backbone(model.backbone, tmp_path / "w.pth")
    taken = take_heads(model, momentum, loaded)
    assert taken is not None and "own heads were taken" in taken.notes[0] and "tensors outside" in loaded.notes[-1]
    assert loaded.left_out(taken.prefixes) == [], "what was taken is not said to be left out"
    images = images_for(RESNET18)
    with torch.no_grad():
        found, embedding = model(images), backbone(images)
        torch.testing.assert_close(found.projection, projector(embedding), rtol=1e-4, atol=1e-5)
        if predictor is not None:
            torch.testing.assert_close(found.output, predictor(projector(embedding)), rtol=1e-4, atol=1e-5)
    online, moving = model.backbone.state_dict()["bn1.weight"], momentum.model.backbone.state_dict()["bn1.weight"]
    assert torch.equal(moving, online * (2 if FORMS[form][6] else 1))


@pytest.mark.parametrize("change", ["hidden", "norm", "two", "none"])
def test_heads_that_do_not_fit_or_are_not_one_are_left(change, tmp_path):
    state, *_ = checkpoint("moco v2")
    settings = {"head_norm": change == "norm"} | ({"hidden_dim": HIDDEN + 1} if change == "hidden" else {})
    if change == "two":
        state |= {k.replace("encoder_q.fc", "other"): v for k, v in state.items() if "encoder_q.fc" in k}
    if change == "none":
        state = {k: v for k, v in state.items() if ".fc." not in k}
    torch.save(state, tmp_path / "w.pth")
    model, momentum = model_for("moco", **settings)
    loaded = load_backbone(model.backbone, tmp_path / "w.pth")
    before = {k: v.clone() for k, v in model.projector.state_dict().items()}
    assert take_heads(model, momentum, loaded) is None
    assert all(torch.equal(v, before[k]) for k, v in model.projector.state_dict().items())
    hints = other_heads(loaded, E)
    assert hints == [] if change == "none" else f"{E}-{HIDDEN}-{OUT} without BatchNorm" in hints[0]


# -- mean and std ----------------------------------------------------------------------------------------------------

COLOUR = ["data.holdout_source=digits", "encoder.in_chans=3", "encoder.args={}", "encoder.embed_dim=512"]


@pytest.mark.parametrize(
    ("name", "content", "mean"),
    [
        ("config.json", '{"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}', (0.1, 0.2, 0.3)),
        ("config.json", '{"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}', (0.1, 0.2, 0.3)),
        ("preprocessor_config.json", '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}', (0.1, 0.2, 0.3)),
        ("config.json", '{"pretrained_cfg": {"mean": [0.1], "std": [0.4]}}', None),
        ("config.json", '{"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0]}', None),
        ("config.json", "{" * 100_000, None),
        ("other.json", '{"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}', None),
    ],
)
def test_mean_and_std_are_read_beside_the_checkpoint_or_required(name, content, mean, tmp_path):
    (tmp_path / "w.pth").write_bytes(b"weights")
    (tmp_path / name).write_text(content)
    asked = [f"encoder.checkpoint={tmp_path / 'w.pth'}", *COLOUR]
    if mean is None:
        with pytest.raises(ConfigError, match="without encoder.mean and encoder.std.*set both to what it was trained"):
            load_config("digits", None, asked)
    else:
        assert load_config("digits", None, asked).encoder.mean == mean
    given = load_config("digits", None, [*asked, "encoder.mean=[0.5,0.5,0.5]", "encoder.std=[0.5,0.5,0.5]"])
    assert given.encoder.mean == (0.5, 0.5, 0.5)


def test_a_recipe_does_not_know_how_a_checkpoint_sees_its_images(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"weights")
    asked = ["data.root=.", "data.holdout_root=.", f"encoder.checkpoint={tmp_path / 'w.pth'}"]
    with pytest.raises(ConfigError, match="without encoder.mean and encoder.std"):
        load_config("photos_64", None, asked)
    (tmp_path / "config.json").write_text('{"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.9}')
    encoder = load_config("photos_64", None, asked).encoder
    assert (encoder.mean, encoder.crop_pct, encoder.interpolation) == ((0.1, 0.2, 0.3), 0.9, None)


def test_a_published_file_is_known_by_its_name_and_digest(tmp_path, monkeypatch):
    path = tmp_path / "resnet18-f37072fd.pth"
    path.write_bytes(b"not these weights")
    asked = [f"encoder.checkpoint={path}", *COLOUR]
    with pytest.raises(ConfigError, match="without encoder.mean"):
        load_config("digits", None, asked)
    monkeypatch.setattr("distunlearn.config.preprocessing.file_sha256", lambda _: "f37072fd" + 56 * "0")
    encoder = load_config("digits", None, asked).encoder
    assert (encoder.mean, encoder.crop_pct) == ((0.485, 0.456, 0.406), 0.875)


@pytest.mark.parametrize(
    ("name", "content", "crop"),
    [
        ("config.json", {"pretrained_cfg": {"crop_pct": 0.9, "interpolation": "bicubic"}}, (0.9, "bicubic")),
        (
            "preprocessor_config.json",
            {"do_center_crop": True, "size": {"shortest_edge": 256}, "crop_size": {"height": 224}, "resample": 3},
            (0.875, "bicubic"),
        ),
        ("preprocessor_config.json", {"size": {"height": 224, "width": 224}, "resample": 2}, (None, "bilinear")),
        ("config.json", {"crop_pct": 1.5, "interpolation": "random"}, (None, None)),
    ],
)
def test_the_evaluation_crop_is_read_beside_the_checkpoint(name, content, crop, tmp_path):
    (tmp_path / "w.pth").write_bytes(b"weights")
    (tmp_path / name).write_text(json.dumps(content))
    statistics = ["encoder.mean=[0.5,0.5,0.5]", "encoder.std=[0.5,0.5,0.5]"]
    asked = [f"encoder.checkpoint={tmp_path / 'w.pth'}", *COLOUR, *statistics]
    encoder = load_config("digits", None, asked).encoder
    assert (encoder.crop_pct, encoder.interpolation) == crop
    own = load_config("digits", None, [*asked, "encoder.crop_pct=0.7"]).encoder
    assert own.crop_pct == 0.7
