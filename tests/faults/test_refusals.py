"""Bad input through the command line: one sentence, the documented exit code, nothing written, before any compute."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

from distunlearn.cli.main import main
from distunlearn.config.load import load_config
from distunlearn.config.schema import RunConfig
from distunlearn.data.sources.sources import open_sources
from distunlearn.encoders.model import build_model

SIZES = [
    "data.members=40", "data.holdout=30", "data.calibration=10", "data.third_party=10", "data.third_party_audit=10",
    "data.samples_per_shard=16", "pretrain.epochs=1", "pretrain.batch=16", "unlearn.steps=2", "unlearn.retain_batch=16",
    "unlearn.forget_batch=8", "unlearn.third_party_batch=8", "runtime.threads=1",
]  # fmt: skip


def arguments(out: Path, *settings: str, verb: str = "run") -> list[str]:
    chosen = [part for value in (*SIZES, "data.forget=10", *settings) for part in ("--set", value)]
    return [verb, "digits", "--out", str(out), *chosen]


def tree(folder: Path) -> dict[str, bytes]:
    return (
        {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        if folder.exists()
        else {}
    )


def refused(capsys, out: Path, *settings: str, code: int, verb: str = "run") -> str:
    """The one line of the refusal; asserts the exit code and that `out` is as it was."""
    before = tree(out)
    existed = out.exists()
    found = main(arguments(out, *settings, verb=verb))
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert found == code, captured.err
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    assert "Traceback" not in captured.err and captured.out == ""
    assert out.exists() == existed and tree(out) == before
    return lines[0]


@pytest.fixture(scope="module")
def ids() -> list[str]:
    return [i for i, _ in open_sources(RunConfig().data).members.samples]


def listed(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return f"data.forget={path}"


# -- forget lists ----------------------------------------------------------------------------------------------------


def test_the_same_settings_without_a_fault_are_accepted(tmp_path, capsys):
    """Negative control: what follows is refused for its fault, not for the tiny settings."""
    assert main(arguments(tmp_path / "run", verb="plan")) == 0
    assert json.loads(capsys.readouterr().out)["roles"]["forget"] == 10
    assert not (tmp_path / "run").exists()


def test_empty_forget_list(tmp_path, capsys):
    message = refused(capsys, tmp_path / "run", listed(tmp_path, "empty.txt", "\n"), code=3)
    assert "empty.txt" in message


def test_unknown_id(tmp_path, capsys, ids):
    setting = listed(tmp_path, "ids.txt", f"{ids[0]}\nno-such-image\n")
    assert "no-such-image" in refused(capsys, tmp_path / "run", setting, code=3)


def test_id_in_both_forget_and_retain(tmp_path, capsys, ids):
    setting = listed(tmp_path, "ids.csv", f"id,role\n{ids[0]},forget\n{ids[1]},forget\n{ids[0]},retain\n")
    message = refused(capsys, tmp_path / "run", setting, code=3)
    assert ids[0] in message and "both" in message


def test_unknown_config_key(tmp_path, capsys):
    message = refused(capsys, tmp_path / "run", "unlearn.stepz=3", code=2)
    assert "unlearn.stepz" in message and "unlearn.steps" in message


# -- shards ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path) -> Path:
    out = tmp_path / "run"
    assert main(arguments(out, verb="prepare")) == 0
    return out


def shard_of(out: Path) -> Path:
    return sorted((out / "shards").glob("*.tar"))[1]


def test_missing_shard(prepared, capsys):
    shard = shard_of(prepared)
    shard.unlink()
    assert shard.name in refused(capsys, prepared, code=3)


def test_truncated_shard(prepared, capsys):
    shard = shard_of(prepared)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert shard.name in refused(capsys, prepared, code=3)


def test_one_byte_changed_in_a_shard(prepared, capsys):
    shard = shard_of(prepared)
    content = bytearray(shard.read_bytes())
    content[content.index(b"\x89PNG") + 60] ^= 1
    shard.write_bytes(bytes(content))
    assert shard.name in refused(capsys, prepared, code=3)


# -- checkpoints -----------------------------------------------------------------------------------------------------


PIXELS = ("encoder.mean=[0.5]", "encoder.std=[0.5]")


def backbone_weights() -> dict[str, torch.Tensor]:
    cfg = load_config("digits", None, [])
    return dict(build_model(cfg, None).backbone.state_dict())


def test_a_good_checkpoint_is_accepted(tmp_path, capsys):
    """Negative control of the three below."""
    path = tmp_path / "encoder.safetensors"
    save_file(backbone_weights(), path)
    assert (
        main(
            arguments(
                tmp_path / "run", f"encoder.checkpoint={path}", *PIXELS, tiny.named_roles(tmp_path, 10), verb="plan"
            )
        )
        == 0
    )
    capsys.readouterr()


def test_a_checkpoint_needs_non_members_that_are_named(tmp_path, capsys):
    """Drawn among the images it was trained on they would be no non-members."""
    path = tmp_path / "encoder.safetensors"
    save_file(backbone_weights(), path)
    assert "data.holdout_root" in refused(capsys, tmp_path / "run", f"encoder.checkpoint={path}", *PIXELS, code=2)
    (tmp_path / "ids.txt").write_text("digits/000001\ndigits/000002\n")  # a list, but without such roles
    unnamed = (f"encoder.checkpoint={path}", *PIXELS, f"data.forget={tmp_path / 'ids.txt'}", "unlearn.steps=20")
    for verb in ("plan", "prepare", "run"):
        assert "names no images that it never saw" in refused(capsys, tmp_path / "run", *unnamed, code=2, verb=verb)
    assert main(arguments(tmp_path / "run", unnamed[3], "unlearn.steps=20", verb="prepare")) == 0
    capsys.readouterr()
    for verb in ("plan", "pretrain"):  # shards that were made without the checkpoint
        assert "were drawn among" in refused(capsys, tmp_path / "run", *unnamed, code=2, verb=verb)


def test_nan_in_the_checkpoint(tmp_path, capsys):
    weights = backbone_weights()
    name = next(n for n, w in weights.items() if w.dim() == 4)
    weights[name] = weights[name].clone()
    weights[name].view(-1)[3] = float("nan")
    path = tmp_path / "encoder.safetensors"
    save_file(weights, path)
    assert name in refused(
        capsys, tmp_path / "run", f"encoder.checkpoint={path}", *PIXELS, tiny.named_roles(tmp_path, 10), code=4
    )


class _Touch:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_malicious_pickle_as_checkpoint(tmp_path, capsys):
    marker, path = tmp_path / "executed", tmp_path / "encoder.pth"
    path.write_bytes(pickle.dumps({"state_dict": _Touch(marker)}))
    refused(capsys, tmp_path / "run", f"encoder.checkpoint={path}", *PIXELS, tiny.named_roles(tmp_path, 10), code=2)
    assert not marker.exists()
    torch.save({"weight": torch.zeros(2), "extra": _Touch(marker)}, path)
    refused(capsys, tmp_path / "run", f"encoder.checkpoint={path}", *PIXELS, tiny.named_roles(tmp_path, 10), code=2)
    assert not marker.exists()
    pickle.loads(pickle.dumps(_Touch(marker)))
    assert marker.exists()  # the payload does fire where a pickle is loaded carelessly


# -- images ----------------------------------------------------------------------------------------------------------


def png_that_claims(width: int, height: int) -> bytes:
    """A small file with the header of a huge image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def image_folder(root: Path, count: int = 101) -> None:
    generator = np.random.default_rng(0)
    for i in range(count):
        folder = root / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (12, 12), dtype=np.uint8)).save(folder / f"{i:03d}.png")


def test_an_image_of_60000_x_60000_pixels(tmp_path, capsys):
    root = tmp_path / "images"
    image_folder(root)
    settings = ["data.source=imagefolder", f"data.root={root}", "data.members=null"]
    assert main(arguments(tmp_path / "good", *settings, verb="prepare")) == 0  # negative control
    capsys.readouterr()
    (root / "class0/000.png").write_bytes(png_that_claims(60_000, 60_000))
    message = refused(capsys, tmp_path / "run", *settings, code=3)
    assert "000.png" in message and "60000" in message


def test_the_command_line_itself_ends_with_the_code(tmp_path):
    """The same through a process: what a shell script sees."""
    done = subprocess.run(
        [sys.executable, "-m", "distunlearn", *arguments(tmp_path / "run", "seed=-1")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_encoder_that_does_not_exist(tmp_path, capsys):
    message = refused(capsys, tmp_path / "run", "encoder.name=resnet19", "encoder.args={}", code=2)
    assert "resnet18" in message
