"""Images that are there twice: exact copies by digest, near-copies by a perceptual hash.

A forgotten image whose copy stays among the retained ones is not forgotten. Exact copies are refused, forgotten too, or
kept, as `data.copies` says; near-copies (re-encoded, resized) are counted.

The perceptual hash is the usual one of 64 bits: the image in grey at 32 x 32, its discrete cosine transform, of that
the 8 x 8 lowest frequencies, each above the median of all but the first or not (Zauner, "Implementation and
Benchmarking of Perceptual Image Hash Functions", 2010). It knows no crops, rotations or mirrored images, and small or
simple images (digits, icons) share hashes without being copies: a count is a hint to look, never a proof.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from scipy.fft import dctn

from distunlearn.data.prepare.forget_list import some
from distunlearn.data.sources.decode import check_header
from distunlearn.errors import DataError

_SIDE, _LOW = 32, 8
_PIECE = 1 << 20  # pairs compared at a time


@dataclass(frozen=True)
class Copies:
    """Exact copies of images to forget.

    forget: rows of images to forget that have a copy among the retained. retain: rows of those copies. elsewhere: how
    many images of other roles are copies, which makes strangers or held-out images out of what was trained on.
    """

    forget: np.ndarray
    retain: np.ndarray
    elsewhere: int


def exact_copies(sha256: np.ndarray, forget: np.ndarray, retain: np.ndarray) -> Copies:
    """Find images with the same bytes. sha256: uint8 [n, 32]; forget, retain: bool [n]."""
    keys = np.ascontiguousarray(sha256).view("<u8")[:, 0]  # 8 of the 32 bytes to find, all of them to decide
    gone = np.flatnonzero(forget)
    wanted = {sha256[row].tobytes(): False for row in gone.tolist()}
    retained, elsewhere = [], 0
    for row in np.flatnonzero(np.isin(keys, keys[gone]) & ~forget).tolist():
        digest = sha256[row].tobytes()
        if digest not in wanted:
            continue
        if retain[row]:
            wanted[digest] = True
            retained.append(row)
        else:
            elsewhere += 1
    with_copy = [row for row in gone.tolist() if wanted[sha256[row].tobytes()]]
    return Copies(np.array(with_copy, dtype=np.int64), np.array(retained, dtype=np.int64), elsewhere)


def settle_copies(
    ids: Sequence[str], sha256: np.ndarray, roles: np.ndarray, forget: int, retain: int, policy: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """Roles after the policy, and facts for the summary.

    Args:
        sha256: uint8 [n, 32]. roles: integers [n], of which `forget` and `retain` are two.
        policy: refuse, forget (the copies are forgotten too) or keep.

    Raises:
        DataError: there are copies and the policy is to refuse them.
    """
    found = exact_copies(sha256, roles == forget, roles == retain)
    facts = {
        "forget_with_copy_in_retain": len(found.forget),
        "copies_in_retain": len(found.retain),
        "copies_in_other_roles": found.elsewhere,
        "copies_policy": policy,
    }
    if not len(found.retain) or policy == "keep":
        return roles, facts
    if policy == "refuse":
        named = some([ids[int(row)] for row in found.forget[:6]], len(found.forget))
        raise DataError(
            f"Of the images to forget, {named} have {len(found.retain)} exact copies among the images to retain, such "
            f"as {ids[int(found.retain[0])]!r}; set data.copies=forget to forget those too, or data.copies=keep to "
            "keep them and have it recorded."
        )
    roles = roles.copy()
    roles[found.retain] = forget
    return roles, facts


def perceptual_hash(data: bytes, sample_id: str, max_pixels: int) -> int:
    """64 bits of an encoded image, as an unsigned number.

    Raises:
        DataError: as `decode.check_header`, or the image cannot be decoded.
    """
    kind = check_header(data, sample_id, max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        image.draft("L", (2 * _SIDE, 2 * _SIDE))  # JPEG only: decodes at a fraction of the size
        image.load()
        if image.mode not in ("L", "RGB"):
            image = image.convert("RGBA").convert("RGB")
        small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    except Exception as error:  # hostile bytes, see decode
        raise DataError(f"The image {sample_id!r} ({kind}) cannot be decoded; replace the file.") from error
    low = dctn(np.asarray(small, dtype=np.float64))[:_LOW, :_LOW].ravel()
    bits = low > np.median(low[1:]) + 1e-6  # a flat image has no frequencies: rounding must not draw its bits
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_copies(forget: np.ndarray, retain: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """(bool [f], bool [r]): which hashes have one of the other side within `distance` bits (0 to 16).

    Two words of 64 bits that differ in at most d bits agree in one of d + 1 parts: only such pairs are compared.

    Args:
        forget, retain: uint64 [f], [r].
    """
    near_forget, near_retain = np.zeros(len(forget), dtype=bool), np.zeros(len(retain), dtype=bool)
    borders = np.linspace(0, 64, distance + 2).astype(int)
    for low, high in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        mask = np.uint64(((1 << (high - low)) - 1) << low)
        order = np.argsort(forget & mask, kind="stable")
        parts = (forget & mask)[order]
        first = np.searchsorted(parts, retain & mask, "left")
        count = np.searchsorted(parts, retain & mask, "right") - first
        for some_rows in _pieces(count):
            rows = np.repeat(some_rows, count[some_rows])
            starts = np.repeat(first[some_rows] - np.cumsum(count[some_rows]) + count[some_rows], count[some_rows])
            partners = order[starts + np.arange(len(rows))]
            close = _bits(forget[partners] ^ retain[rows]) <= distance
            near_forget[partners[close]] = True
            near_retain[rows[close]] = True
    return near_forget, near_retain


def _pieces(count: np.ndarray) -> list[np.ndarray]:
    """Rows with partners, in groups with about _PIECE pairs each."""
    rows = np.flatnonzero(count)
    group = np.cumsum(count[rows]) // _PIECE
    return np.split(rows, np.flatnonzero(np.diff(group)) + 1) if len(rows) else []


def _bits(words: np.ndarray) -> np.ndarray:
    """Number of ones in each uint64."""
    return np.unpackbits(words.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1)
