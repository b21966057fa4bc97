"""By which mean and standard deviation a checkpoint's encoder wants its images, where that is written down.

It is looked for in the folder of the checkpoint (config.json of timm and of an export, preprocessor_config.json of
Hugging Face), and for a file that timm publishes, by name and digest, in timm's own register. It is never assumed.
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

BESIDE = ("config.json", "preprocessor_config.json")
NAMES = (("mean", "std"), ("image_mean", "image_std"))
LARGEST = 1 << 20  # bytes of such a file


def with_normalisation(encoder: EncoderConfig) -> EncoderConfig:
    """The settings with mean and std of the checkpoint, where they are not given and written down in one way."""
    if encoder.checkpoint is None or encoder.mean is not None or encoder.std is not None:
        return encoder
    path = Path(encoder.checkpoint)
    found = [*_beside(path), *_published(path, encoder.name)]
    fitting = {pair for pair in found if all(len(part) == encoder.in_chans for part in pair)}
    if len(fitting) != 1:
        return encoder
    mean, std = fitting.pop()
    return dataclasses.replace(encoder, mean=mean, std=std)


def _beside(path: Path) -> Iterator[tuple[tuple[float, ...], tuple[float, ...]]]:
    for name in BESIDE:
        file = path.with_name(name)
        try:
            content = json.loads(file.read_text(encoding="utf-8")) if file.stat().st_size <= LARGEST else None
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, Mapping):
            yield from _pairs(content.get("pretrained_cfg"))
            yield from _pairs(content)


def _pairs(content: Any) -> Iterator[tuple[tuple[float, ...], tuple[float, ...]]]:
    for mean, std in NAMES if isinstance(content, Mapping) else ():
        pair = _numbers(content.get(mean)), _numbers(content.get(std))
        if all(pair) and min(pair[1]) > 0:
            yield pair


def _numbers(value: Any) -> tuple[float, ...]:
    numeric = isinstance(value, list) and all(isinstance(part, (int, float)) and abs(part) < 1e3 for part in value)
    return tuple(map(float, value)) if numeric else ()


def _published(path: Path, name: str) -> Iterator[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Of a file whose name ends in the digest of its content, as timm's and torchvision's do."""
    digest = path.stem.rpartition("-")[2]
    if len(digest) != 8 or not path.is_file() or not file_sha256(path).startswith(digest):
        return
    known = importlib.import_module("timm.models").get_arch_pretrained_cfgs(name)  # heavy, and rarely asked
    for cfg in known.values():
        if str(cfg.url).endswith(f"-{digest}{path.suffix}"):
            yield tuple(cfg.mean), tuple(cfg.std)
