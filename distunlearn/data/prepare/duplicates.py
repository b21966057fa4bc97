"""Images that are there twice: exact copies by digest, near-copies by a perceptual hash.

A forgotten image whose copy stays among the retained ones is not forgotten. Exact copies are refused, forgotten too, or
kept, as `data.copies` says. An image with the bytes of a member is no non-member and loses its role. Near-copies
(re-encoded, resized) are counted.

The perceptual hash is the usual one of 64 bits: the image in grey at 32 x 32, its discrete cosine transform, of that
the 8 x 8 lowest frequencies, each above the median of all but the first or not (Zauner, "Implementation and
Benchmarking of Perceptual Image Hash Functions", 2010). It knows no crops, rotations or mirrored images, and small or
simple images (digits, icons) share hashes without being copies: a count is a hint to look, never a proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from scipy.fft import dctn

from distunlearn.data.manifest.columns import NO_HASH, Columns
from distunlearn.data.manifest.records import CODE, UNUSED
from distunlearn.data.prepare.forget_list import some
from distunlearn.data.sources.decode import open_image
from distunlearn.errors import DataError, UndecodableError

_SIDE, _LOW = 32, 8
# Of equal bytes the first one stays.
NON_MEMBERS = ("third_party", "calibration", "third_party_audit", "holdout", "watch")
_PIECE = 1 << 20  # pairs compared at a time


def exact_copies(sha256: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows of the first with the bytes of one of the second, rows of those of the second).

    sha256: uint8 [n, 32]. first, second: rows, int64.
    """
    keys = np.ascontiguousarray(sha256).view("<u8")[:, 0]  # 8 of the 32 bytes to find, all of them to decide
    first, second = first[np.isin(keys[first], keys[second])], second[np.isin(keys[second], keys[first])]
    ours, theirs = ([sha256[row].tobytes() for row in rows.tolist()] for rows in (first, second))
    common = set(ours) & set(theirs)
    return tuple(rows[[digest in common for digest in digests]] if len(rows) else rows
                 for rows, digests in ((first, ours), (second, theirs)))  # type: ignore[return-value]  # fmt: skip


def drop_copies(sha256: np.ndarray, roles: np.ndarray, order: Sequence[Sequence[int]], unused: int) -> np.ndarray:
    """Roles by which no image of a later group of `order` has the bytes of one of an earlier group: it is `unused`.

    sha256: uint8 [n, 32]. roles: integers [n].
    """
    roles = roles.copy()
    for place in range(1, len(order)):
        earlier = np.flatnonzero(np.isin(roles, [code for group in order[:place] for code in group]))
        later = np.flatnonzero(np.isin(roles, order[place]))
        roles[exact_copies(sha256, later, earlier)[0]] = unused
    return roles


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
    gone, kept = exact_copies(sha256, np.flatnonzero(roles == forget), np.flatnonzero(roles == retain))
    facts = {"forget_with_copy_in_retain": len(gone), "copies_in_retain": len(kept), "copies_policy": policy}
    if not len(kept) or policy == "keep":
        return roles, facts
    if policy == "refuse":
        named = some([ids[int(row)] for row in gone[:6]], len(gone))
        raise DataError(
            f"Of the images to forget, {named} have {len(kept)} exact copies among the images to retain, such "
            f"as {ids[int(kept[0])]!r}; set data.copies=forget to forget those too, or data.copies=keep to "
            "keep them and have it recorded."
        )
    roles = roles.copy()
    roles[kept] = forget
    return roles, facts


def duplicate_facts(columns: Columns, policy: str, near_distance: int | None) -> tuple[np.ndarray, dict[str, Any]]:
    """(roles uint8 [n] after the policy for exact copies, facts of the request).

    Raises:
        DataError: exact copies of forgotten images among the retained, and the policy is to refuse them; or near-copies
            are to be counted, and the index has no hashes.
    """
    role, facts = settle_roles(columns, columns.role, policy)
    if near_distance is not None:
        hashes, known = columns.near, columns.near != NO_HASH
        if len(columns) and not known.any() and (columns.width > 0).any():
            raise DataError(
                "The index of these shards has no perceptual hashes (data.near_distance was null); set "
                "data.near_distance=null, or remove index.arrow and summary.json and index them again."
            )
        forget, retain = (np.flatnonzero((role == CODE[name]) & known) for name in ("forget", "retain"))
        members = np.concatenate([forget, retain])
        near_members = {}
        for name in NON_MEMBERS:
            rows = np.flatnonzero((role == CODE[name]) & known)
            near_members[name] = int(near_copies(hashes[rows], hashes[members], near_distance)[0].sum())
        facts["near_copies_of_members"] = {name: count for name, count in near_members.items() if count}
        near_forget, near_retain = near_copies(hashes[forget], hashes[retain], near_distance)
        facts["near_copies"] = {
            "distance": near_distance,
            "forget": int(near_forget.sum()),
            "retain": int(near_retain.sum()),
        }
    return role, facts


def settle_roles(columns: Columns, role: np.ndarray, policy: str) -> tuple[np.ndarray, dict[str, Any]]:
    """(roles after the policy, without non-members that have the bytes of a member or of another role; facts)."""
    role, facts = settle_copies(columns.ids, columns.sha256, role, CODE["forget"], CODE["retain"], policy)
    order = [(CODE["retain"], CODE["forget"]), *((CODE[name],) for name in NON_MEMBERS)]
    settled = drop_copies(columns.sha256, role, order, CODE[UNUSED])
    dropped = {name: int(((role == CODE[name]) & (settled != role)).sum()) for name in NON_MEMBERS}
    facts["dropped_copies"] = {name: count for name, count in dropped.items() if count}
    return settled, facts


def perceptual_hash(data: bytes, sample_id: str, max_pixels: int) -> int:
    """64 bits of an encoded image, as an unsigned number.

    Raises:
        DataError: as `decode.check_header`, or the image cannot be decoded.
    """
    return hash_of(grey_image(data, sample_id, max_pixels))


def grey_image(data: bytes, sample_id: str, max_pixels: int) -> Image.Image:
    """The image in grey, upright, and no larger than its hash needs. Errors: see `perceptual_hash`."""
    image = open_image(data, sample_id, max_pixels)
    try:
        image.draft("L", (2 * _SIDE, 2 * _SIDE))  # JPEG only: decodes at a fraction of the size
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode not in ("L", "RGB"):
            image = image.convert("RGBA").convert("RGB")
        return image.convert("L")
    except Exception as error:  # hostile bytes, see decode
        raise UndecodableError(f"The image {sample_id!r} cannot be decoded; replace the file.") from error


def hash_of(image: Image.Image, box: tuple[float, float, float, float] | None = None) -> int:
    """The hash of a grey image, or of a box in it (left, upper, right, lower, pixels)."""
    small = image.resize((_SIDE, _SIDE), Image.Resampling.BOX, box)
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
            close = count_bits(forget[partners] ^ retain[rows]) <= distance
            near_forget[partners[close]] = True
            near_retain[rows[close]] = True
    return near_forget, near_retain


def _pieces(count: np.ndarray) -> list[np.ndarray]:
    """Rows with partners, in groups with about _PIECE pairs each."""
    rows = np.flatnonzero(count)
    group = np.cumsum(count[rows]) // _PIECE
    return np.split(rows, np.flatnonzero(np.diff(group)) + 1) if len(rows) else []


def count_bits(words: np.ndarray) -> np.ndarray:
    """Number of ones in each uint64, in the same shape."""
    return np.unpackbits(words.reshape(-1, 1).view(np.uint8), axis=1).sum(axis=1).reshape(words.shape)
