"""Map-style torch datasets as sources: whatever `dataset[i]` gives, its image is written without loss.

An item is an image, a pair (image, label), or a dict with `image` and, where they are known, `label` and `id`. An image
is encoded bytes (of a file, kept as they are), a PIL image, a tensor [C, H, W] or [H, W], or an array [H, W, C]
or [H, W]; C is 1 or 3, values are uint8, or floats in [0, 1] (stored with 8 bits). A label is a whole number.

Ids are those of the dataset (`dataset.ids`, or `id` of each item), else a prefix and the index: `forget/000012`.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from distunlearn.common.text import printable
from distunlearn.config.schema import DataConfig
from distunlearn.data.manifest.ids import check_id
from distunlearn.data.prepare.roles import deal
from distunlearn.data.schedule import permutation
from distunlearn.data.sources.decode import check_header, decode_image
from distunlearn.data.sources.tar_index import number_labels
from distunlearn.errors import DataError

PARTS = {  # what a user hands over, and the roles that are drawn from it, the last of which takes what is left
    "retain": ("retain",),
    "forget": ("forget",),
    "holdout": ("calibration", "watch", "holdout"),
    "third_party": ("third_party_audit", "third_party"),
}
# Of a set that is too small for the numbers in the settings.
SHARES = {"calibration": 0.25, "watch": 0.3, "third_party_audit": 1 / 3}
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # of PIL images that PNG holds without loss
_SLACK = 1e-6  # by which rounding may leave [0, 1]

_Part = tuple[str, int]  # which dataset, and the index in it


class DatasetSource:
    """One or several datasets as a listed source (see `sources.Source`); listing reads every item once.

    A dataset that gives another image when it is read again (random transforms) is refused.

    Args:
        datasets: by name; the names are the prefixes of ids that the datasets do not have.
        max_pixels: images above are refused. prefix: put before every id.

    Raises:
        DataError: no dataset, an empty one, an item that is no image, or an id twice.
    """

    def __init__(self, datasets: Mapping[str, Any], max_pixels: int, prefix: str = "") -> None:
        self.name = "dataset"
        self.classes: list[str] = []
        self.skipped: dict[str, int] = {}
        self.samples: list[tuple[str, int | None]] = []
        self.parts: dict[str, list[str]] = {}
        self._datasets = dict(datasets)
        self._max_pixels = max_pixels
        self._at: dict[str, tuple[_Part, str]] = {}
        for name, dataset in self._datasets.items():
            self.parts[name] = self._list(name, dataset, prefix)
        labels, names = number_labels([label for _, label in self.samples])
        self.classes = self.classes if names == [str(number) for number in range(len(names))] else names
        self.samples = [(i, label) for (i, _), label in zip(self.samples, labels, strict=True)]
        self.labels_known = None not in labels

    def _list(self, name: str, dataset: Any, prefix: str) -> list[str]:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise DataError(
                f"{name} is a {type(dataset).__name__}, expected a map-style dataset with __getitem__ and __len__; "
                "wrap it in a torch Dataset."
            )
        known = getattr(dataset, "ids", None)
        if known is not None and len(known) != len(dataset):
            raise DataError(f"{name}.ids names {len(known)} images, but {name} has {len(dataset)}; give one id each.")
        ids: list[str] = []
        for index in range(len(dataset)):
            image, label, own = _parted(dataset[index], f"{name}[{index}]")
            own = own if known is None else known[index]
            sample_id = f"{prefix}{name}/{index:06d}" if own is None else f"{prefix}{own}"
            check_id(sample_id, f"{name}[{index}]")
            if sample_id in self._at:
                (other, place), _ = self._at[sample_id]
                raise DataError(
                    f"{name}[{index}] and {other}[{place}] have one id, {sample_id[:80]!r}; name each image once."
                )
            stamp = _stamp(image, f"{name}[{index}]")
            self._at[sample_id] = (name, index), stamp
            self.samples.append((sample_id, label))
            ids.append(sample_id)
        if not ids:
            raise DataError(f"{name} is empty; expected at least one image.")
        return ids

    def read(self, sample_id: str) -> tuple[bytes, str]:
        (name, index), stamp = self._at[sample_id]
        where = f"{name}[{index}]"
        image, _, _ = _parted(self._datasets[name][index], where)
        if _stamp(image, where) != stamp:
            raise DataError(
                f"{where} gives another image when it is read again; expected the same one: remove random transforms, "
                "for views are drawn here."
            )
        data = _encoded(image, where)
        kind = check_header(data, sample_id, self._max_pixels)
        decode_image(data, sample_id, self._max_pixels, channels=3)
        return data, kind

    def stamp(self, sample_id: str) -> str:
        """Digest of the image, from when it was listed."""
        return self._at[sample_id][1]

    def first_image(self) -> tuple[int, int, int]:
        """(channels: 1 or 3, height, width) of the first image."""
        data, _ = self.read(self.samples[0][0])
        image = Image.open(io.BytesIO(data))
        return 1 if image.mode in ("1", "L") else 3, image.height, image.width


def fixed_roles(
    source: DatasetSource, cfg: DataConfig, seed: int, asked: Iterable[str]
) -> tuple[dict[str, str], dict[str, int]]:
    """({id: role}, images that were left out by part): which dataset an image came from decides its role.

    Calibration and watch images are drawn from the holdout, third-party images for the audit from the third party: as
    many as the settings say, of a set that is small for the default number a share (`SHARES`). A non-member with the
    very pixels of a member, or of a non-member of an earlier part, is left out.

    Args:
        source: of the datasets `PARTS`. seed: of the draws. asked: names of roles whose number the user has set.

    Raises:
        DataError: a role that is left without images, or too few of them for a number that was asked for.
    """
    roles: dict[str, str] = {}
    left_out: dict[str, int] = {}
    seen: set[str] = set()
    for part, names in PARTS.items():
        stamps = {i: source.stamp(i) for i in source.parts[part]}
        ids = list(stamps) if part in ("retain", "forget") else [i for i in stamps if stamps[i] not in seen]
        left_out[part] = len(stamps) - len(ids)
        seen.update(stamps.values())
        order = [ids[i] for i in permutation(len(ids), seed, part)] if len(names) > 1 else ids
        counts = []
        for name in names[:-1]:
            wanted = getattr(cfg, name)
            counts.append((name, wanted if name in asked else min(wanted, int(len(ids) * SHARES[name]))))
        rest = len(ids) - sum(count for _, count in counts)
        if rest < 1 or any(count < 1 and getattr(cfg, name) for name, count in counts):
            dropped = f" ({left_out[part]} more have the pixels of other images)" if left_out[part] else ""
            raise DataError(
                f"{part} has {len(ids)} images{dropped}, expected at least one each for {' and '.join(names)}"
                f"{''.join(f' ({count} {name} asked for)' for name, count in counts if name in asked)}; add images."
            )
        roles.update(deal(order, [*counts, (names[-1], rest)]))
    return roles, left_out


def selection_digest(source: DatasetSource, roles: Mapping[str, str]) -> str:
    """sha256 (hex) of ids, labels, roles and images: the same for the same call."""
    lines = sorted((i, label, roles.get(i), source.stamp(i)) for i, label in source.samples)
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


# -- one item --------------------------------------------------------------------------------------------------------


def _parted(item: Any, where: str) -> tuple[Any, int | None, str | None]:
    """(image, label, id) of what a dataset gives."""
    if isinstance(item, Mapping):
        if "image" not in item:
            raise DataError(f"{where} is a dict without 'image' (keys: {_names(item)}); name the image so.")
        own = item.get("id")
        return item["image"], _label(item.get("label"), where), None if own is None else str(own)
    if isinstance(item, Sequence) and not isinstance(item, (str, bytes, bytearray)):
        if len(item) not in (1, 2):
            raise DataError(f"{where} has {len(item)} parts; expected an image, (image, label) or a dict.")
        return item[0], _label(item[1] if len(item) == 2 else None, where), None
    return item, None, None


def _names(item: Mapping[Any, Any]) -> str:
    return printable(", ".join(map(str, list(item)[:8])), 80)


def _label(value: Any, where: str) -> int | None:
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) and value.size in (1, torch.Size([])):
        value = value.item()
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise DataError(
        f"{where} has the label {printable(repr(value), 40)}; expected a whole number from 0, or None; "
        "number the classes, or give images without labels."
    )


def _stamp(image: Any, where: str) -> str:
    """Digest of the pixels, or of the encoded bytes, with their kind: cheaper than an encoded image."""
    plain = _plain(image, where)
    if isinstance(plain, bytes):
        return hashlib.sha256(plain).hexdigest()
    head = f"{plain.mode} {plain.size}"
    palette = plain.getpalette() if plain.mode == "P" else None
    extra = f"{palette} {plain.info.get('transparency')!r}" if plain.mode == "P" else ""
    return hashlib.sha256(f"{head} {extra}".encode() + plain.tobytes()).hexdigest()


def _encoded(image: Any, where: str) -> bytes:
    plain = _plain(image, where)
    if isinstance(plain, bytes):
        return plain
    buffer = io.BytesIO()
    plain.save(buffer, "PNG")
    return buffer.getvalue()


def _plain(image: Any, where: str) -> bytes | Image.Image:
    """Encoded bytes, or an 8-bit PIL image with the very pixels."""
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, Image.Image):
        if image.mode not in _MODES:
            raise DataError(
                f"{where} is a PIL image of mode {image.mode}, expected one of {', '.join(_MODES)}; convert it to RGB."
            )
        return image
    if isinstance(image, torch.Tensor):
        pixels = image.detach().cpu()
        pixels = pixels.permute(1, 2, 0) if pixels.dim() == 3 else pixels
        array = pixels.float().numpy() if pixels.is_floating_point() else pixels.numpy()
    elif isinstance(image, np.ndarray):
        array = image
    else:
        raise DataError(
            f"{where} is a {type(image).__name__}, which is no image; expected a PIL image, a tensor [C, H, W], an "
            "array [H, W, C] or encoded bytes."
        )
    return Image.fromarray(np.ascontiguousarray(_eight_bits(array, where)))


def _eight_bits(array: np.ndarray, where: str) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3] of an array [H, W] or [H, W, C]."""
    shape = array.shape
    if array.ndim == 3 and shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] != 3) or array.size == 0:
        raise DataError(
            f"{where} has the shape {list(shape)} (channels last), expected one image of 1 or 3 channels; tensors are "
            "[C, H, W], arrays [H, W, C]."
        )
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"{where} has values of type {array.dtype}, expected uint8, or floats in [0, 1]; convert them.")
    low, high = float(array.min()), float(array.max())
    if not (-_SLACK <= low and high <= 1 + _SLACK):
        raise DataError(
            f"{where} has values from {low:.3g} to {high:.3g}, expected floats in [0, 1]; leave out Normalize, and "
            "give mean and std of the encoder instead."
        )
    return np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)
