"""Trees of RFC 9162 (Certificate Transparency, version 2), section 2.1: root, inclusion; SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def leaf_hash(leaf: bytes) -> bytes:
    """The hash of an entry."""
    return hashlib.sha256(b"\x00" + leaf).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def _split(n: int) -> int:
    """The largest power of two below n >= 2."""
    return 1 << ((n - 1).bit_length() - 1)


def root(leaves: Sequence[bytes]) -> bytes:
    """Root of the tree over these leaf hashes, in this order; of none it is the hash of nothing."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    level: list[bytes] = list(leaves)
    while len(level) > 1:  # an odd last node moves up as it is, which gives the very tree of the RFC
        pairs = [_node(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(level) - len(level) % 2 :]
    return level[0]


def inclusion(leaves: Sequence[bytes], place: int) -> list[bytes]:
    """Proof that the leaf hash at `place` is in the tree over `leaves`."""
    assert 0 <= place < len(leaves), (place, len(leaves))
    if len(leaves) == 1:
        return []
    k = _split(len(leaves))
    if place < k:
        return [*inclusion(leaves[:k], place), root(leaves[k:])]
    return [*inclusion(leaves[k:], place - k), root(leaves[:k])]


def is_included(leaf: bytes, place: int, size: int, proof: Sequence[bytes], expected: bytes) -> bool:
    """RFC 9162, 2.1.3.2. leaf: leaf hash; place: its number; size: leaves of the tree; expected: the tree's root."""
    if not 0 <= place < size:
        return False
    number, last, found = place, size - 1, leaf
    for part in proof:
        if last == 0:
            return False
        if number & 1 or number == last:
            found = _node(part, found)
            while not number & 1 and number:
                number, last = number >> 1, last >> 1
        else:
            found = _node(found, part)
        number, last = number >> 1, last >> 1
    return last == 0 and found == expected
