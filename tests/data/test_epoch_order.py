"""The order of an epoch, place by place, against the whole order sorted at once; and rows of roles against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from distunlearn.data.loading import epoch_order
from distunlearn.data.loading.epoch_order import BLOCK_SHARDS, EpochOrder
from distunlearn.data.manifest import role_rows
from distunlearn.data.manifest.role_rows import RoleRows
from distunlearn.data.schedule import permutation, random_words

KEY = (3, "samples of", "retain", 2)


def made(sizes: list[int], seed: int = 3) -> tuple[EpochOrder, np.ndarray, np.ndarray]:
    starts = np.append(0, np.cumsum(sizes)).astype(np.int64)
    shards = permutation(len(sizes), seed, "shards")
    return EpochOrder([str(n) for n in range(starts[-1])], starts, shards, KEY), starts, shards


def sorted_at_once(starts: np.ndarray, shards: np.ndarray) -> list[str]:
    """Every sample by (block of its shard, word), with all of them in memory."""
    shard_of = np.repeat(np.arange(len(shards)), np.diff(starts))
    block = np.argsort(shards)[shard_of] // BLOCK_SHARDS
    return [str(n) for n in np.lexsort((random_words(len(shard_of), *KEY), block))]


@pytest.mark.parametrize("sizes", [[5], [1] * 30, [3, 7, 1, 40, 2, 2, 9, 11, 5, 6, 1], list(range(1, 60))])
def test_the_order_is_that_of_sorting_all_samples(sizes):
    order, starts, shards = made(sizes)
    assert list(order) == sorted_at_once(starts, shards)
    assert [order[k] for k in reversed(range(len(order)))][::-1] == list(order)
    with pytest.raises(IndexError):
        order[len(order)]


@pytest.mark.parametrize("sizes", [[5000], [300, 700, 100, 4000, 20, 20, 900, 1100, 500, 600, 1]])
def test_a_large_block_is_permuted_place_by_place_and_stays_together(sizes, monkeypatch):
    """Every sample once, blocks in the same places as before, in an order that is none of sorting."""
    whole, starts, shards = made(sizes)
    before = [int(i) for i in whole]
    monkeypatch.setattr(epoch_order, "SORTED", 50)
    monkeypatch.setattr(epoch_order, "WINDOW", 64)
    found = [int(i) for i in made(sizes)[0]]
    assert sorted(found) == sorted(before) and found != before
    shard_of = np.repeat(np.arange(len(shards)), np.diff(starts))
    block = np.argsort(shards) // BLOCK_SHARDS
    assert (block[shard_of[found]] == block[shard_of[before]]).all()
    assert np.mean(shard_of[found][1:] == shard_of[found][:-1]) < 0.7 or len(sizes) == 1


def test_little_is_kept_of_an_order(monkeypatch):
    order, _, _ = made([100] * 200)
    list(order)
    kept = sum(len(piece) for piece in order._known.values())
    assert kept <= epoch_order.KEPT * BLOCK_SHARDS * 100


@pytest.mark.parametrize("window", [1, 7, 64, 1 << 16])
def test_rows_of_roles_are_those_that_numpy_finds(window, monkeypatch):
    monkeypatch.setattr(role_rows, "WINDOW", window)
    role = np.random.default_rng(0).integers(0, 5, 448).astype(np.uint8)
    borders = np.array([0, 0, 3, 64, 64, 200, 447, 448])
    for codes in ([1], [0, 3], [4, 2, 1], [7]):
        expected = np.flatnonzero(np.isin(role, codes))
        rows = RoleRows(role, codes, borders)
        assert len(rows) == len(expected) and (rows[:] == expected).all()
        assert rows.starts.tolist() == np.searchsorted(expected, borders).tolist()
        if len(expected):
            places = np.random.default_rng(1).integers(-len(expected), len(expected), 50)
            assert (rows[places] == expected[places]).all() and rows[5] == expected[5] and rows[-1] == expected[-1]
            assert (rows[3:40:5] == expected[3:40:5]).all()
        with pytest.raises(IndexError):
            rows[len(expected)]
