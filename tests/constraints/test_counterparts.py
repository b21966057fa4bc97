"""Weights of third-party images: against a loop in plain Python, and on images whose hardness is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distunlearn.methods.third_party_weights import (
    SMOOTHING,
    WIDTH,
    Look,
    _counterparts,
    counterpart_weights,
    effective_number,
    inclusion_shares,
)


def look(n: int, seed: int, dim: int = 5, ties: bool = False) -> Look:
    rng = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(n, dim, generator=rng, dtype=torch.float64), dim=1)
    agreement = torch.rand(n, generator=rng, dtype=torch.float64)
    return Look(direction, (agreement * 4).round() / 4 if ties else agreement)


def by_loop(forget: Look, retain: Look, third: Look, neighbours: int) -> list[float]:
    def nearest(direction: torch.Tensor, among: Look, but: int | None = None) -> list[int]:
        cosines = [float(direction @ other) for other in among.direction]
        return sorted((j for j in range(len(cosines)) if j != but), key=lambda j: -cosines[j])[:neighbours]

    def mean(members: Look, itself: bool) -> list[float]:
        total = [0.0] * len(third.agreement)
        for i in range(len(members.agreement)):
            mine = float(members.agreement[i])
            known = nearest(members.direction[i], retain, i if itself else None)
            known = [float(retain.agreement[j]) for j in known]
            u = (sum(k < mine for k in known) + 0.5 * sum(k == mine for k in known) + 0.5) / (len(known) + 1)
            near = nearest(members.direction[i], third)
            found = {}
            for place, j in enumerate(sorted(near, key=lambda j: float(third.agreement[j]))):
                v = (place + 0.5) / len(near)
                found[j] = sum(math.exp(-0.5 * ((v - c) / WIDTH) ** 2) for c in (u, -u, 2 - u))
            for j, value in found.items():
                total[j] += value / sum(found.values()) / len(members.agreement)
        return total

    count_f, count_r, count_t = (len(seen.agreement) for seen in (forget, retain, third))
    of_forget, of_retain = mean(forget, False), mean(retain, True)
    ratio = [
        (f + SMOOTHING / count_t) / ((count_f * f + count_r * r) / (count_f + count_r) + SMOOTHING / count_t)
        for f, r in zip(of_forget, of_retain, strict=True)
    ]
    return [value / sum(ratio) for value in ratio]


@pytest.mark.parametrize(("sizes", "neighbours"), [((7, 30, 25), 6), ((3, 4, 5), 50), ((1, 1, 1), 50), ((1, 9, 2), 3)])
def test_weights_are_those_of_the_definition(sizes, neighbours):
    forget, retain = (look(n, seed, ties=True) for seed, n in enumerate(sizes[:2]))
    third = look(sizes[2], 2)
    found = counterpart_weights(forget, retain, third, neighbours)
    assert found.tolist() == pytest.approx(by_loop(forget, retain, third, neighbours), abs=1e-12)
    assert float(found.sum()) == pytest.approx(1, abs=1e-12)


def test_many_forgotten_images_are_taken_in_parts(monkeypatch):
    forget, retain, third = look(23, 0), look(40, 1), look(30, 2)
    expected = counterpart_weights(forget, retain, third, 8)
    monkeypatch.setattr("distunlearn.methods.third_party_weights._ROWS", 5)
    torch.testing.assert_close(counterpart_weights(forget, retain, third, 8), expected)


def strangers(n: int, rng: np.random.Generator, trained_on: float, where: float = 0.0) -> tuple[Look, np.ndarray]:
    """Images at places on a circle; how hard one is depends on its place and on itself. What an encoder was trained on
    agrees better by `trained_on`."""
    angle = rng.normal(where, 1.0, n)
    ease = 0.3 * np.sin(angle) + rng.normal(0, 0.1, n)
    direction = torch.tensor(np.stack([np.cos(angle / 3), np.sin(angle / 3)], 1))
    return Look(direction, torch.tensor(ease + trained_on)), ease


def test_weighted_strangers_are_as_hard_as_the_forgotten_images():
    """Forgotten images from one side, and the easier half of them: as a whole the third party is 0.3 harder."""
    rng = np.random.default_rng(0)
    retain, _ = strangers(4000, rng, 0.5)
    third, ease_third = strangers(3000, rng, 0.0)
    forget, ease = strangers(200, rng, 0.5, where=1.0)
    easy = np.argsort(ease)[100:]
    forget, ease = Look(forget.direction[easy], forget.agreement[easy]), ease[easy]
    weights = counterpart_weights(forget, retain, third).numpy()
    assert abs(ease.mean() - ease_third.mean()) > 0.3
    assert abs(ease.mean() - (weights * ease_third).sum()) < 0.02
    # Control: without ranks what training added counts as ease, and the easiest strangers of all are taken.
    raw = np.abs(forget.agreement.numpy()[:, None] - third.agreement.numpy()[None]).argsort(1)[:, :50]
    assert abs(ease.mean() - ease_third[raw].mean()) > 0.1


def test_a_fair_sample_draws_all_of_the_third_party_about_alike():
    """Although some images are the neighbours of many members: without the ratio they would come more often."""
    rng = np.random.default_rng(0)
    retain, _ = strangers(2000, rng, 0.5)
    third, _ = strangers(1000, rng, 0.0)
    fair, _ = strangers(2000, rng, 0.5)
    unfair, _ = strangers(2000, rng, 0.5, where=1.0)
    plain = _counterparts(fair, retain, third, 50)
    assert effective_number(counterpart_weights(fair, retain, third)) > 950 > effective_number(plain)
    assert effective_number(counterpart_weights(unfair, retain, third)) < 800


def test_shares_are_proportional_whole_in_sum_and_at_most_one():
    weights = counterpart_weights(look(9, 0), look(30, 1), look(40, 2), 10)
    shares = inclusion_shares(weights)
    assert float(shares.max()) <= 1 and float(shares.min()) >= 0
    assert float(shares.sum()) == pytest.approx(math.floor(1 / float(weights.max())), abs=1e-9)
    torch.testing.assert_close(shares / weights, (shares.sum() / weights.sum()).expand(len(weights)))
    assert inclusion_shares(torch.full((7,), 1 / 7, dtype=torch.float64)).tolist() == pytest.approx([1.0] * 7)
    assert inclusion_shares(torch.tensor([0.9, 0.1], dtype=torch.float64)).tolist() == pytest.approx([0.9, 0.1])


def test_the_effective_number_counts_equal_weights():
    assert effective_number(torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0])) == pytest.approx(4)
    assert effective_number(torch.tensor([1.0, 0.0])) == pytest.approx(1)
