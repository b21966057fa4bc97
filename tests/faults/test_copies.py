"""Copies among the retained images that would keep the forgotten ones alive: exact and near ones."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from lists import listed, of_folder, pictures, plan, refusal
from PIL import Image

from distunlearn.cli.main import main
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.prepare.duplicates import near_copies, perceptual_hash


@pytest.fixture
def twins(tmp_path) -> tuple[Path, str]:
    """Pictures, of which the listed one has a copy under another name."""
    root = pictures(tmp_path / "images")
    shutil.copy(root / "class0" / "000.jpg", root / "class1" / "copy.jpg")
    return root, listed(tmp_path, ["class0/000.jpg", "class0/002.jpg"])


def role_of(out: Path, sample_id: str) -> str:
    return Manifest.of_run(out).by_id[sample_id].role


def listed_ids(*ids: str) -> str:
    return "id,role\n" + "".join(f"{i}\n" for i in ids)


def test_f06_exact_copies_of_a_forgotten_image(twins, tmp_path, capsys):
    """The list itself says to retain the copy."""
    root, _ = twins
    path = tmp_path / "both.csv"
    path.write_text("id,role\nclass0/000.jpg,forget\nclass0/002.jpg,forget\nclass1/copy.jpg,retain\n")
    setting = f"data.forget={path}"
    message = refusal(capsys, of_folder("prepare", tmp_path / "run", root, setting), tmp_path)
    assert "'class0/000.jpg'" in message and "'class1/copy.jpg'" in message and "data.copies=forget" in message
    for policy, role in (("forget", "forget"), ("keep", "retain")):
        out = tmp_path / policy
        assert main(of_folder("prepare", out, root, setting, f"data.copies={policy}")) == 0
        assert "1 retained exact copies" in capsys.readouterr().out
        assert role_of(out, "class1/copy.jpg") == role and role_of(out, "class0/000.jpg") == "forget"
        assert role_of(out, "class0/004.jpg") != "forget"
        request = plan(capsys, of_folder("plan", out, root, setting, f"data.copies={policy}"))["request"]
        assert request["copies_in_retain"] == request["forget_with_copy_in_retain"] == 1
        assert request["copies_policy"] == policy
        assert main(of_folder("prepare", out, root, setting, f"data.copies={policy}")) == 0  # taken as they are
        message = refusal(capsys, of_folder("prepare", out, root, setting), tmp_path)
        assert "another selection" in message  # but not for a run that would have refused them


def test_f07_near_copies_are_counted(tmp_path, capsys):
    """Re-encoded and resized, of two of three forgotten pictures; the third has none."""
    root = pictures(tmp_path / "images")
    kept = ["class1/small.png", "class1/again.jpg"]
    for name, source, size in zip(kept, ("000", "002"), ((90, 70), (180, 140)), strict=True):
        photo(int(source)).save(root / "class0" / f"{source}.jpg", quality=90)
        Image.open(root / "class0" / f"{source}.jpg").resize(size).save(root / name)
    path = tmp_path / "near.csv"
    gone = "class0/000.jpg,forget\nclass0/002.jpg,forget\nclass0/004.jpg,forget\n"
    path.write_text("id,role\n" + gone + "".join(f"{name},retain\n" for name in kept))
    assert len({(root / name).read_bytes() for name in (*kept, "class0/000.jpg", "class0/002.jpg")}) == 4  # no copies
    out = tmp_path / "run"
    assert main(of_folder("prepare", out, root, f"data.forget={path}")) == 0
    assert "2 retained near-copies of 2 images to forget" in capsys.readouterr().out
    request = plan(capsys, of_folder("plan", out, root, f"data.forget={path}"))["request"]
    assert request["near_copies"] == {"distance": 4, "forget": 2, "retain": 2} and request["copies_in_retain"] == 0
    other = tmp_path / "none"
    assert main(of_folder("prepare", other, root, f"data.forget={path}", "data.near_distance=null")) == 0
    assert "near-copies" not in capsys.readouterr().out


def photo(seed: int) -> Image.Image:
    """Smooth areas, edges and a little grain, another for every seed."""
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    smooth = np.asarray(blocks.resize((180, 140), Image.Resampling.BICUBIC))
    return Image.fromarray(np.clip(smooth + rng.normal(0, 6, (140, 180, 3)), 0, 255).astype(np.uint8))


def hashed(image: Image.Image, kind: str = "PNG", **how) -> int:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return perceptual_hash(buffer.getvalue(), "x", 10**7)


def test_perceptual_hashes_stay_for_copies_and_differ_for_others():
    """Over 40 pictures: a copy is nearly always within 4 bits, another picture never within 10."""
    first = [hashed(photo(seed)) for seed in range(40)]
    changed = {
        "jpeg": lambda image: hashed(image, "JPEG", quality=75),
        "webp": lambda image: hashed(image, "WEBP", quality=75),
        "half": lambda image: hashed(image.resize((90, 70))),
        "brighter": lambda image: hashed(image.point(lambda value: value * 0.9 + 20)),
    }
    for name, change in changed.items():
        bits = [bin(a ^ change(photo(seed))).count("1") for seed, a in enumerate(first)]
        assert sum(b <= 4 for b in bits) >= 36, (name, bits)
    apart = [bin(a ^ b).count("1") for k, a in enumerate(first) for b in first[:k]]
    assert min(apart) > 10 and 28 < np.mean(apart) < 36
    assert hashed(Image.new("RGB", (50, 50), (9, 9, 9))) == hashed(Image.new("L", (30, 20), 200))  # flat: no bits drawn


@pytest.mark.parametrize("distance", [0, 1, 4, 16])
def test_near_copies_equal_a_comparison_of_all_pairs(distance):
    rng = np.random.default_rng(distance)
    forget = rng.integers(0, 2**63, 60, dtype=np.uint64)
    retain = np.concatenate([forget[:30], rng.integers(0, 2**63, 200, dtype=np.uint64)])
    for row in range(30):  # up to 20 bits changed
        for bit in rng.choice(64, row * 2 // 3, replace=False):
            retain[row] ^= np.uint64(1) << np.uint64(bit)
    apart = np.array([[bin(int(a) ^ int(b)).count("1") for b in retain] for a in forget])
    near_forget, near_retain = near_copies(forget, retain, distance)
    assert (near_forget == (apart <= distance).any(1)).all() and (near_retain == (apart <= distance).any(0)).all()
    assert 0 < near_forget.sum() < 60
    assert near_copies(forget[:0], retain, distance)[1].sum() == 0 == near_copies(forget, retain[:0], distance)[0].sum()
