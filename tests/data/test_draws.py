"""Draws of views: keyed, uniform, the same in every process."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from distunlearn.data.views.draws import id_hashes, uniforms


def names(n: int) -> list[str]:
    return [f"digits/{i:06d}" for i in range(n)]


def test_id_hashes_are_blake2b_and_the_same_in_another_process():
    ids = ["digits/000001", "a b/ü.png", ""]
    code = f"from distunlearn.data.views.draws import id_hashes; print(id_hashes({ids!r}).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(id_hashes(ids).tolist())
    assert id_hashes(ids).dtype == np.int64
    assert id_hashes([]).shape == (0,)
    assert len(set(id_hashes(names(5000)).tolist())) == 5000


MASK, GOLDEN = (1 << 64) - 1, 0x9E3779B97F4A7C15


def splitmix(z: int) -> int:
    """The finaliser with Python integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def stream_start(seed: int, epoch: int, id_hash: int, view: int) -> int:
    """Where the draws of an image's view start."""
    key = seed & MASK
    for part in (epoch, id_hash & MASK, view):
        key = splitmix((key + GOLDEN) & MASK) ^ part
    return splitmix((key + GOLDEN) & MASK)


def splitmix_oracle(seed: int, epoch: int, id_hash: int, view: int, draw: int) -> float:
    """The documented construction with Python integers."""
    return (splitmix((stream_start(seed, epoch, id_hash, view) + (draw + 1) * GOLDEN) & MASK) >> 40) / 2**24


def test_uniforms_equal_an_integer_oracle():
    ids, epochs = names(5), np.array([0, 1, 7, 1 << 32, 3])
    for seed, view in ((0, 0), (123456789, 9), (2**63 + 5, 1)):
        u = uniforms(seed, epochs, ids, view, 4)
        assert u.dtype == np.float64
        for i, name in enumerate(ids):
            for d in range(4):
                expected = splitmix_oracle(seed, int(epochs[i]), int(id_hashes([name])[0]), view, d)
                assert u[i, d].item() == expected


def test_splitmix_finaliser_known_answer():
    """The first outputs of SplitMix64 started at 0, as its authors publish them."""
    from distunlearn.common.random import finalise

    golden = np.uint64(0x9E3779B97F4A7C15)
    out = finalise(np.arange(1, 4, dtype=np.uint64) * golden)
    assert [hex(v) for v in out.tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


@pytest.mark.parametrize("axis", ["ids", "epochs", "views", "seeds", "draws"])
def test_uniforms_are_uniform_along_every_key(axis):
    n = 4000
    zeros, one = np.zeros(n, dtype=np.int64), np.zeros(1, dtype=np.int64)
    u = {
        "ids": lambda: uniforms(0, zeros, names(n), 0, 3)[:, 1],
        "epochs": lambda: uniforms(0, np.arange(n), ["x"] * n, 0, 3)[:, 1],
        "views": lambda: np.concatenate([uniforms(0, one, ["x"], v, 3)[:, 1] for v in range(n)]),
        "seeds": lambda: np.concatenate([uniforms(s, one, ["x"], 0, 3)[:, 1] for s in range(n)]),
        "draws": lambda: uniforms(0, one, ["x"], 0, n)[0],
    }[axis]()
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / np.sqrt(n)
    assert len(np.unique(u)) > 0.999 * n


def test_views_and_draws_of_one_sample_are_uncorrelated():
    n = 4000
    zeros = np.zeros(n, dtype=np.int64)
    table = np.concatenate([uniforms(0, zeros, names(n), v, 4) for v in range(2)], axis=1)
    correlation = np.corrcoef(table.T) - np.eye(8)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(n)


def test_first_draws_do_not_depend_on_how_many_are_drawn():
    epochs = np.arange(6)
    assert np.array_equal(uniforms(3, epochs, names(6), 1, 5), uniforms(3, epochs, names(6), 1, 40)[:, :5])
    assert uniforms(3, epochs, names(6), 1, 0).shape == (6, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": np.zeros(3, dtype=np.int64)}, "epochs must be 2 integers"),
        ({"epochs": np.zeros(2)}, "epochs must be 2 integers"),
        ({"epochs": np.array([0, -1])}, "must not be negative"),
        ({"seed": -1}, "must not be negative"),
        ({"view": -1}, "must not be negative"),
    ],
)
def test_wrong_keys_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        uniforms(
            **{"seed": 0, "epochs": np.zeros(2, dtype=np.int64), "ids": ["a", "b"], "view": 0, "draws": 3} | change
        )


def test_a_negative_number_of_draws_is_refused():
    with pytest.raises(ValueError, match="draws is -1"):
        uniforms(0, np.zeros(1, dtype=np.int64), ["a"], 0, -1)
