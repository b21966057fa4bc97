"""How a checkpoint's encoder wants its images, where that is written down: mean, standard deviation, evaluation crop.

A folder of Hugging Face's, or of an export, stands for the file of weights in it.

It is looked for in the folder of the checkpoint (config.json of timm and of an export, preprocessor_config.json of
Hugging Face), and for a file that timm publishes, by name and digest, in timm's own register. Mean and standard
deviation are never assumed; the crop is timm's plainest where nothing is found, and `plan` shows it.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distunlearn.common.files import file_sha256
from distunlearn.config.schema import EncoderConfig
from distunlearn.verify.records import read_plain

PREPROCESSING = ("mean", "std", "crop_pct", "interpolation")
BESIDE = ("config.json", "preprocessor_config.json")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a folder, the first that is there
LARGEST = 1 << 20  # bytes of such a file
INTERPOLATIONS = {"bilinear": "bilinear", "bicubic": "bicubic", 2: "bilinear", 3: "bicubic"}  # by numbers: PIL's


def with_preprocessing(encoder: EncoderConfig) -> EncoderConfig:
    """The settings with what is not given and is written down in one way only, and with a file of weights."""
    if encoder.checkpoint is not None:
        encoder = dataclasses.replace(encoder, checkpoint=weights_file(encoder.checkpoint))
    if encoder.checkpoint is None or all(getattr(encoder, key) is not None for key in PREPROCESSING):
        return encoder
    path = Path(encoder.checkpoint)
    found = [_read(content) for content in (*beside(path), *_published(path, encoder.name))]
    taken: dict[str, Any] = {}
    pairs = {(f["mean"], f["std"]) for f in found if len(f["mean"]) == len(f["std"]) == encoder.in_chans}
    if encoder.mean is None and encoder.std is None and len(pairs) == 1:
        taken["mean"], taken["std"] = pairs.pop()
    for key in ("crop_pct", "interpolation"):
        values = {f[key] for f in found} - {None}
        if getattr(encoder, key) is None and len(values) == 1:
            taken[key] = values.pop()
    return dataclasses.replace(encoder, **taken)


def weights_file(place: str) -> str:
    """The file of weights in a folder, else the place as it is."""
    files = (Path(place, name) for name in WEIGHTS)
    return next((str(file) for file in files if file.is_file()), place)


def beside(path: Path) -> Iterator[Mapping[str, Any]]:
    """What the configuration files in the folder of a checkpoint say, and those of parts of it."""
    for name in BESIDE:
        file = path.with_name(name)
        try:
            content = json.loads(read_plain(file, LARGEST).decode("utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, Mapping):
            parts = (content.get("pretrained_cfg"), content.get("vision_config"), content)
            yield from (part for part in parts if isinstance(part, Mapping))


def _published(path: Path, name: str) -> Iterator[Mapping[str, Any]]:
    """Of a file whose name ends in the digest of its content, as timm's and torchvision's do."""
    digest = path.stem.rpartition("-")[2]
    if len(digest) != 8 or not path.is_file() or not file_sha256(path).startswith(digest):
        return
    known = importlib.import_module("timm.models").get_arch_pretrained_cfgs(name)  # heavy, and rarely asked
    for cfg in known.values():
        if str(cfg.url).endswith(f"-{digest}{path.suffix}"):
            yield dataclasses.asdict(cfg)


def _read(content: Mapping[str, Any]) -> dict[str, Any]:
    """mean and std, () where they are not there; crop_pct and interpolation, None likewise."""
    mean, std = (_numbers(content.get(key, content.get(f"image_{key}"))) for key in ("mean", "std"))
    asked = content.get("interpolation", content.get("resample"))
    return {
        "mean": mean,
        "std": std if std and min(std) > 0 else (),
        "crop_pct": _crop_pct(content),
        "interpolation": INTERPOLATIONS.get(asked) if isinstance(asked, (str, int)) else None,
    }


def _numbers(value: Any) -> tuple[float, ...]:
    numeric = isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) and abs(v) < 1e3 for v in value)
    return tuple(map(float, value)) if numeric else ()


def _crop_pct(content: Mapping[str, Any]) -> float | None:
    """timm's, or the sides that Hugging Face crops to and resizes to before."""
    share = content.get("crop_pct")
    if share is None and content.get("do_center_crop"):
        size, crop = (content.get(key) for key in ("size", "crop_size"))
        size = size.get("shortest_edge") if isinstance(size, Mapping) else size
        crop = crop.get("height") if isinstance(crop, Mapping) else crop
        share = crop / size if isinstance(size, int) and isinstance(crop, int) and size > 0 else None
    return float(share) if isinstance(share, (int, float)) and 0 < share <= 1 else None
