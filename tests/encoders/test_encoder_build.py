"""Which encoders can be built, with which weights, and what is refused before any training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from encoder_configs import AVERAGED, CLASSES, ENCODERS, NARROW, OBJECTIVES, RESNET18, VIT, images_for, run_config
from families import FAMILIES, family

from distunlearn.config.schema import EncoderConfig
from distunlearn.encoders import list_encoders
from distunlearn.encoders.backbone import create_args, create_backbone, embed_dim
from distunlearn.encoders.export import export_backbone
from distunlearn.encoders.model import batchnorm_mode, build_model
from distunlearn.errors import EncoderError


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two modules hold the same tensors, bit by bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- names ---


def test_the_list_holds_timms_models_in_order():
    names = list_encoders()
    assert names == sorted(set(names)) and set(names) < set(timm.list_models())
    for name in ("resnet18", "vit_small_patch16_224", "convnext_tiny", "efficientnet_b0", "swin_s3_tiny_224"):
        assert name in names
    assert "vit_small_resnet26d_224" in timm.list_models() and "vit_small_resnet26d_224" not in names


@pytest.mark.parametrize("name", FAMILIES)
def test_any_family_embeds_and_is_exported(name, tmp_path):
    encoder = family(name)
    with torch.random.fork_rng(devices=[]):
        backbone = create_backbone(encoder)
        images = images_for(encoder)
        with torch.no_grad(), batchnorm_mode(backbone, "eval"):
            first, again = backbone(images), backbone(images)
        assert torch.equal(first, again)  # in training mode: nothing is dropped by chance
        assert first.shape == (4, embed_dim(backbone, encoder))
        export_backbone(backbone, encoder, tmp_path)
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(images), backbone.eval()(images))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet81", r"timm does not know.*did you mean.*resnet18"),
        ("vit_smal_patch16_224", r"did you mean.*vit_small_patch16_224"),
        ("qqqqqqqq", r"timm does not know.*distunlearn list encoders"),
        ("vit_small_resnet26d_224", r"timm downloads weights"),
        ("resnet50.a1_in1k", r"never downloaded.*encoder.name=resnet50,.*encoder.checkpoint"),
        ("hf-hub:timm/resnet50.a1_in1k", r"timm does not know"),
        ("local-dir:/tmp", r"timm does not know"),
        ("resnet18\x1b[31m\n", r"resnet18\\\\x1b"),
    ],
)
def test_a_wrong_name_is_refused_with_a_way_out(name, words):
    with pytest.raises(EncoderError, match=words) as caught:
        build_model(run_config(replace(RESNET18, name=name)), None)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


# --- arguments ---


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        (replace(RESNET18, args={**NARROW, "colour": "red"}), r"timm refuses.*colour=red.*unexpected keyword"),
        (replace(RESNET18, args={"channels": "wide"}), r"timm refuses.*channels=wide"),
        (replace(RESNET18, args={**NARROW, "global_pool": ""}), r"\[32, 1, 1\] per image"),
        (replace(RESNET18, args={**NARROW, "drop_path_rate": 0.1}), r"drop_path_rate is 0.1, expected 0"),
        (replace(RESNET18, args={"pretrained": True}), r"encoder.args.pretrained is set.*remove it"),
        (replace(RESNET18, args={"checkpoint_path": "x.pth"}), r"use encoder.checkpoint"),
        (replace(RESNET18, args={"in_chans": 3}), r"use encoder.in_chans"),
        (replace(RESNET18, args={"act_layer": torch.nn.ReLU}), r"what JSON cannot"),
        (replace(RESNET18, name="legacy_seresnet18", args={}), r"is deep.*none of timm.s ResNets"),
        (replace(RESNET18, embed_dim=512), r"embed_dim is 512, but .* 32 dimensions.*encoder.embed_dim=32"),
        (replace(ENCODERS["vit token"], stem="deep"), r"none of timm.s ResNets.*encoder.stem=standard"),
        (replace(ENCODERS["vit token"], image_size=33), r"image_size is 33, which the patches .*8 pixels.* not divide"),
        (replace(ENCODERS["vit token"], image_size=4), r"image_size is 4|at image size 4"),
        (replace(ENCODERS["vit token"], args={**VIT, "num_heads": 5}), r"timm refuses.*num_heads"),
        (replace(ENCODERS["vit token"], args={**VIT, "img_size": 64}), r"use encoder.image_size"),
    ],
)
def test_impossible_arguments_are_refused_at_build(encoder, words):
    with pytest.raises(EncoderError, match=words) as caught:
        build_model(run_config(encoder), None)
    assert "\n" not in str(caught.value)


def test_weights_that_take_no_part_are_refused(monkeypatch):
    """They would stop DDP at its second step."""
    create = timm.create_model

    def with_idle_weight(*names, **args):
        model = create(*names, **args)
        model.idle = torch.nn.Linear(2, 2, bias=False)
        return model

    monkeypatch.setattr(timm, "create_model", with_idle_weight)
    with pytest.raises(EncoderError, match=r"1 weights of resnet18 take no part in the embedding \(idle.weight\)"):
        build_model(run_config(), None)


def test_a_declared_embedding_size_that_is_right_is_accepted():
    assert build_model(run_config(replace(RESNET18, embed_dim=32)), None).backbone.num_features == 32


def test_stems():
    deep, standard = (create_backbone(replace(RESNET18, stem=stem)) for stem in ("deep", "standard"))
    assert [tuple(m.weight.shape) for m in deep.conv1 if isinstance(m, torch.nn.Conv2d)] == [
        (4, 1, 3, 3),
        (4, 4, 3, 3),
        (8, 4, 3, 3),
    ]
    assert tuple(standard.conv1.weight.shape) == (64, 1, 7, 7)
    assert create_args(replace(RESNET18, args={}))["stem_width"] == 32
    assert "stem_width" not in create_args(replace(RESNET18, stem="standard", args={}))


@pytest.mark.parametrize("name", ["resnet50", "vit_small_patch16_224", "vit_base_patch16_224"])
def test_full_sizes_build_at_32_pixels(name):
    vit = name.startswith("vit")
    args = {"patch_size": 8} if vit else {}
    encoder = EncoderConfig(name=name, image_size=32, stem="standard" if vit else "deep", args=args)
    model = build_model(run_config(encoder), None)
    size = {"resnet50": 2048, "vit_small_patch16_224": 384, "vit_base_patch16_224": 768}[name]
    with torch.no_grad():
        out = model.eval()(images_for(encoder, 2))
    assert out.embedding.shape == (2, size) and bool(torch.isfinite(out.output).all())


def test_dropout_that_a_model_has_by_default_is_switched_off():
    encoder = EncoderConfig(
        name="vit_relpos_small_patch16_224",
        image_size=32,
        in_chans=1,
        stem="standard",
        args={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
    )
    model, images = build_model(run_config(encoder), None).train(), images_for(encoder)
    assert torch.equal(model.backbone(images), model.backbone(images))
    theirs = timm.create_model(encoder.name, **create_args(encoder)).train()
    assert not torch.equal(theirs(images), theirs(images)), "without the switch chance would matter"


# --- weights ---


@pytest.mark.parametrize("name", ["resnet18 deep", "vit averaged"])
def test_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone(name):
    cfg = run_config(ENCODERS[name], "byol", seed=3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_model(cfg, None)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(first, build_model(cfg, None))
    other = build_model(replace(cfg, seed=4), None)
    for part in ("backbone", "projector", "predictor"):
        assert not same(getattr(first, part), getattr(other, part))


def test_a_failed_build_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    with pytest.raises(EncoderError):
        build_model(run_config(replace(RESNET18, embed_dim=99)), None)
    assert torch.equal(torch.get_rng_state(), before)


def test_all_objectives_share_the_backbone():
    models = {name: build_model(run_config(objective=name), CLASSES) for name in OBJECTIVES}
    assert all(same(model.backbone, models["simclr"].backbone) for model in models.values())
    assert same(models["byol"], models["mocov3"]) and same(models["simclr"], models["moco"])


def test_weights_are_timms_own_initialisation():
    """Not what the checks before training left: they use a twin that shares nothing with the model."""
    encoder = ENCODERS["vit averaged"]
    torch.manual_seed(5)
    ours = create_backbone(encoder)
    torch.manual_seed(5)
    theirs = timm.create_model(encoder.name, **create_args(encoder))
    assert same(ours, theirs)
    assert all(p.grad is None and p.device.type == "cpu" for p in ours.parameters())


def test_building_works_without_gradients_and_ignores_the_checkpoint():
    with torch.no_grad():
        model = build_model(run_config(replace(RESNET18, checkpoint="missing.pth")), None)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert same(model, build_model(run_config(), None))


def test_a_supervised_encoder_needs_the_number_of_classes():
    with pytest.raises(AssertionError, match="number of classes"):
        build_model(run_config(objective="supervised"), None)


def test_averaged_vits_need_no_class_token():
    assert (
        build_model(
            run_config(EncoderConfig(name="vit_tiny_patch16_224", in_chans=1, stem="standard", args=AVERAGED)), None
        ).backbone.cls_token
        is None
    )
