"""Crops of a photo: what a random view shows of it, and what evaluation does. One image at a time, in uint8.

A window is drawn as torchvision's RandomResizedCrop draws it, on the photo at its own size, and resized with
antialias by the kernels that torchvision calls: the same pixels. The evaluation transform is timm's: the shorter side
to size / crop_pct, then the centre square.

Shapes: n = images, V = views, C = 1 or 3 channels, S = side in pixels.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distunlearn.config.schema import RunConfig, ViewsConfig
from distunlearn.config.view_recipes import own_view, views_of
from distunlearn.data.views.draws import CROP, TRIES, keys, uniforms
from distunlearn.errors import ConfigError

EVALUATION = -1  # the number of the view that is no random one
ASPECTS = (3 / 4, 4 / 3)
STRIP = 4  # an image longer than that is a strip: of it evaluation resizes no more than the middle

Cut = Callable[[Sequence[str], np.ndarray, Sequence[int]], Tensor]  # ids, epochs, V views -> uint8 [n, V, C, S, S]


@dataclass(frozen=True)
class Cutter:
    """How photos become crops of S x S pixels: all that decides them beside photo, id, epoch and view."""

    size: int = 32
    settings: ViewsConfig = ViewsConfig()
    seed: int = 0
    crop_pct: float = 1.0
    interpolation: str = "bilinear"

    @classmethod
    def of(cls, cfg: RunConfig) -> Cutter:
        """As a run's settings want it."""
        encoder = cfg.encoder
        crop = encoder.crop_pct or cls.crop_pct, encoder.interpolation or cls.interpolation
        return cls(encoder.image_size, cfg.views, cfg.seed, *crop)

    def crops(self, ids: Sequence[str], epochs: np.ndarray, views: Sequence[int]) -> Crops:
        """The draws of these views of n images; see `uniforms`."""
        return Crops(self, ids, epochs, views)


class Crops:
    """The crops of some views of n images, with all draws made: `crop` cuts them out of one photo."""

    def __init__(self, cutter: Cutter, ids: Sequence[str], epochs: np.ndarray, views: Sequence[int]) -> None:
        self.cutter, self.views = cutter, views
        self._own = own_view(cutter.settings)
        draw = _seeds if self._own else _windows
        self._draws = [None if view == EVALUATION else draw(cutter.seed, epochs, ids, view) for view in views]
        self._recipes = views_of(cutter.settings)

    def crop(self, photo: Tensor, row: int, out: Tensor) -> None:
        """Write the views of image `row`, whose photo is uint8 [C, H, W], to `out`, uint8 [V, C, S, S].

        Raises:
            ConfigError: the own callable gave something else than a view.
        """
        cutter = self.cutter
        rows, columns = photo.shape[1:]
        for place, (view, draws) in enumerate(zip(self.views, self._draws, strict=True)):
            if draws is None:
                out[place] = evaluation_crop(photo, cutter.size, cutter.crop_pct, cutter.interpolation)
            elif self._own is not None:
                with _seeded(int(draws[row])):
                    out[place] = _checked(self._own(photo.contiguous(), view), out[place], cutter.settings.recipe)
            else:
                recipe = self._recipes[view % 2]
                top, left, height, width = window(draws[row], rows, columns, recipe.crop_scale_min)
                part = photo[:, top : top + height, left : left + width]
                out[place] = resize(part, (cutter.size, cutter.size), recipe.interpolation)


def window(u: np.ndarray, height: int, width: int, scale_min: float) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop as torchvision's RandomResizedCrop.get_params draws it.

    u: uniform numbers [2 TRIES + 2]: area and aspect of each try, then top and left.
    """
    low, high = map(math.log, ASPECTS)
    for attempt in range(TRIES):
        area = height * width * (scale_min + (1 - scale_min) * u[2 * attempt])
        aspect = math.exp(low + (high - low) * u[2 * attempt + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[-2] * (height - h + 1)), int(u[-1] * (width - w + 1)), h, w
    w, h = min(width, max(1, round(height * ASPECTS[1]))), min(height, max(1, round(width / ASPECTS[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """uint8 [C, H, W] -> [C, *size], antialiased where it shrinks; mode: "bilinear" or "bicubic"."""
    if tuple(image.shape[1:]) == size:
        return image
    # Channels last: for this layout torch has a vectorised integer kernel, the one that torchvision takes.
    last = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(last, size=size, mode=mode, align_corners=False, antialias=True)[0]


def evaluation_crop(photo: Tensor, size: int, crop_pct: float, mode: str) -> Tensor:
    """uint8 [C, H, W] -> [C, size, size]: the shorter side to size / crop_pct, then the centre square."""
    height, width = photo.shape[1:]
    shorter = min(height, width)
    if max(height, width) > STRIP * shorter:
        photo = _centre(photo, min(height, STRIP * shorter), min(width, STRIP * shorter))
        height, width = photo.shape[1:]
    return _centre(resize(photo, scaled(height, width, math.floor(size / crop_pct)), mode), size, size)


def enlarged(photo: Tensor, size: int) -> Tensor:
    """A photo uint8 [C, H, W] that is smaller than the crops, and no strip, at their size: windows are whole pixels."""
    height, width = photo.shape[1:]
    shorter, longer = sorted((height, width))
    if shorter >= size or longer > STRIP * shorter:
        return photo
    return resize(photo, scaled(height, width, size), "bilinear")


def scaled(height: int, width: int, shorter: int) -> tuple[int, int]:
    """(height, width) of an image whose shorter side becomes `shorter`, as torchvision's Resize rounds it."""
    longer = int(shorter * max(height, width) / min(height, width))
    return (shorter, longer) if height <= width else (longer, shorter)


def _centre(image: Tensor, height: int, width: int) -> Tensor:
    top, left = round((image.shape[1] - height) / 2), round((image.shape[2] - width) / 2)
    return image[:, top : top + height, left : left + width]


def _windows(seed: int, epochs: np.ndarray, ids: Sequence[str], view: int) -> np.ndarray:
    return uniforms(seed, epochs, ids, view, CROP.stop)[:, CROP]


def _seeds(seed: int, epochs: np.ndarray, ids: Sequence[str], view: int) -> np.ndarray:
    return keys(seed, epochs, ids, view) >> np.uint64(1)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within it torch, numpy and random draw from this seed on the CPU; what they would have drawn next stays."""
    before = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def _checked(view: Any, like: Tensor, name: str) -> Tensor:
    if not isinstance(view, Tensor) or view.dtype != torch.uint8 or view.shape != like.shape:
        found = f"{view.dtype} {list(view.shape)}" if isinstance(view, Tensor) else type(view).__name__
        raise ConfigError(f"views.recipe={name} returned {found}, expected a tensor torch.uint8 {list(like.shape)}.")
    return view
