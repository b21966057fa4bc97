from __future__ import annotations

import collections
import hashlib

import numpy as np
import pytest
from scipy import stats

from distunlearn.data import schedule
from distunlearn.data.schedule import Cycle, keyed_places, permutation, random_words, random_words_at, rank_slice

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


def test_words_at_places_are_those_of_the_whole():
    places = np.array([49, 0, 7, 7])
    assert (random_words_at(places, 7, "order") == random_words(50, 7, "order")[places]).all()


def test_keyed_places_are_a_bijection_of_every_size():
    for n in (*range(1, 260), 4095, 4096, 4097, 65_537, 250_001):
        found = keyed_places(np.arange(n), n, 3, "epoch", 1)
        assert found.dtype == np.int64 and (np.sort(found) == np.arange(n)).all(), n
        some = np.arange(0, n, 7)[::-1]
        assert (keyed_places(some, n, 3, "epoch", 1) == found[some]).all(), "a place depends on those asked for with it"
        assert n < 20 or (keyed_places(np.arange(n), n, 3, "epoch", 2) != found).any()


def test_keyed_places_are_the_network_written_out_in_integers():
    """The formula by Python's integers, with the words by hashlib."""
    n, key, bits = 1000, (5, "golden"), 10

    def word(value: int, number: int) -> int:
        return reference_words(f"5\x1fgolden\x1f{number}".encode(), value + 1)[value]

    def passed(value: int) -> int:
        left, right = value >> bits // 2, value & 31
        for number in range(8):
            left, right = right, (left ^ word(right, number)) & 31
        return left << 5 | right

    for place in (0, 1, 500, 999):
        value = passed(place)
        while value >= n:
            value = passed(value)
        assert keyed_places(np.array([place]), n, *key).tolist() == [value]


def chi_square(cells: np.ndarray) -> float:
    """Probability of a larger statistic if all cells are equally likely."""
    expected = cells.sum() / cells.size
    return float(stats.chi2.sf(((cells - expected) ** 2 / expected).sum(), cells.size - 1))


@pytest.mark.parametrize("n", [5, 100, 300])
def test_first_positions_fall_everywhere_about_equally(n):
    """Chi-square of where the first place goes, and of the pair of the first two (coarsely), over many keys."""
    draws = np.array([keyed_places(np.array([0, 1]), n, seed, "chi") for seed in range(max(1500, 8 * n))])
    assert chi_square(np.bincount(draws[:, 0], minlength=n)) > 1e-3
    coarse = draws * min(n, 5) // n
    cells = np.bincount(coarse[:, 0] * 5 + coarse[:, 1], minlength=25).astype(float)
    if n >= 100:
        assert chi_square(cells) > 1e-3


def test_control_two_rounds_are_too_few(monkeypatch):
    """The chi-square sees a network that hardly mixes: two places whose left halves differ, and how the results do."""

    def differences() -> np.ndarray:
        found = np.array([keyed_places(np.array([0, 32]), 1024, seed, "chi") for seed in range(1500)]) >> 5
        return np.bincount(found[:, 0] ^ found[:, 1], minlength=32)

    assert chi_square(differences()) > 1e-3
    monkeypatch.setattr(schedule, "ROUNDS", 2)
    assert chi_square(differences()) < 1e-9


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
