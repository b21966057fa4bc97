"""Flips, colour and blur of a batch of crops, by parameters of each image's own; on a GPU where there is one.

Operations are those of `torchvision.transforms.v2.functional` on floating-point images. An image's pixels do not
depend on its batch: operations are per pixel, sums are fixed trees, and the blur is a convolution within one channel.

Shapes: n = images, C = 1 or 3 channels, S = side in pixels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distunlearn.common.device import on_device
from distunlearn.config.schema import ViewsConfig
from distunlearn.config.view_recipes import View, views_of
from distunlearn.data.views.draws import COLOUR, uniforms
from distunlearn.errors import ConfigError

JITTER = ("brightness", "contrast", "saturation", "hue")
ORDERS = np.array(list(itertools.permutations(range(len(JITTER)))))  # of the jitter, [24, 4]
REACH = 4.0  # sigmas to which the kernel of a blur goes on either side: it holds its sigma within 0.1 %
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as torchvision rounds it


def make_view(
    crops: Tensor,
    cfg: ViewsConfig,
    *,
    seed: int,
    epochs: np.ndarray,
    ids: Sequence[str],
    view: int,
    compiled: bool = False,
) -> Tensor:
    """One random view of each image from its crop, float32 [n, C, S, S] in [-1, 1], on the crops' device.

    Args:
        crops: uint8 [n, C, S, S], of the same key.
        cfg: which operations, how strong.
        seed, epochs, ids, view: the key of every draw, see `uniforms`.
        compiled: each operation by a fused kernel of torch.compile; the same but for rounding, which then may go by n.

    Returns:
        (x - 0.5) / 0.5 of the augmented x in [0, 1].

    Raises:
        ConfigError: a colour operation on one channel.
        ValueError: wrong shapes, types or lengths.
    """
    _check_crops(crops)
    if len(ids) != len(crops):
        raise ValueError(f"{len(crops)} crops came with {len(ids)} ids")
    x = _to_unit(crops)
    recipes = views_of(cfg)
    if recipes and len(ids):
        recipe = recipes[view % 2]
        _check_colour(recipe, crops.shape[1])
        u = uniforms(seed, epochs, ids, view, len(COLOUR))
        x = _augment(x, recipe, parameters(recipe, dict(zip(COLOUR, u.T, strict=True))), compiled)
    return _normalise(x)


def plain_view(crops: Tensor) -> Tensor:
    """The crops as they are, uint8 [n, C, S, S] -> float32 (x - 0.5) / 0.5 in [-1, 1]."""
    _check_crops(crops)
    return _normalise(_to_unit(crops))


def parameters(recipe: View, u: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of every operation by name, [n], from uniform numbers [n].

    flip, jitter, grayscale, blur, solarize: whether it is done, bool. order: of the jitter, int64 [n, 4], indices in
    `JITTER`. The others: factor or sigma, float64.
    """
    found = {name: u[name] < getattr(recipe, name) for name in ("flip", "jitter", "grayscale", "blur", "solarize")}
    found["order"] = ORDERS[(u["order"] * len(ORDERS)).astype(np.int64)]
    for name in JITTER[:3]:
        strength = getattr(recipe, name)
        low = max(0.0, 1 - strength)
        found[name] = low + (1 + strength - low) * u[name]
    low, high = recipe.blur_sigma
    return found | {"hue": recipe.hue * (2 * u["hue"] - 1), "sigma": low + (high - low) * u["sigma"]}


def _augment(x: Tensor, recipe: View, p: dict[str, np.ndarray], compiled: bool) -> Tensor:
    """float32 [n, C, S, S] in [0, 1], overwritten."""
    x = _on_rows(x, p["flip"], _flipped)
    for place in range(len(JITTER)):
        for number, name in enumerate(JITTER):
            if getattr(recipe, name):
                chosen = p["jitter"] & (p["order"][:, place] == number)
                x = _on_rows(x, chosen, _operation(name, compiled), p[name])
    x = _on_rows(x, p["grayscale"], _operation("grayscale", compiled))
    reach = min(math.ceil(REACH * recipe.blur_sigma[1]), x.shape[-1] - 1)
    steps = np.arange(-reach, reach + 1)
    taps = np.exp(-0.5 * (steps / p["sigma"][:, None]) ** 2)
    x = _on_rows(x, p["blur"], _blur, taps / taps.sum(1, keepdims=True))
    return _on_rows(x, p["solarize"], _solarize)


def _on_rows(x: Tensor, chosen: np.ndarray, act: Callable[..., Tensor], values: np.ndarray | None = None) -> Tensor:
    """The images with `act` done to the chosen ones, [n] bool. values: arguments of each image, [n, ...]."""
    rows = np.flatnonzero(chosen)
    if not rows.size:
        return x
    more = () if values is None else (on_device(values[rows].astype(np.float32), x.device),)
    if rows.size == len(x):
        return act(x, *more)
    at = on_device(rows, x.device)
    return x.index_copy_(0, at, act(x.index_select(0, at), *more))


# -- operations: [r, C, S, S] in [0, 1] and one number each, [r] -----------------------------------------------------


@lru_cache(maxsize=16)
def _operation(name: str, compiled: bool) -> Callable[..., Tensor]:
    found = _OPERATIONS[name]
    return torch.compile(found, dynamic=True) if compiled else found


def _flipped(x: Tensor) -> Tensor:
    return x.flip(-1)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, _image_mean(_luma(x)), factor)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, _luma(x), factor)


def _grayscale(x: Tensor) -> Tensor:
    return _luma(x).expand_as(x).contiguous()


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Hue turned by `shift` turns in HSV.

    With the value v, the chroma c and the hue h in sixths of a turn, a channel is v - c clamp(min(k, 4 - k), 0, 1)
    where k = (n + h) mod 6 and n = 5, 3, 1 for red, green, blue (the alternative form of HSV to RGB).
    """
    red, green, blue = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    whole = torch.where(chroma > 0, chroma, 1.0)
    sixths = torch.where(
        value == red, (green - blue) / whole,
        torch.where(value == green, (blue - red) / whole + 2, (red - green) / whole + 4),
    )  # fmt: skip
    sixths = sixths + 6 * shift.view(-1, 1, 1)
    channels = []
    for number in (5, 3, 1):
        k = (sixths + number).remainder_(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, 1)


def _solarize(x: Tensor) -> Tensor:
    """Of 8-bit values those from 128 on are inverted."""
    return torch.where(x >= 0.5, 1 - x, x)


def _blur(x: Tensor, taps: Tensor) -> Tensor:
    """Separable convolution, reflected at the border; taps: [r, K] with an odd K."""
    (n, channels, height, width), (_, count) = x.shape, taps.shape
    reach, weight = count // 2, taps.repeat_interleave(channels, 0)
    x = F.pad(x, (reach, reach, reach, reach), mode="reflect").view(1, n * channels, height + 2 * reach, -1)
    x = F.conv2d(x, weight.view(-1, 1, count, 1), groups=n * channels)
    x = F.conv2d(x, weight.view(-1, 1, 1, count), groups=n * channels).view(n, channels, height, width)
    return x.clamp_(0, 1)  # by rounding, the taps may add up to more


_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "brightness": _brightness, "contrast": _contrast, "saturation": _saturation, "hue": _hue, "grayscale": _grayscale,
}  # fmt: skip


# -- pixels ----------------------------------------------------------------------------------------------------------


def _check_crops(crops: Tensor) -> None:
    if crops.dtype != torch.uint8 or crops.dim() != 4 or crops.shape[1] not in (1, 3):
        raise ValueError(f"crops must be uint8 of shape [n, 1 or 3, S, S], got {crops.dtype} {list(crops.shape)}")
    if crops.shape[2] != crops.shape[3] or crops.shape[2] < 2:
        raise ValueError(f"crops must be square and at least 2 pixels wide, got {list(crops.shape[2:])}")


def _check_colour(recipe: View, channels: int) -> None:
    for name in ("saturation", "hue", "grayscale"):
        if channels == 1 and getattr(recipe, name):
            raise ConfigError(
                f"views.{name}={getattr(recipe, name)} needs colour, but the images have 1 channel; set it to 0"
            )


def _to_unit(crops: Tensor) -> Tensor:
    return crops.to(torch.float32).div_(255)


def _normalise(x: Tensor) -> Tensor:
    return (x - 0.5).div_(0.5)


def _luma(x: Tensor) -> Tensor:
    """Grey value [r, 1, S, S]; one channel is grey already."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return (red * _LUMA[0]).add_(green * _LUMA[1]).add_(blue * _LUMA[2])


def _image_mean(x: Tensor) -> Tensor:
    """Mean per image, [r, ...] -> [r, 1, 1, 1], by halving: the order of summation never depends on r."""
    total = x.flatten(1)
    if torch.compiler.is_compiling():
        return total.mean(1).view(-1, 1, 1, 1)
    count = total.shape[1]
    while total.shape[1] > 1:
        half, odd = divmod(total.shape[1], 2)
        folded = total[:, :half] + total[:, half : 2 * half]
        if odd:
            folded[:, :1] += total[:, -1:]
        total = folded
    return (total / count).view(-1, 1, 1, 1)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor * x + (1 - factor) * other, clamped to [0, 1]."""
    factor = factor.view(-1, 1, 1, 1)
    return (x * factor).add_(other * (1 - factor)).clamp_(0, 1)
