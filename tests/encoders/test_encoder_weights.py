"""Checkpoints of other programs: what is read, how it is named, and what is refused without harm."""

from __future__ import annotations

import json
import os
import resource
import struct
from dataclasses import replace

import pytest
import torch
import torchvision
from encoder_configs import ENCODERS, RESNET18, images_for, run_config
from safetensors.torch import save_file

from distunlearn.config.schema import EncoderConfig
from distunlearn.encoders.backbone import create_backbone
from distunlearn.encoders.model import MomentumEncoder, build_model
from distunlearn.encoders.weights import check_finite, load_backbone
from distunlearn.errors import EncoderError, NumericsError


def backbone_of(encoder=RESNET18, seed=0):
    return build_model(run_config(encoder, seed=seed), None).backbone


def plain_state(backbone):
    return {key: value.detach().clone() for key, value in backbone.state_dict().items()}


def differs(backbone, state):
    return [key for key, value in backbone.state_dict().items() if not torch.equal(value, state[key])]


@pytest.fixture
def source():
    """Weights to be loaded; BatchNorm statistics and zero-initialised weights made distinctive."""
    state = plain_state(backbone_of(seed=1))
    generator = torch.Generator().manual_seed(0)
    return {k: v + torch.rand(v.shape, generator=generator) if v.is_floating_point() else v for k, v in state.items()}


def refused(path, words, backbone=None, error=EncoderError, **options):
    """The file is refused in one line, and no weight has changed."""
    backbone = backbone or backbone_of()
    before = plain_state(backbone)
    with pytest.raises(error, match=words) as caught:
        load_backbone(backbone, path, **options)
    assert "\n" not in str(caught.value)
    assert differs(backbone, before) == []


# --- formats ---


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin", ".PTH"])
def test_every_format_is_read_exactly(tmp_path, source, suffix):
    path = tmp_path / f"weights{suffix}"
    save_file(source, path) if suffix == ".safetensors" else torch.save(source, path)
    backbone = backbone_of()
    assert differs(backbone, source)
    assert load_backbone(backbone, path).notes == []
    assert differs(backbone, source) == []


class Evil:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path, source, suffix, legacy):
    marker, path = tmp_path / "was-here", tmp_path / f"weights{suffix}"
    torch.save({**source, "extra": Evil(marker)}, path, _use_new_zipfile_serialization=not legacy)
    refused(path, r"Python objects besides tensors.*never loaded")
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the file was no danger, so the test proved nothing"


def header_file(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def test_damaged_safetensors_are_refused_in_bounded_memory(tmp_path, source):
    good = tmp_path / "good.safetensors"
    save_file(source, good)
    raw = good.read_bytes()
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    twice = b'{"a":%s,"a":%s}' % ((json.dumps(entry).encode(),) * 2)
    huge = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    damaged = {
        "truncated": raw[:-5],
        "header only": raw[:200],
        "empty": b"",
        "extra": raw + b"tail",
        "text": b"hello" * 20,
        "length": struct.pack("<Q", 2**60) + raw[8:],
    }
    files = []
    for name, content in damaged.items():
        files.append(tmp_path / f"{name}.safetensors")
        files[-1].write_bytes(content)
    backwards = {"a": {**entry, "data_offsets": [8, 4]}}
    for name, header in {"huge": huge, "twice": twice, "no json": b"{{{{", "backwards": backwards}.items():
        files.append(tmp_path / f"{name}.safetensors")
        header_file(files[-1], header, b"\0" * 4)
    backbone = backbone_of()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in files:
        refused(path, r"is no complete safetensors file.*copy the file again", backbone)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 128 << 10, "KiB; one of the headers promises 4 TiB"
    assert load_backbone(backbone, good).notes == []


def test_other_files_are_refused(tmp_path, source):
    refused(tmp_path / "missing.pth", r"is not a file.*check the path")
    (tmp_path / "folder.pth").mkdir()
    refused(tmp_path / "folder.pth", r"is not a file")
    for name, content, words in (
        ("text.pth", b"hello, world" * 9, r"cannot be read|damaged"),
        ("empty.pt", b"", r"cannot be read|damaged"),
        ("weights.onnx", b"x", r"cannot be read|damaged"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, words)
    torch.save(source, tmp_path / "cut.pth")
    raw = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(raw[: len(raw) // 2])
    refused(tmp_path / "cut.pth", r"no complete archive of weights.*copy it again")
    torch.save([1, 2], tmp_path / "list.pth")
    refused(tmp_path / "list.pth", r"holds a list, expected a state dict")
    torch.save({"epoch": 3, "names": ["a"]}, tmp_path / "none.pth")
    refused(tmp_path / "none.pth", r"holds no tensors by names")


# --- names ---


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "backbone.",
        "module.encoder_q.",
        "module.base_encoder.",
        "model.backbone.",
        "encoder.",
        "momentum_encoder.",
        "online_encoder.",
    ],
)
def test_known_prefixes_are_stripped_and_logged(tmp_path, source, prefix):
    torch.save({f"{prefix}{key}": value for key, value in source.items()}, tmp_path / "w.pth")
    backbone = backbone_of()
    assert load_backbone(backbone, tmp_path / "w.pth").notes == [
        f"The backbone was read from below {prefix.replace('_orig_mod.', '')[:-1]} in the checkpoint."
    ] * (prefix != "_orig_mod.")
    assert differs(backbone, source) == []


@pytest.mark.parametrize("container", ["state_dict", "model", "model_state", "teacher", "student", "model.state_dict"])
def test_weights_are_found_under_usual_keys(tmp_path, source, container):
    content = source
    for name in reversed(container.split(".")):
        content = {"epoch": 7, "optimizer": {"state": {0: torch.zeros(3)}}, name: content}
    torch.save(content, tmp_path / "w.pth")
    backbone = backbone_of()
    assert load_backbone(backbone, tmp_path / "w.pth").notes == [
        f"The backbone was read from below {container} in the checkpoint."
    ]
    assert differs(backbone, source) == []


def test_the_online_encoder_of_a_moco_checkpoint_is_taken_and_the_rest_left_out(tmp_path, source):
    other = {key: value + 1 for key, value in source.items()}
    state = {f"module.encoder_k.{key}": value for key, value in other.items()}
    state |= {f"module.encoder_q.{key}": value for key, value in source.items()}
    heads = {"module.encoder_q.fc.0.weight": torch.ones(8, 32), "module.encoder_q.fc.2.bias": torch.ones(8)}
    state |= heads | {"module.queue": torch.ones(8, 4), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    torch.save({"state_dict": state}, tmp_path / "moco.pth")
    backbone = backbone_of()
    notes = load_backbone(backbone, tmp_path / "moco.pth").notes
    assert differs(backbone, source) == []
    assert notes[0] == "The backbone was read from below state_dict.module.encoder_q in the checkpoint."
    assert notes[1].startswith("Copies below state_dict.module.encoder_k were not taken; encoder.prefix chooses")
    assert notes[2].startswith("The backbone fits; 4 tensors outside it were left out: state_dict.module.queue,")
    load_backbone(backbone, tmp_path / "moco.pth", prefix="encoder_k")
    assert differs(backbone, other) == []
    refused(tmp_path / "moco.pth", "holds no tensors under encoder.prefix=encoder", backbone, prefix="encoder")


def test_a_model_of_this_package_is_read_like_any_other(tmp_path):
    model = build_model(run_config(objective="byol", seed=1), None)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    torch.save(MomentumEncoder(model).state_dict(), tmp_path / "ema.pt")
    for name in ("w.pth", "ema.pt"):
        backbone = backbone_of()
        notes = load_backbone(backbone, tmp_path / name).notes
        assert differs(backbone, plain_state(model.backbone)) == []
        assert "below backbone in" in notes[0] and "projector.last.weight" in notes[1]


@pytest.mark.parametrize("head", ["fc", "head", "heads.head", "classifier", "projector.0"])
def test_heads_are_dropped_and_logged(tmp_path, source, head):
    torch.save({**source, f"{head}.weight": torch.ones(10, 32), f"{head}.bias": torch.ones(10)}, tmp_path / "w.pth")
    backbone = backbone_of()
    notes = load_backbone(backbone, tmp_path / "w.pth").notes
    assert notes == [f"The backbone fits; 2 tensors outside it were left out: {head}.weight, {head}.bias."]
    assert differs(backbone, source) == []


def test_what_belongs_inside_or_is_missing_is_refused_with_the_first_ten(tmp_path, source):
    """A tensor of a larger model is fatal: left out in silence, the encoder would be another function."""
    path = tmp_path / "w.pth"
    torch.save({**source, "adapter.weight": torch.ones(2, 2)}, path)
    assert "1 tensor outside it was left out: adapter.weight" in load_backbone(backbone_of(), path).notes[0]
    for prefix in ("", "backbone."):
        larger = {**source, "layer1.7.conv1.weight": torch.ones(2, 2)}
        torch.save({f"{prefix}{k}": v for k, v in larger.items()}, path)
        refused(path, r"in 1 places \(unexpected layer1.7.conv1.weight\).*larger model, or encoder.ignore")
        load_backbone(backbone_of(), path, ignore=["*layer1.7.*"])
    missing = dict(source)
    del missing["bn1.weight"]
    torch.save(missing, path)
    refused(path, r"in 1 places \(missing bn1.weight\)")
    torch.save({**source, "bn1.weight": torch.ones(9)}, path)
    refused(path, r"\(bn1.weight is \[9\] instead of \[8\]\)")
    torch.save({**source, "bn1.weight": torch.ones(8, dtype=torch.int8)}, path)
    refused(path, r"\(bn1.weight is torch.int8 instead of torch.float32\)")
    torch.save({**source, "bn1.weight": torch.ones(8, device="meta")}, path)
    refused(path, r"\(bn1.weight is no plain tensor\)")
    torch.save({"q\x1b[31m\n": torch.ones(1), **{f"x{i}": torch.ones(1) for i in range(20)}}, path)
    refused(path, r"in \d+ places \((missing [^;]*; ){10}\d+ more\).*begins with q\\x1b\[31m\\n, x0, x1\)")


def test_counters_of_old_checkpoints_may_be_missing(tmp_path, source):
    torch.save({k: v for k, v in source.items() if "num_batches" not in k}, tmp_path / "w.pth")
    backbone = backbone_of()
    assert "BatchNorm counters" in load_backbone(backbone, tmp_path / "w.pth").notes[0]
    assert differs(backbone, source) == []


# --- torchvision ---


def test_torchvisions_resnet_gives_the_same_embedding(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    encoder = EncoderConfig(name="resnet18", image_size=64, in_chans=3, stem="standard")
    ours = create_backbone(encoder).eval()
    images = images_for(encoder, 2)
    theirs.fc = torch.nn.Identity()
    with torch.no_grad():
        expected, before = theirs(images), ours(images)
        notes = load_backbone(ours, tmp_path / "w.pth").notes
        torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-5)
    assert (before - expected).abs().max() > 1e-2
    assert notes == ["The backbone fits; 2 tensors outside it were left out: fc.weight, fc.bias."]


@pytest.mark.parametrize("prefix", ["", "module.backbone."])
def test_torchvisions_vit_gives_the_same_embedding(tmp_path, prefix):
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=24, mlp_dim=96, num_classes=7
    ).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # zero biases and unit gains would hide a wrong pairing
        for weight in theirs.parameters():
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
    torch.save({f"{prefix}{k}": v for k, v in theirs.state_dict().items()}, tmp_path / "w.pth")
    encoder = replace(ENCODERS["vit token"], args={"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2})
    ours, images = create_backbone(encoder).eval(), images_for(encoder)
    notes = load_backbone(ours, tmp_path / "w.pth").notes
    theirs.heads = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)
    assert "Its names, of torchvision's ViT, were mapped to timm's." in notes
    assert any("heads.head.weight" in note for note in notes)


# --- values ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, source, value):
    for key in ("bn1.weight", "layer1.0.conv1.weight"):
        source[key].view(-1)[0] = value
    save_file(source, tmp_path / "w.safetensors")
    words = r"2 of \d+ tensors hold NaN or infinite values \(bn1.weight, layer1.0.conv1.weight\)"
    refused(tmp_path / "w.safetensors", words, error=NumericsError)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted_to_fp32(tmp_path, source, dtype):
    half = {key: value.to(dtype) if value.is_floating_point() else value for key, value in source.items()}
    torch.save(half, tmp_path / "w.pth")
    backbone = backbone_of()
    notes = load_backbone(backbone, tmp_path / "w.pth").notes
    assert notes == [f"Weights in {str(dtype)[6:]} were converted to the encoder's own type."]
    assert {t.dtype for t in backbone.state_dict().values()} == {torch.float32, torch.int64}
    assert (
        differs(
            backbone,
            {key: value.float() for key, value in half.items()}
            | {key: value for key, value in half.items() if not value.is_floating_point()},
        )
        == []
    )


@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 1e6), (torch.float64, 1e300)])
def test_an_overflow_is_found_on_either_side_of_the_conversion(tmp_path, source, dtype, large):
    source = {key: value.double() if value.is_floating_point() else value for key, value in source.items()}
    source["bn1.weight"][3] = large
    torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in source.items()}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", r"\(bn1.weight\)", error=NumericsError)


def test_weights_of_zeros_are_refused_and_zero_gains_are_not(tmp_path, source):
    torch.save({key: torch.zeros_like(value) for key, value in source.items()}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", r"weights in .* are all zero \(conv1.0.weight, .* more\)")
    source["layer1.0.conv2.weight"].zero_()
    torch.save(source, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", r"1 weights in .* are all zero \(layer1.0.conv2.weight\)")
    fresh = plain_state(backbone_of(seed=1))
    assert not fresh["layer1.0.bn2.weight"].any(), "a fresh ResNet has gains of zero"
    torch.save(fresh, tmp_path / "w.pth")
    assert load_backbone(backbone_of(), tmp_path / "w.pth").notes == []


@pytest.mark.parametrize("layer", ["blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight"])
def test_a_linear_layer_of_zeros_is_refused(tmp_path, layer):
    """The only weights that a vision transformer has besides its patch embedding."""
    encoder = ENCODERS["vit token"]
    state = plain_state(create_backbone(encoder))
    torch.save(state, tmp_path / "whole.pth")
    load_backbone(create_backbone(encoder), tmp_path / "whole.pth")  # control: biases of zeros are no offence
    torch.save({**state, layer: torch.zeros_like(state[layer])}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", rf"1 weights in .* are all zero \({layer}\)", create_backbone(encoder))


def test_check_finite_names_at_most_five():
    state = {f"w{i}": torch.tensor([float("nan")]) for i in range(8)} | {"n": torch.tensor([1])}
    with pytest.raises(NumericsError, match=r"8 of 9 tensors .*\(w0, w1, w2, w3, w4 and 3 more\)"):
        check_finite(state)
    check_finite({"w": torch.ones(2), "n": torch.tensor([1])})


# --- channels ---


def test_a_colour_checkpoint_fits_grey_images_only_when_asked_to(tmp_path):
    colour = replace(RESNET18, in_chans=3)
    theirs = backbone_of(colour, 1).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    refused(tmp_path / "w.pth", r"conv1.0.weight is \[4, 3, 3, 3\] instead of \[4, 1, 3, 3\]")
    ours, images = backbone_of().eval(), images_for(RESNET18)
    notes = load_backbone(ours, tmp_path / "w.pth", in_chans=1).notes
    assert notes == ["The first convolution (conv1.0.weight) was summed over its 3 input channels."]
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images.expand(-1, 3, -1, -1)), rtol=1e-5, atol=1e-5)
    refused(tmp_path / "w.pth", r"does not fit", backbone_of(replace(RESNET18, stem="standard")), in_chans=1)
