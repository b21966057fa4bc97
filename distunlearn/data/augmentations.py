"""Random views as tensor batches, every draw a pure function of (seed, epoch, sample id, view).

Draws come from a counter-based generator (the idea of Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011) built on the SplitMix64 finaliser (Steele, Lea and Flood, OOPSLA 2014, figure 15): no
global generator, no state to save. Which batch, order, rank or attempt a sample sits in changes no bit
of its view. To keep that promise the pixel arithmetic uses per-pixel operations and fixed summation
trees only: no convolution, matrix product or library reduction, whose order of summation may depend on
the batch size, and no transcendental function over pixels.

Crop, rotation and flip are one bilinear resample. Colour operations follow torchvision's formulas
(`torchvision.transforms.v2.functional`), in a fixed order: brightness, contrast, saturation, hue,
grayscale, blur, noise.

Shapes: n = images, C = 1 or 3 channels, S = side in pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distunlearn.common.device import on_device
from distunlearn.common.random import GAMMA, MIX_1, MIX_2, finalise
from distunlearn.config.schema import ViewsConfig
from distunlearn.errors import ConfigError

# One draw each per view, whatever is switched on: turning one operation on leaves the draws of the others alone.
_DRAWS = (
    "area", "aspect", "centre_x", "centre_y", "angle", "flip",
    "brightness", "contrast", "saturation", "hue", "grayscale", "blur", "sigma",
)  # fmt: skip

_NOISE = 0x6E6F697365000000  # a tag for the noise stream

_ASPECT = math.log(4 / 3)  # of a crop: log-uniform in 3/4 .. 4/3 (Inception crops, Szegedy et al. 2015)
_BLUR_SIGMA = (0.1, 2.0)  # pixels (Chen et al. 2020, SimCLR, appendix A)
_TAPS = ("tap_0", "tap_1", "tap_2")
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as torchvision rounds it
_TABLE_BITS = 16


@lru_cache(maxsize=1 << 18)
def _id_hash(sample_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "little", signed=True)


def id_hashes(ids: Sequence[str]) -> np.ndarray:
    """64-bit hashes (BLAKE2b) of sample ids, int64 [n]; the same in every process and version."""
    return np.fromiter(map(_id_hash, ids), dtype=np.int64, count=len(ids))


def uniforms(seed: int, epochs: np.ndarray, ids: Sequence[str], view: int, draws: int) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2^-24, float32 [n, draws].

    Row i is a function of (seed, epochs[i], ids[i], view) alone, and its first k numbers do not depend on
    `draws`.

    Args:
        seed, view: integers >= 0.
        epochs: integers >= 0, [n].
        ids: n sample ids.
        draws: numbers per sample, >= 0.

    Raises:
        ValueError: wrong lengths, types or signs.
    """
    return torch.from_numpy(_uniforms(seed, epochs, ids, view, draws))


def _uniforms(seed: int, epochs: np.ndarray, ids: Sequence[str], view: int, draws: int) -> np.ndarray:
    """`uniforms` without a tensor: tensors without values (of a cost estimate) cannot be read."""
    if draws < 0:
        raise ValueError(f"draws is {draws}, it must be >= 0")
    counters = np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(GAMMA)
    bits = finalise(_keys(seed, epochs, ids, view)[:, None] + counters)
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def make_view(
    images: Tensor,
    cfg: ViewsConfig,
    *,
    seed: int,
    epochs: np.ndarray,
    ids: Sequence[str],
    view: int,
    compiled: bool = False,
) -> Tensor:
    """One random view of each image, float32 [n, C, S, S] in [-1, 1], on the images' device.

    Args:
        images: uint8 [n, C, S, S].
        cfg: which operations, how strong.
        seed, epochs, ids, view: the key of every draw, see `uniforms`.
        compiled: by a few fused kernels of torch.compile in place of one an operation; the same but for rounding,
            which then may go by n. Without effect where there is noise.

    Returns:
        (x - 0.5) / 0.5 of the augmented x in [0, 1].

    Raises:
        ConfigError: a colour operation on one channel.
        ValueError: wrong shapes, types or lengths.
    """
    _check_images(images)
    n, channels, side, _ = images.shape
    _check_colour(cfg, channels)
    if len(ids) != n:
        raise ValueError(f"{n} images came with {len(ids)} ids")
    u = _uniforms(seed, epochs, ids, view, len(_DRAWS)).astype(np.float64)
    params = _tables(cfg, _parameters(cfg, dict(zip(_DRAWS, u.T, strict=True))), side)
    if n == 0:
        return _to_unit(images)
    p = _on_device(params, images.device)
    if compiled and not cfg.noise:
        return _compiled(cfg)(images, p)
    x = _coloured(images, cfg, p)
    if cfg.blur:
        rows = np.flatnonzero(params["blur"])
        if rows.size:
            chosen = on_device(rows, x.device)
            taps = [p[name].index_select(0, chosen) for name in _TAPS if name in p]
            x = x.index_copy(0, chosen, _blur(x.index_select(0, chosen), taps))
    if cfg.noise:
        normals = _normals(_keys(seed, epochs, ids, view), x[0].numel(), x.device).view_as(x)
        x = normals.mul_(cfg.noise).add_(x).clamp_(0, 1)
    return _normalise(x)


@lru_cache(maxsize=8)
def _compiled(cfg: ViewsConfig) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
    return torch.compile(partial(_fused, cfg=cfg), dynamic=False)


def _fused(images: Tensor, p: Mapping[str, Tensor], cfg: ViewsConfig) -> Tensor:
    """All of a view but noise, without looking at a value: what is blurred is chosen at the end."""
    x = _coloured(images, cfg, p)
    if cfg.blur:
        x = torch.where(p["blur"] > 0, _blur(x, [p[name] for name in _TAPS if name in p]), x)
    return _normalise(x)


def plain_view(images: Tensor) -> Tensor:
    """The images as they are, uint8 [n, C, S, S] -> float32 (x - 0.5) / 0.5 in [-1, 1]; for kNN and linear probe."""
    _check_images(images)
    return _normalise(_to_unit(images))


# -- draws -------------------------------------------------------------------------------------------------------


def _keys(seed: int, epochs: np.ndarray, ids: Sequence[str], view: int) -> np.ndarray:
    """uint64 [n], one well-mixed stream start per (seed, epoch, id, view)."""
    epochs = np.asarray(epochs)
    if epochs.shape != (len(ids),) or (epochs.size and epochs.dtype.kind not in "iu"):
        raise ValueError(f"epochs must be {len(ids)} integers, one per id, got {epochs.dtype} {list(epochs.shape)}")
    if seed < 0 or view < 0 or (epochs.size and epochs.min() < 0):
        raise ValueError(f"seed ({seed}), view ({view}) and epochs must not be negative")
    keys = np.full(len(ids), seed & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    for part in (epochs.astype(np.uint64), id_hashes(ids).view(np.uint64), np.uint64(view)):
        keys = finalise(keys + np.uint64(GAMMA)) ^ part
    return finalise(keys + np.uint64(GAMMA))


def _signed(value: int) -> int:
    """The int64 of the same 64 bits: torch has no uint64 arithmetic."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


def _xor_shift(z: Tensor, shift: int) -> Tensor:
    """z ^ (z >> shift) with a logical shift, on int64."""
    return (z >> shift).bitwise_and_((1 << (64 - shift)) - 1).bitwise_xor_(z)


@lru_cache(maxsize=4)
def _normal_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Box-Muller's radius sqrt(-2 ln u) and cos(2 pi u) at the midpoints of 2^16 cells of (0, 1), float32."""
    u = (np.arange(1 << _TABLE_BITS) + 0.5) / (1 << _TABLE_BITS)
    tables = np.sqrt(-2 * np.log(u)), np.cos(2 * np.pi * u)
    radius, cosine = (torch.from_numpy(t.astype(np.float32)).to(device) for t in tables)
    return radius, cosine


def _normals(keys: np.ndarray, count: int, device: torch.device) -> Tensor:
    """Standard normal numbers, float32 [n, count], by Box-Muller (1958) on a hash per four numbers.

    The 64 bits are two radii and two angles of 16 bits each, so logarithm and cosine are table look-ups, alike
    on every device; the sine is the cosine a quarter of the table away. Numbers stay below 4.9 in size.
    """
    quarter, mask = 1 << (_TABLE_BITS - 2), (1 << _TABLE_BITS) - 1
    radius, cosine = _normal_tables(device)
    start = on_device(keys.view(np.int64) ^ np.int64(_signed(_NOISE)), device)
    counters = torch.arange(1, -(-count // 4) + 1, dtype=torch.int64, device=device) * _signed(GAMMA)
    z = start[:, None] + counters
    z = _xor_shift(z, 30) * _signed(MIX_1)
    z = _xor_shift(z, 27) * _signed(MIX_2)
    z = _xor_shift(z, 31)
    parts = [(z >> (16 * k)).bitwise_and_(mask) for k in range(4)]
    numbers = []
    for first, angle in ((0, 1), (2, 3)):
        r = radius[parts[first]]
        numbers += [r * cosine[parts[angle]], r * cosine[(parts[angle] - quarter) & mask]]
    return torch.stack(numbers, dim=-1).flatten(1)[:, :count]


def _parameters(cfg: ViewsConfig, u: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Per-sample parameters of the operations that are on, float64 [n], from uniforms [n].

    The crop keeps an area of exactly `area` of the image: its log-aspect is uniform in
    +-log(4/3), narrowed to what still fits into the image (so an area of 1 is the whole image).
    """
    area = cfg.crop_scale_min + (1 - cfg.crop_scale_min) * u["area"]
    aspect = np.exp((2 * u["aspect"] - 1) * np.minimum(_ASPECT, -np.log(area)))
    width, height = np.sqrt(area * aspect), np.sqrt(area / aspect)
    angle = np.deg2rad(cfg.rotation) * (2 * u["angle"] - 1)
    params = {
        "width": width,
        "height": height,
        "centre_x": (1 - width) * (2 * u["centre_x"] - 1),
        "centre_y": (1 - height) * (2 * u["centre_y"] - 1),
        "cos": np.cos(angle),
        "sin": np.sin(angle),
        "mirror": np.where(u["flip"] < cfg.flip, -1.0, 1.0),
        "grayscale": (u["grayscale"] < cfg.grayscale).astype(np.float64),
        "blur": (u["blur"] < cfg.blur).astype(np.float64),
        "sigma": _BLUR_SIGMA[0] + (_BLUR_SIGMA[1] - _BLUR_SIGMA[0]) * u["sigma"],
    }
    for name in ("brightness", "contrast", "saturation"):
        strength = getattr(cfg, name)
        if strength:
            low = max(0.0, 1 - strength)
            params[name] = low + (1 + strength - low) * u[name]
    if cfg.hue:
        params["hue"] = cfg.hue * (2 * u["hue"] - 1)
    return params


def _tables(cfg: ViewsConfig, p: Mapping[str, np.ndarray], side: int) -> dict[str, np.ndarray]:
    """What the pixels are computed with, float64 [n] each, from `_parameters`; images have `side` pixels.

    a to f: the crop, its rotation and flip take pixel (x, y) from (a x + b y + c, d x + e y + f).
    """
    found = {
        "a": p["width"] * p["mirror"] * p["cos"], "b": -p["height"] * p["sin"], "c": p["centre_x"],
        "d": p["width"] * p["mirror"] * p["sin"], "e": p["height"] * p["cos"], "f": p["centre_y"],
    }  # fmt: skip
    found |= {name: p[name] for name in ("brightness", "contrast", "saturation") if name in p}
    if "hue" in p:
        found |= {"hue_cos": np.cos(2 * np.pi * p["hue"]), "hue_sin": np.sin(2 * np.pi * p["hue"])}
    if cfg.grayscale:
        found["grayscale"] = p["grayscale"]
    if cfg.blur:
        reach = 1 if side < 16 else 2
        taps = np.exp(-0.5 * (np.arange(reach + 1)[:, None] / p["sigma"]) ** 2)
        taps /= taps[0] + 2 * taps[1:].sum(0)
        found |= dict(zip(_TAPS, taps, strict=False)) | {"blur": p["blur"]}
    return found


def _on_device(params: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """float32 [n, 1, 1, 1] each, in one copy."""
    table = on_device(np.stack(list(params.values())).astype(np.float32), device)
    return dict(zip(params, table[..., None, None, None].unbind(0), strict=True))


# -- pixels ------------------------------------------------------------------------------------------------------


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"images must be uint8 of shape [n, 1 or 3, S, S], got {found}")
    if images.shape[2] != images.shape[3] or images.shape[2] < 2:
        raise ValueError(f"images must be square and at least 2 pixels wide, got {list(images.shape[2:])}")


def _check_colour(cfg: ViewsConfig, channels: int) -> None:
    for name in ("saturation", "hue", "grayscale"):
        if channels == 1 and getattr(cfg, name):
            raise ConfigError(
                f"views.{name}={getattr(cfg, name)} needs colour, but the images have 1 channel; set it to 0"
            )


def _to_unit(images: Tensor) -> Tensor:
    return images.to(torch.float32).div_(255)


def _normalise(x: Tensor) -> Tensor:
    return (x - 0.5).div_(0.5)


def _coloured(images: Tensor, cfg: ViewsConfig, p: Mapping[str, Tensor]) -> Tensor:
    """Crop, flip and colour: uint8 [n, C, S, S] -> float32 in [0, 1]."""
    x = _jitter(_resample(_to_unit(images), cfg, p), p)
    return torch.where(p["grayscale"] > 0, _luma(x), x) if cfg.grayscale else x


def _resample(x: Tensor, cfg: ViewsConfig, p: Mapping[str, Tensor]) -> Tensor:
    """Crop, rotation about the crop's centre, and flip, in one bilinear resample of [n, C, S, S].

    What a rotated crop takes from outside the image is the image's reflection.
    """
    if cfg.crop_scale_min == 1 and not cfg.rotation and not cfg.flip:
        return x
    n, _, side, _ = x.shape
    # Pixel centres in [-1, 1]; in place of F.affine_grid, whose matrix product may round by batch size.
    line = (torch.arange(side, dtype=torch.float32, device=x.device) * 2 + 1) / side - 1
    across, down = line.view(1, 1, side), line.view(1, side, 1)
    a, b, c, d, e, f = (p[name].view(n, 1, 1) for name in "abcdef")
    if torch.compiler.is_compiling():
        grid = torch.stack([a * across + (b * down + c), d * across + (e * down + f)], dim=-1)
    else:
        grid = x.new_empty(n, side, side, 2)
        torch.add(a * across, b * down + c, out=grid[..., 0])
        torch.add(d * across, e * down + f, out=grid[..., 1])
    padding = "reflection" if cfg.rotation else "border"
    return F.grid_sample(x, grid, mode="bilinear", padding_mode=padding, align_corners=False)


def _luma(x: Tensor) -> Tensor:
    """Grey value [n, 1, S, S]; one channel is grey already."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return (red * _LUMA[0]).add_(green * _LUMA[1]).add_(blue * _LUMA[2])


def _image_mean(x: Tensor) -> Tensor:
    """Mean per image, [n, ...] -> [n, 1, 1, 1], by halving: the order of summation never depends on n."""
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
    return (x * factor).add_(other * (1 - factor)).clamp_(0, 1)


def _jitter(x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """Brightness, contrast (about the image's grey mean), saturation and hue, each clamped to [0, 1]."""
    if "brightness" in p:
        x = (x * p["brightness"]).clamp_(0, 1)
    if "contrast" in p:
        x = _blend(x, _image_mean(_luma(x)), p["contrast"])
    if "saturation" in p:
        x = _blend(x, _luma(x), p["saturation"])
    if "hue_cos" in p:
        x = _rotate_hue(x, p["hue_cos"], p["hue_sin"])
    return x


def _rotate_hue(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the chroma plane of YIQ (NTSC 1953) by an angle, [n, 3, S, S]; luma stays.

    Not HSV as in torchvision: a rotation is linear, keeps grey grey, and costs no branches.
    """
    red, green, blue = x.split(1, dim=1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    in_phase = 0.595716 * red - 0.274453 * green - 0.321263 * blue
    quadrature = 0.211456 * red - 0.522591 * green + 0.311135 * blue
    turned_i, turned_q = cos * in_phase - sin * quadrature, sin * in_phase + cos * quadrature
    channels = (
        luma + 0.9563 * turned_i + 0.6210 * turned_q,
        luma - 0.2721 * turned_i - 0.6474 * turned_q,
        luma - 1.1070 * turned_i + 1.7046 * turned_q,
    )
    return torch.cat(channels, dim=1).clamp_(0, 1)


def _blur(x: Tensor, taps: Sequence[Tensor]) -> Tensor:
    """Separable Gaussian, reflected at the border; taps: [n, 1, 1, 1] each, from the middle outwards."""
    reach = len(taps) - 1
    for dim in (2, 3):
        size = x.shape[dim]
        padded = F.pad(x, (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0), mode="reflect")
        x = padded.narrow(dim, reach, size) * taps[0]
        for k in range(1, reach + 1):
            pair = padded.narrow(dim, reach - k, size) + padded.narrow(dim, reach + k, size)
            x.add_(pair.mul_(taps[k]))
    return x
