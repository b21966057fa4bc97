"""Which encoder is in a checkpoint: what is recognised in every form of file embeds as its source does."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from checkpoint_forms import ENDINGS, FORMS, SIDE, VIT, make_sources, z
from torch import nn

from distunlearn.encoders.backbone import create_backbone
from distunlearn.encoders.recognise import recognise
from distunlearn.encoders.weights import load_backbone
from distunlearn.errors import ConfigError


@pytest.fixture(scope="module")
def sources():
    return make_sources()


@pytest.mark.parametrize("form", [name for name in FORMS if name not in ("omegaconf", "lightning hyperparameters")])
def test_what_is_recognised_embeds_as_its_source(form, sources, tmp_path):
    """By names and shapes alone; that a ViT has two heads is told by a config.json, as Hugging Face writes them."""
    name, hold = FORMS[form]
    source, path = sources[name], tmp_path / ENDINGS.get(form, "w.pth")
    torch.save(hold(source.backbone), path)
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": VIT["num_heads"]}))
    found = recognise(path, small=True)
    backbone = create_backbone(found.encoder).eval()
    load_backbone(backbone, path)
    images = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = backbone(images), source.embed(source.module, images)
    # A file does not say which GELU a CLIP has: OpenAI's is told from others by nobody.
    assert nn.functional.cosine_similarity(ours, theirs).min() >= (0.99 if "hf clip" in name else 0.9999)
    assert not found.doubts and found.encoder.image_size == SIDE and found.embed_dim == theirs.shape[1]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("resnet18", 224), ("resnet50", 224), ("wide_resnet50_2", 224), ("vit_tiny_patch16_224", 224),
        ("vit_small_patch14_dinov2", 518), ("vit_small_patch16_224.img_size=96", 96),
    ],
)  # fmt: skip
def test_published_shapes_are_known_by_timms_name(model, said, tmp_path):
    name, _, size = model.partition(".img_size=")
    state = timm.create_model(name, num_classes=7, **({"img_size": int(size)} if size else {})).state_dict()
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "w.pth")
    found = recognise(tmp_path / "w.pth")
    assert (found.encoder.name, found.encoder.args, found.encoder.image_size) == (name, {}, said)
    assert found.sized == ("vit" in name) and found.objective == {"name": "supervised"}


def test_another_model_is_taken_by_the_name_in_the_file_beside_it_or_given(tmp_path):
    state = timm.create_model("convnext_atto", num_classes=0).state_dict()
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="no encoder that is recognised.*say which with --encoder"):
        recognise(tmp_path / "w.pth")
    assert recognise(tmp_path / "w.pth", "convnext_atto").encoder.name == "convnext_atto"
    with pytest.raises(ConfigError, match="convnext_femto lacks"):
        recognise(tmp_path / "w.pth", "convnext_femto")
    torch.save({"arch": "convnext_atto", "state_dict": state}, tmp_path / "arch.pth")
    assert recognise(tmp_path / "arch.pth").encoder.name == "convnext_atto"
    config = {"architecture": "convnext_atto", "pretrained_cfg": {"input_size": [3, 288, 288]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = recognise(tmp_path / "w.pth")
    assert (found.encoder.name, found.encoder.image_size, found.sized) == ("convnext_atto", 288, True)


def test_the_number_of_heads_is_doubted_where_nothing_tells_it(sources, tmp_path):
    torch.save(sources["vit"].backbone, tmp_path / "w.pth")
    found = recognise(tmp_path / "w.pth")
    assert "num_heads" in found.doubts[0] and found.encoder.args["num_heads"] == 1


HEAD = {"0.weight": z(48, 32), "2.weight": z(16, 48)}
NORMED = {"0.weight": z(48, 32), "1.running_mean": z(48), "1.running_var": z(48), "3.weight": z(16, 48)}
SHAPE = {"hidden_dim": 48, "output_dim": 16, "head_layers": 2}
# what stands beside a backbone, the objective that it speaks for, and another loss
TRAININGS = {
    "moco": ("encoder_q.", {"encoder_q.fc.": HEAD, "": {"queue": z(16, 256)}},
             {"name": "moco", "queue_size": 256, **SHAPE, "head_norm": False}, None),
    "simclr": ("backbone.", {"projection_head.layers.": NORMED}, {"name": "simclr", **SHAPE, "head_norm": True}, None),
    "byol": ("online_encoder.net.", {"online_encoder.projector.net.": NORMED,
             "online_predictor.net.": {"0.weight": z(48, 16), "3.weight": z(16, 48)}},
             {"name": "byol", **SHAPE, "head_norm": True}, None),
    "simsiam": ("encoder.", {"encoder.fc.": NORMED, "predictor.": {"0.weight": z(8, 16), "3.weight": z(16, 8)}},
                {"name": "byol", **SHAPE, "head_norm": True}, "simsiam"),
    "supervised": ("", {"fc.": {"weight": z(10, 32)}}, {"name": "supervised"}, None),
    "dino": ("teacher.backbone.", {"teacher.dino_head.mlp.": HEAD}, {}, "dino"),
    "nothing": ("", {}, {}, None),
}  # fmt: skip


@pytest.mark.parametrize("training", TRAININGS)
def test_how_it_was_trained_is_told_by_what_stands_beside_the_backbone(training, sources, tmp_path):
    prefix, beside, objective, other = TRAININGS[training]
    state = {f"{prefix}{name}": value for name, value in sources["resnet"].backbone.items()}
    state |= {f"{start}{name}": value for start, part in beside.items() for name, value in part.items()}
    torch.save({"state_dict": state, "epoch": 17}, tmp_path / "w.pth")
    found = recognise(tmp_path / "w.pth")
    assert (found.objective, found.trained_with, found.epochs) == (objective, other, 17)
