"""A ResNet-18 of torchvision in files as training scripts write them, for which only `encoder.checkpoint` is set."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor

from distunlearn.cli.main import main
from distunlearn.config.schema import EncoderConfig
from distunlearn.encoders.backbone import create_backbone
from distunlearn.encoders.weights import load_checkpoint
from distunlearn.errors import EncoderError

State = dict[str, Tensor]
ENCODER = EncoderConfig(name="resnet18", image_size=32, in_chans=3, stem="standard", args={}, embed_dim=512)
SMALL = [
    "encoder.name=resnet18", "encoder.stem=standard", "encoder.args={}", "encoder.embed_dim=512", "encoder.in_chans=3",
    "encoder.mean=[0.485,0.456,0.406]", "encoder.std=[0.229,0.224,0.225]", "data.source=imagefolder", "data.forget=20",
    "data.holdout=30", "data.calibration=20", "data.third_party=20", "data.third_party_audit=10", "pretrain.batch=20",
    "unlearn.steps=3", "unlearn.retain_batch=20", "unlearn.forget_batch=10", "unlearn.third_party_batch=10",
]  # fmt: skip


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18()


@pytest.fixture(scope="module")
def backbone(theirs) -> State:
    return {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}


def z(*shape: int) -> Tensor:
    return torch.randn(*shape)


def under(prefix: str, state: State) -> State:
    return {prefix + name: value.clone() for name, value in state.items()}


def sequential(model: torch.nn.Module) -> State:
    return torch.nn.Sequential(*list(model.children())[:-1]).state_dict()


FILES: dict[str, Callable[[State, torch.nn.Module], object]] = {
    "plain.pth": lambda s, _: s,
    "moco.pth.tar": lambda s, _: {"state_dict": {
        **under("module.encoder_q.", s), **under("module.encoder_k.", s), "module.queue": z(8, 9)}, "epoch": 1},
    "solo_momentum.pth": lambda s, _: {"state_dict": {
        **under("backbone.", s), **under("momentum_backbone.", s), "projector.0.weight": z(8, 512)}},
    "lightly_momentum.pth": lambda s, _: {"state_dict": {
        **under("backbone.", s), **under("backbone_momentum.", s), "projection_head.layers.0.weight": z(8, 512)}},
    "lightly_teacher.pth": lambda s, _: {"state_dict": {
        **under("student_backbone.", s), **under("teacher_backbone.", s), "student_head.layers.0.weight": z(8, 512)}},
    "sequential.pth": lambda s, m: {"state_dict": under("backbone.", sequential(m))},
    "barlow.pth": lambda s, _: {"model": {
        **under("module.backbone.", s), "module.projector.0.weight": z(8, 512), "module.bn.running_mean": z(8)}},
    "dinov2_teacher.pth": lambda s, _: {"teacher": {**under("backbone.", s), "dino_head.mlp.0.weight": z(4, 4)}},
    "dino_args.pth": lambda s, _: {
        "student": under("module.backbone.", s), "teacher": under("backbone.", s),
        "args": argparse.Namespace(arch="resnet18")},
    "mmpretrain.pth": lambda s, _: {"state_dict": {
        **under("backbone.", s), "neck.fc.weight": z(4, 4), "head.fc.weight": z(4, 4)}},
    "openclip_timm.pt": lambda s, _: {"state_dict": {
        **under("module.visual.trunk.", s), "module.logit_scale": torch.tensor(1.0),
        "module.token_embedding.weight": z(9, 8)}},
    "fsdp.pth": lambda s, _: under("_fsdp_wrapped_module.", s),
    "lightning.ckpt": lambda s, _: {"state_dict": under("backbone.", s)},
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_the_whole_backbone_is_taken_whatever_stands_beside_it(name, theirs, backbone, tmp_path):
    torch.save(FILES[name](backbone, theirs), tmp_path / name)
    model = create_backbone(ENCODER)
    load_checkpoint(model, EncoderConfig(**{**vars(ENCODER), "checkpoint": str(tmp_path / name)}))
    assert all(torch.equal(value, backbone[k]) for k, value in model.state_dict().items())


def test_a_plan_says_what_it_took_and_refuses_unnamed_non_members(theirs, backbone, tmp_path, capsys):
    torch.save(FILES["moco.pth.tar"](backbone, theirs), tmp_path / "moco.pth.tar")
    rng = np.random.default_rng(0)
    for folder, count in (("base", 100), ("unseen", 80)):
        for number in range(count):
            place = tmp_path / folder / f"class{number % 3}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(place / f"{number:04d}.png")
    asked = [f"encoder.checkpoint={tmp_path / 'moco.pth.tar'}", f"data.root={tmp_path / 'base'}", *SMALL]
    plan = ["plan", "digits", *(part for value in asked for part in ("--set", value))]
    assert main([*plan, "--set", "data.members=50"]) == 2
    assert "data.holdout_root" in capsys.readouterr().err
    assert main([*plan, "--set", "data.members=100", "--set", f"data.holdout_root={tmp_path / 'unseen'}"]) == 0
    said = capsys.readouterr().out
    assert "read from below state_dict.module.encoder_q in" in said and "module.queue" in said


def test_a_file_of_a_smaller_model_is_refused_by_what_differs(theirs, backbone, tmp_path):
    torch.save(FILES["moco.pth.tar"](backbone, theirs), tmp_path / "moco.pth.tar")
    larger = EncoderConfig(**{**vars(ENCODER), "name": "resnet50", "checkpoint": str(tmp_path / "moco.pth.tar")})
    with pytest.raises(EncoderError, match=r"below state_dict.module.encoder_q in.*missing.*set encoder.name"):
        load_checkpoint(create_backbone(EncoderConfig(**{**vars(larger), "embed_dim": 2048})), larger)
