"""Trees of RFC 9162 against published vectors, and against the recursive definition for every size to 40."""

from __future__ import annotations

import hashlib

import pytest

from distunlearn.verify.merkle import inclusion, is_included, leaf_hash, root

# Inputs and roots of the reference test data of Certificate Transparency (merkletree/merkle_tree_test.cc).
INPUTS = [bytes.fromhex(text) for text in (
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
)]  # fmt: skip
ROOTS = (
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)
LEAVES = [leaf_hash(bytes([number])) for number in range(40)]


def defined(leaves: list[bytes]) -> bytes:
    """MTH of RFC 9162, 2.1.1, word for word."""
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + defined(leaves[:k]) + defined(leaves[k:])).digest()


def test_published_roots():
    leaves = [leaf_hash(entry) for entry in INPUTS]
    assert [root(leaves[: n + 1]).hex() for n in range(8)] == list(ROOTS)
    assert root([]).hex() == hashlib.sha256().hexdigest()


@pytest.mark.parametrize("size", range(1, 41))
def test_every_leaf_is_included_at_its_place_alone(size):
    leaves = LEAVES[:size]
    top = root(leaves)
    assert top == defined(leaves)
    for place in range(size):
        proof = inclusion(leaves, place)
        assert is_included(leaves[place], place, size, proof, top)
        assert not any(is_included(leaves[place], p, size, proof, top) for p in range(size + 1) if p != place)
        assert not is_included(leaf_hash(b"other"), place, size, proof, top)
        assert not is_included(leaves[place], place, size, [*proof, top], top)
        assert not (proof and is_included(leaves[place], place, size, proof[:-1], top))
