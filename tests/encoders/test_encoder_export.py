"""Exported folders load in a process that has timm and nothing of this package."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from encoder_configs import ENCODERS, RESNET18, images_for, run_config
from safetensors.torch import load_file

from distunlearn.encoders import export
from distunlearn.encoders.export import export_backbone
from distunlearn.encoders.model import build_model
from distunlearn.encoders.weights import load_backbone
from distunlearn.errors import NumericsError

RELOAD = """
import json, pathlib, sys
import timm, torch
from timm.data import resolve_data_config
root, result = pathlib.Path(sys.argv[1]), {}
for folder in sorted(p for p in root.iterdir() if p.is_dir()):
    case = torch.load(root / f"{folder.name}.pt", weights_only=True)
    with torch.no_grad():
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        fresh = timm.create_model(f"local-dir:{folder}").eval()
        equal = torch.equal(loaded(case["images"]), case["embedding"])
        control = torch.equal(fresh(case["images"]), case["embedding"])
    data = resolve_data_config({}, model=loaded)
    data = {key: data[key] for key in ("mean", "std", "input_size", "interpolation", "crop_pct")}
    result[folder.name] = {"equal": equal, "control": control, "data": data, "shape": list(case["embedding"].shape)}
assert not any(name.startswith("distunlearn") for name in sys.modules)
print(json.dumps(result))
"""


def trained_like(encoder, seed=0):
    """A backbone none of whose tensors has its initial value; the running statistics included."""
    backbone = build_model(run_config(encoder, seed=seed), None).backbone
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in backbone.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.02 * torch.rand(tensor.shape, generator=generator) + 0.01)
    return backbone.eval()


def test_a_fresh_process_gets_bit_equal_embeddings(tmp_path):
    cases = {name.replace(" ", "_"): (encoder, trained_like(encoder)) for name, encoder in ENCODERS.items()}
    last = trained_like(RESNET18, 1).to(memory_format=torch.channels_last)
    cases["channels_last"] = (RESNET18, last)
    for name, (encoder, backbone) in cases.items():
        export_backbone(backbone, encoder, tmp_path / name)
        images = images_for(encoder)
        plain = backbone.to(memory_format=torch.contiguous_format)
        with torch.no_grad():
            torch.save({"images": images, "embedding": plain(images)}, tmp_path / f"{name}.pt")
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path)], capture_output=True, text=True, timeout=200, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.keys() == cases.keys()
    for name, (encoder, backbone) in cases.items():
        found, size, chans = result[name], encoder.image_size, encoder.in_chans
        assert found["equal"] and not found["control"], name
        assert found["shape"] == [4, backbone.num_features]
        assert found["data"] == {
            "mean": [0.5] * chans,
            "std": [0.5] * chans,
            "input_size": [chans, size, size],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        }


def test_tied_and_non_contiguous_weights_are_saved_and_read_back(tmp_path):
    backbone = trained_like(ENCODERS["vit token"])
    backbone.blocks[1].mlp.fc1.weight = backbone.blocks[0].mlp.fc1.weight
    turned = backbone.blocks[0].attn.proj.weight.detach().T.contiguous().T
    backbone.blocks[0].attn.proj.weight = torch.nn.Parameter(turned)
    assert not turned.is_contiguous()
    state = backbone.state_dict()
    export_backbone(backbone, ENCODERS["vit token"], tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == state.keys() and all(torch.equal(saved[key], state[key]) for key in state)
    other = trained_like(ENCODERS["vit token"], 1)
    load_backbone(other, tmp_path / "model.safetensors")
    images = images_for(ENCODERS["vit token"])
    with torch.no_grad():
        torch.testing.assert_close(other(images), backbone(images), rtol=0.0, atol=1e-6)


def test_an_export_replaces_the_older_one_and_leaves_nothing_else(tmp_path):
    for seed in (0, 1):
        backbone = trained_like(RESNET18, seed)
        export_backbone(backbone, RESNET18, tmp_path / "deep" / "export")
    folder = tmp_path / "deep" / "export"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    saved = load_file(folder / "model.safetensors")
    assert torch.equal(saved["layer1.0.conv1.weight"], backbone.layer1[0].conv1.weight)
    first = (folder / "config.json").read_bytes()
    export_backbone(backbone, RESNET18, folder)
    assert (folder / "config.json").read_bytes() == first


def test_an_interrupted_export_keeps_the_older_files(tmp_path, monkeypatch):
    export_backbone(trained_like(RESNET18), RESNET18, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(export, "save_file", half)
    with pytest.raises(OSError, match="no space"):
        export_backbone(trained_like(RESNET18, 1), RESNET18, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_weights_that_are_not_finite_are_not_exported(tmp_path):
    backbone = trained_like(RESNET18)
    with torch.no_grad():
        backbone.layer2[0].conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"layer2\.0\.conv1\.weight"):
        export_backbone(backbone, RESNET18, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_low_precision_weights_are_stored_in_fp32(tmp_path):
    backbone = trained_like(replace(RESNET18, in_chans=3)).bfloat16()
    export_backbone(backbone, replace(RESNET18, in_chans=3), tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32, torch.int64}
    assert torch.equal(saved["bn1.weight"], backbone.bn1.weight.float())
