"""Torch datasets as sources: what is taken for an image, that nothing is lost, and who may play which role."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from distunlearn.config.schema import DataConfig
from distunlearn.data.sources.dataset import PARTS, DatasetSource, fixed_roles, selection_digest
from distunlearn.data.sources.decode import decode_image
from distunlearn.errors import DataError

MOST = 1 << 20


class Items(Dataset):
    """The given items, in order."""

    def __init__(self, items, ids=None) -> None:
        self.items = items
        if ids is not None:
            self.ids = ids

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        item = self.items[index]
        return item() if callable(item) else item


def pictures(count: int, seed: int, side: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def stored(item) -> np.ndarray:
    """Pixels [H, W, 3] of what a source writes for the only item."""
    source = DatasetSource({"retain": Items([item])}, MOST)
    data, _ = source.read("retain/000000")
    return decode_image(data, "x", MOST, 3).permute(1, 2, 0).numpy()


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


PIXELS = pictures(1, 0)[0]
CHANNELS_FIRST = torch.from_numpy(PIXELS).permute(2, 0, 1)


@pytest.mark.parametrize(
    "item",
    [
        Image.fromarray(PIXELS),
        PIXELS,
        PIXELS.astype(np.float64) / 255,
        CHANNELS_FIRST,
        CHANNELS_FIRST.float() / 255,
        encoded(PIXELS, "PNG"),
        (CHANNELS_FIRST, 3),
        [PIXELS, torch.tensor(3)],
        {"image": PIXELS, "label": np.int64(3), "id": "a/b"},
    ],
    ids=["pil", "array", "float-array", "tensor", "float-tensor", "bytes", "pair", "list", "dict"],
)
def test_every_form_of_an_image_is_written_without_loss(item) -> None:
    if isinstance(item, dict):
        source = DatasetSource({"retain": Items([item])}, MOST)
        assert source.samples == [("a/b", 0)] and source.classes == ["3"]  # numbered as they occur
        np.testing.assert_array_equal(decode_image(source.read("a/b")[0], "x", MOST, 3).permute(1, 2, 0), PIXELS)
        return
    np.testing.assert_array_equal(stored(item), PIXELS)


def test_grey_images_stay_grey() -> None:
    grey = PIXELS[:, :, 0]
    for item in (Image.fromarray(grey), grey, grey[:, :, None], torch.from_numpy(grey)[None], torch.from_numpy(grey)):
        source = DatasetSource({"retain": Items([item])}, MOST)
        assert source.first_image() == (1, 12, 12)
        np.testing.assert_array_equal(decode_image(source.read("retain/000000")[0], "x", MOST, 1)[0], grey)


def test_encoded_bytes_are_kept_as_they_are() -> None:
    data = encoded(PIXELS, "JPEG")
    source = DatasetSource({"retain": Items([data])}, MOST)
    assert source.read("retain/000000") == (data, "jpg")


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("text", "no image"),
        (None, "no image"),
        (torch.zeros(3, 4, 4) - 2, "leave out Normalize"),
        (torch.full((3, 4, 4), float("nan")), "floats in \\[0, 1\\]"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "uint8"),
        (torch.zeros(2, 4, 4), "1 or 3 channels"),
        (torch.zeros(1, 3, 4, 4), "1 or 3 channels"),
        (np.zeros((0, 4, 3), np.uint8), "1 or 3 channels"),
        (Image.new("I;16", (4, 4)), "mode I;16"),
        ((PIXELS, "cat"), "label 'cat'"),
        ((PIXELS, -1), "label -1"),
        ((PIXELS, True), "label True"),
        ((PIXELS, 1, 2), "3 parts"),
        ({"pixels": PIXELS}, "without 'image'"),
    ],
)
def test_what_is_no_image_is_refused_in_one_sentence(item, words) -> None:
    with pytest.raises(DataError, match=words) as error:
        DatasetSource({"retain": Items([PIXELS, item])}, MOST)
    assert "retain[1]" in str(error.value) and str(error.value).count(". ") == 0


def test_bytes_that_are_no_image_are_refused_when_they_are_read() -> None:
    source = DatasetSource({"retain": Items([b"no picture"])}, MOST)
    with pytest.raises(DataError, match="not PNG, JPEG, WebP"):
        source.read("retain/000000")


def test_random_transforms_are_refused() -> None:
    generator = np.random.default_rng(0)
    source = DatasetSource({"retain": Items([lambda: generator.integers(0, 256, (8, 8), dtype=np.uint8)])}, MOST)
    with pytest.raises(DataError, match="another image when it is read again"):
        source.read("retain/000000")


def test_ids_are_the_datasets_own_or_the_index() -> None:
    images = pictures(2, 1)
    assert [i for i, _ in DatasetSource({"forget": Items(images)}, MOST).samples] == ["forget/000000", "forget/000001"]
    assert [i for i, _ in DatasetSource({"forget": Items(images, ["p/1", 7])}, MOST).samples] == ["p/1", "7"]
    with pytest.raises(DataError, match="one id"):
        DatasetSource({"retain": Items(images, ["p", "q"]), "forget": Items(images, ["r", "q"])}, MOST)
    with pytest.raises(DataError, match="names 1 images"):
        DatasetSource({"retain": Items(images, ["p"])}, MOST)


def four(**changes: np.ndarray) -> DatasetSource:
    images = {part: pictures(40, seed) for seed, part in enumerate(PARTS)} | changes
    return DatasetSource({part: Items(list(images[part])) for part in PARTS}, MOST)


def test_the_dataset_decides_the_role() -> None:
    roles, left_out = fixed_roles(four(), DataConfig(), 0, ())
    for sample_id, role in roles.items():
        assert role in PARTS[sample_id.split("/")[0]]
    counts = {role: list(roles.values()).count(role) for names in PARTS.values() for role in names}
    assert counts == {
        "retain": 40, "forget": 40, "calibration": 10, "holdout": 30, "third_party_audit": 13, "third_party": 27,
        "watch": 0,
    }  # fmt: skip
    assert not any(left_out.values())
    again, _ = fixed_roles(four(), DataConfig(), 0, ())
    other, _ = fixed_roles(four(), DataConfig(), 1, ())
    assert again == roles and other != roles


def test_numbers_that_were_asked_for_are_kept_or_refused() -> None:
    roles, _ = fixed_roles(four(), DataConfig(calibration=25), 0, ["calibration"])
    assert list(roles.values()).count("calibration") == 25
    with pytest.raises(DataError, match="40 calibration asked for"):
        fixed_roles(four(), DataConfig(calibration=40), 0, ["calibration"])


def test_non_members_with_the_pixels_of_members_are_left_out() -> None:
    members, others = pictures(40, 0), pictures(40, 2)
    others[:3] = members[:3]
    roles, left_out = fixed_roles(four(retain=members, holdout=others), DataConfig(), 0, ())
    assert left_out["holdout"] == 3 and not {f"holdout/{n:06d}" for n in range(3)} & set(roles)
    assert sum(role in ("holdout", "calibration") for role in roles.values()) == 37


def test_the_digest_sees_every_pixel_label_and_role() -> None:
    source = four()
    roles, _ = fixed_roles(source, DataConfig(), 0, ())
    digest = selection_digest(source, roles)
    changed = pictures(40, 0)
    changed[7, 3, 3, 1] ^= 1
    assert selection_digest(four(), roles) == digest
    assert selection_digest(four(retain=changed), roles) != digest
    assert selection_digest(source, {**roles, "forget/000001": "retain"}) != digest
