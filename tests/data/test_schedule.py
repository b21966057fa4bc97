from __future__ import annotations

import collections
import hashlib

import numpy as np
import pytest

from distunlearn.data.schedule import Cycle, permutation, random_words, rank_slice

MASK = (1 << 64) - 1


def splitmix64_reference(state: int) -> tuple[int, int]:
    """One step of splitmix64 in Python integers: (next state, output)."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return state, z ^ (z >> 31)


def reference_words(key: bytes, count: int) -> list[int]:
    state = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    words = []
    for _ in range(count):
        state, word = splitmix64_reference(state)
        words.append(word)
    return words


def test_random_words_are_splitmix64_of_the_hashed_key():
    assert random_words(50, 7, "order").tolist() == reference_words(b"7\x1forder", 50)


def test_permutation_is_a_permutation_fixed_by_its_key():
    assert sorted(permutation(100, 1, "a").tolist()) == list(range(100))
    assert permutation(100, 1, "a").tolist() == permutation(100, 1, "a").tolist()
    assert permutation(100, 1, "a").tolist() != permutation(100, 2, "a").tolist()
    words = reference_words(b"0\x1fgolden", 6)
    assert permutation(6, 0, "golden").tolist() == sorted(range(6), key=words.__getitem__) == [4, 1, 2, 0, 5, 3]
    assert permutation(0, 0).tolist() == []


def test_permutation_places_every_item_everywhere_about_equally():
    counts = np.zeros((5, 5))
    for seed in range(2000):
        counts[np.arange(5), permutation(5, seed, "uniform")] += 1
    assert np.abs(counts / 2000 - 0.2).max() < 0.05


@pytest.mark.parametrize(("n", "world"), [(0, 1), (1, 4), (7, 3), (12, 4), (50, 2)])
def test_rank_slices_tile_the_batch(n, world):
    rows = [list(range(n))[rank_slice(n, rank, world)] for rank in range(world)]
    assert [row for part in rows for row in part] == list(range(n))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1
    if n % world == 0:
        assert len({len(part) for part in rows}) == 1


def shuffled(n):
    return lambda epoch: [f"id{i}" for i in permutation(n, "cycle", epoch)]


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (4, 10), (1, 2), (8, 8), (5, 1)])
def test_cycle_is_the_concatenation_of_epochs(n, batch):
    cycle = Cycle(shuffled(n), batch)
    steps = 3 * n
    flat = [(epoch, i) for epoch in range(steps * batch // n + 1) for i in shuffled(n)(epoch)]
    seen = []
    for step in range(steps):
        epochs, ids = cycle.at(step)
        assert epochs.dtype == np.int64 and len(ids) == batch
        seen += list(zip(epochs.tolist(), ids, strict=True))
    assert seen == flat[: len(seen)]
    counts = collections.Counter(seen)
    assert set(counts.values()) == {1}, "an id repeats within an epoch"


def test_cycle_is_pure_in_the_step():
    cycle = Cycle(shuffled(10), 4)
    forwards = [cycle.at(step)[1] for step in range(20)]
    backwards = [Cycle(shuffled(10), 4).at(step)[1] for step in reversed(range(20))]
    assert forwards == backwards[::-1]


def test_one_id_fills_a_batch_with_different_epochs():
    epochs, ids = Cycle(lambda epoch: ["only"], 2).at(3)
    assert ids == ["only", "only"] and epochs.tolist() == [6, 7]


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (4, 10), (8, 8), (9, 8)])
def test_coverage_steps_is_exact(n, batch):
    cycle = Cycle(shuffled(n), batch)
    seen = [set().union(*(cycle.at(step)[1] for step in range(count))) for count in range(1, 5)]
    enough = cycle.coverage_steps()
    assert len(seen[enough - 1]) == n
    if enough > 1:
        assert len(seen[enough - 2]) < n
