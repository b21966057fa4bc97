"""Checkpoints as people have them: every file that holds a whole backbone is taken, and embeds as its source does."""

from __future__ import annotations

import io
import json
import resource
import struct
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from checkpoint_forms import ENDINGS, FORMS, PLACES, SIDE, VIT, make_sources, z
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distunlearn.cli.main import main
from distunlearn.config.load import load_config
from distunlearn.encoders.weights import load_backbone
from distunlearn.errors import ConfigError, EncoderError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from photos import photo  # noqa: E402

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(-1, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(-1, 1, 1)


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """50 photos of the benchmarks' generator, in [0, 1]."""
    large = torch.from_numpy(np.stack([photo(seed, (96, 96)) for seed in range(50)])).permute(0, 3, 1, 2)
    return nn.functional.interpolate(large / 255, (SIDE, SIDE), mode="bilinear", antialias=True)


@pytest.fixture(scope="module")
def sources():
    return make_sources()


@pytest.fixture
def no_such_packages():
    """The packages of `settings_object` are gone when the file is read."""
    yield
    for place in PLACES.values():
        for i in range(place.count(".") + 1):
            sys.modules.pop(".".join(place.split(".")[: i + 1]), None)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_taken_and_embeds_like_its_source(form, sources, photos, tmp_path, no_such_packages):
    name, hold = FORMS[form]
    source = sources[name]
    path = tmp_path / ENDINGS.get(form, "w.pth")
    torch.save(hold(source.backbone), path)
    model = source.make()
    images = (photos - MEAN) / STD
    with torch.no_grad():
        before, theirs = model(images), source.embed(source.module, images)
        loaded = load_backbone(model, path)
        ours = model(images)
    assert nn.functional.cosine_similarity(ours, theirs).min() >= 0.9999
    assert nn.functional.cosine_similarity(before, theirs).min() < 0.99, "fresh weights do as well: nothing is shown"
    assert not loaded.reading.inside


def test_wrong_mean_and_std_are_noticed_by_the_measure_above(sources, photos):
    source = sources["vit"]
    with torch.no_grad():
        theirs, wrong = (source.embed(source.module, x) for x in ((photos - MEAN) / STD, photos * 2 - 1))
    assert nn.functional.cosine_similarity(theirs, wrong).min() < 0.9999


HUGGING_FACE = {
    "hf vit": "vit_tiny_patch16_224", "hf dinov2": "vit_small_patch14_dinov2", "hf resnet": "resnet18",
    "hf clip": "vit_base_patch32_clip_quickgelu_224",
}  # fmt: skip


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_a_folder_of_hugging_face_is_a_checkpoint_with_its_own_mean(name, sources, photos, tmp_path):
    source = sources[name]
    source.module.save_pretrained(tmp_path)
    pixels = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3], "do_center_crop": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    cfg = load_config("digits", None, [f"encoder.checkpoint={tmp_path}", "encoder.in_chans=3", "data.holdout_root=x"])
    assert cfg.encoder.checkpoint == str(tmp_path / "model.safetensors")
    images = (photos - torch.tensor(cfg.encoder.mean).view(-1, 1, 1)) / torch.tensor(cfg.encoder.std).view(-1, 1, 1)
    model = source.make()
    with torch.no_grad():
        loaded = load_backbone(model, cfg.encoder.checkpoint)
        cosines = nn.functional.cosine_similarity(model(images), source.embed(source.module, images))
    assert cosines.min() >= 0.9999 and tuple(cfg.encoder.std) == (0.2, 0.25, 0.3)
    assert not any("which GELU" in note for note in loaded.notes)


def test_another_gelu_than_the_configuration_says_is_refused(sources, tmp_path):
    sources["hf clip"].module.save_pretrained(tmp_path)
    other = timm.create_model("vit_base_patch32_clip_224", num_classes=0, pre_norm=True, **VIT)
    with pytest.raises(EncoderError, match="activation quick_gelu.*with quickgelu in its name"):
        load_backbone(other, tmp_path / "model.safetensors")


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder without model.safetensors"):
        load_config("digits", None, [f"encoder.checkpoint={tmp_path}", "data.holdout_root=x"])


@pytest.mark.parametrize("name", ["vit", "hf vit", "dinov2", "hf dinov2 registers", "open_clip"])
def test_position_embeddings_of_another_image_size_are_resampled_as_timm_does(name, sources, tmp_path):
    source = sources[name]
    torch.save(source.state, tmp_path / "w.pth")
    small, large = source.make(), source.make()
    large.set_input_size(img_size=2 * SIDE)
    load_backbone(small, tmp_path / "w.pth")
    load_backbone(large, tmp_path / "w.pth")
    tokens = small.pos_embed.shape[1] - 16
    expected = timm.layers.resample_abs_pos_embed(small.pos_embed, [8, 8], num_prefix_tokens=tokens)
    torch.testing.assert_close(large.pos_embed, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {k: v for k, v in s.items() if "layer4" not in k}, r"missing layer4.0.conv1.weight.*encoder.name"),
        (lambda s: {**s, "layer1.1.conv1.weight": z(8, 8, 3, 3)}, r"unexpected layer1.1.conv1.weight.*larger model"),
        (lambda s: {**s, "conv1.weight": z(64, 3, 3, 3)}, r"small stem for CIFAR.*distunlearn.encoders.cifar:resnet"),
        (lambda s: {f"x{i}": v for i, v in enumerate(s.values())}, r"none of its names is known.*encoder.prefix"),
        (lambda s: {"a": 1}, r"holds no tensors"),
    ],
)  # fmt: skip
def test_refusals_name_the_cause_and_what_to_do(change, words, sources, tmp_path):
    torch.save(change(sources["resnet"].backbone), tmp_path / "w.pth")
    with pytest.raises(EncoderError, match=words) as caught:
        load_backbone(sources["resnet"].make(), tmp_path / "w.pth")
    assert "\n" not in str(caught.value)


def test_a_whole_module_is_refused_by_the_name_of_its_class(sources, tmp_path):
    torch.save(sources["resnet"].module, tmp_path / "w.pth")
    with pytest.raises(EncoderError, match=r"\(timm.models.resnet.ResNet\), which could run code.*save a state_dict"):
        load_backbone(sources["resnet"].make(), tmp_path / "w.pth")


# -- hostile files ---------------------------------------------------------------------------------------------------


def nested_containers(path) -> None:
    inner: object = {"w": torch.ones(2)}
    for _ in range(100_000):
        inner = {"state_dict": inner}
    data = io.BytesIO()
    with zipfile.ZipFile(path, "w") as archive:  # torch.save recurses; the pickle is written by hand
        data.write(b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 100_000 + b"}" + b"s" * 100_000 + b".")
        archive.writestr("w/data.pkl", data.getvalue())
        archive.writestr("w/version", "3")


def shared_containers(path) -> None:
    level: dict = {"w": torch.ones(2)}
    for _ in range(40):
        level = {f"k{i}": level for i in range(30)}
    torch.save(level, path)


def chains_of_names(path) -> None:
    chain = "module." * 5_000
    torch.save({f"{chain}{i}": torch.ones(1) for i in range(100)}, path)


def million_names(path) -> None:
    entry = b'{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    raw = b"{" + b",".join(b'"w%d":' % i + entry % (4 * i, 4 * i + 4) for i in range(1_000_000)) + b"}"
    path.with_suffix(".safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)


def compressed_zeros(path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("w/data.pkl", "w") as file:
            for _ in range(300):
                file.write(bytes(4 << 20))


def long_pickle(path) -> None:
    path.write_bytes(b"\x80\x02" + b"N0" * 10_000_000 + b".")


def views_of_one_number(path) -> None:
    torch.save({"pos_embed": torch.ones(1).expand(1, 10**7, 32), "cls_token": torch.ones(1, 1, 32),
                "patch_embed.proj.weight": torch.ones(1).expand(32, 3, 10**4, 10**4)}, path)  # fmt: skip


def another_zip(path) -> None:
    """An archive that needs version 6.4 of the format, which Python's zipfile says it does not implement."""
    torch.save({"w": torch.ones(2)}, path)
    data = bytearray(path.read_bytes())
    at = data.find(b"PK\x01\x02")
    data[at + 6 : at + 8] = struct.pack("<H", 64)
    path.write_bytes(data)


HOSTILE = (
    nested_containers, shared_containers, chains_of_names, million_names, compressed_zeros, long_pickle,
    views_of_one_number, another_zip,
)  # fmt: skip


@pytest.mark.parametrize("make", HOSTILE)
def test_hostile_files_end_soon_and_in_little_memory(make, sources, tmp_path):
    path = tmp_path / "w.pth"
    make(path)
    model = sources["vit"].make()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(EncoderError) as caught:
        load_backbone(model, next(tmp_path.iterdir()))
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20, "KiB"
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 3_000


def test_stand_ins_run_nothing(tmp_path, sources):
    """A class of a package of settings is answered by a stand-in even where the real one would do something."""
    done = []
    module = types.ModuleType("omegaconf")
    module.trap = lambda *_: done.append(1)
    sys.modules["omegaconf"] = module

    class Trap:
        def __reduce__(self):
            return module.trap, ()

    module.trap.__module__, module.trap.__qualname__, module.trap.__name__ = "omegaconf", "trap", "trap"
    try:
        torch.save({**sources["resnet"].backbone, "extra": Trap()}, tmp_path / "w.pth")
        load_backbone(sources["resnet"].make(), tmp_path / "w.pth")
        assert not done
        torch.load(tmp_path / "w.pth", weights_only=False)
        assert done, "the file was no danger, so the test proved nothing"
    finally:
        del sys.modules["omegaconf"]


def test_safetensors_are_known_by_content(tmp_path, sources):
    save_file(sources["resnet"].backbone, tmp_path / "weights.dat")
    assert load_backbone(sources["resnet"].make(), tmp_path / "weights.dat").notes == []


def test_convert_writes_timms_names_and_refuses_what_does_not_fit(tmp_path, sources, capsys):
    source = sources["hf vit"]
    torch.save({f"vit.{k}": v for k, v in source.state.items()}, tmp_path / "hf.pth")
    args = json.dumps({k: v for k, v in VIT.items() if k != "img_size"})
    ask = ["convert", str(tmp_path / "hf.pth"), "--out", str(tmp_path / "timm.safetensors"), "--args", args]
    ask += ["--image-size", str(SIDE), "--name"]
    assert main([*ask, "vit_tiny_patch16_224"]) == 0 and "mapped to timm's" in capsys.readouterr().out
    written, expected = source.make(), source.make()
    written.load_state_dict(load_file(tmp_path / "timm.safetensors"))
    load_backbone(expected, tmp_path / "hf.pth")
    assert all(torch.equal(v, written.state_dict()[k]) for k, v in expected.state_dict().items())
    assert main([*ask, "vit_tiny_patch16_224", "--in-chans", "1", "--prefix", "bert"]) == 2
    assert "encoder.prefix=bert" in capsys.readouterr().err
