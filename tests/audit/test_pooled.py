"""Figures of a shadow pool: margins with a known answer, brute force, and who is trained on what."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from distunlearn.audit.trainings.shadow_figures import (
    DELTA,
    EPSILON_CAP,
    IN,
    OUT,
    UNLEARNED,
    epsilon,
    epsilon_ceiling,
    klom,
    pooled_figures,
    u_lira,
)
from distunlearn.audit.trainings.shadows import assign_parts, shadow_manifest
from distunlearn.config.schema import RunConfig
from distunlearn.data.manifest.manifest import Manifest, Sample, Shard
from distunlearn.verify.statistics import auc


def pool(shift: float, shadows: int = 12, images: int = 150, seed: int = 0):
    """Margins where unlearned images are known `shift` and retained ones 2 standard deviations above unseen ones."""
    generator = np.random.default_rng(seed)
    parts = assign_parts(images, shadows, seed)
    levels = np.array([2.0, 0.0, shift])  # by part: IN, OUT, UNLEARNED
    return generator.normal(size=images) * 3 + levels[parts] + generator.normal(size=parts.shape), parts


@pytest.mark.parametrize("shadows", [6, 8, 12])
def test_every_image_plays_each_part_in_a_third_of_the_shadows(shadows):
    parts = assign_parts(91, shadows, seed=3)
    counts = np.stack([(parts == part).sum(0) for part in (IN, OUT, UNLEARNED)])
    assert counts.min() >= shadows // 3 and counts.max() <= -(-shadows // 3) and (counts.sum(0) == shadows).all()
    assert np.array_equal(parts, assign_parts(91, shadows, seed=3))
    assert not np.array_equal(parts, assign_parts(91, shadows, seed=4))
    assert (parts[0] == IN).any() and (parts[0] == OUT).any() and (parts[0] == UNLEARNED).any()


def test_a_shadow_never_trains_on_what_it_must_not_have_seen():
    roles = ["retain"] * 3 + ["forget"] * 6 + ["holdout"] * 2
    samples = [Sample(f"i{k}", "s.tar", k, 1, "0" * 64, role, None) for k, role in enumerate(roles)]
    manifest = Manifest(".", samples, {"s.tar": Shard(11, "0" * 64, 11)})
    forget = manifest.ids("forget")
    parts = np.array([IN, OUT, UNLEARNED, UNLEARNED, OUT, IN])
    seen = shadow_manifest(manifest, forget, parts)
    assert seen.ids("forget") == ["i5", "i6"]
    assert seen.ids(("retain", "forget")) == ["i0", "i1", "i2", "i3", "i5", "i6", "i8"]  # what pretrain sees
    assert seen.ids("retain") == ["i0", "i1", "i2", "i3", "i8"]
    assert manifest.ids("forget") == forget  # the run's own manifest is as it was


def test_u_lira_has_the_power_of_the_shift_and_none_without():
    expected = stats.norm.cdf(1.5 / 2**0.5)  # known means; they are estimated from three or four shadows each
    found = auc(u_lira(*pool(1.5, images=600)))
    assert expected - 0.08 < found < expected
    for seed in range(3):
        assert abs(auc(u_lira(*pool(0.0, images=600, seed=seed))) - 0.5) < 0.03


def test_u_lira_leaves_each_shadow_out_of_its_own_mean():
    found, parts = pool(0.0, shadows=6, images=4)
    ratios = u_lira(found, parts)
    residuals = [
        found[parts[:, i] == part, i] - found[parts[:, i] == part, i].mean()
        for i in range(4) for part in (UNLEARNED, OUT)
    ]  # fmt: skip
    variance = sum((r**2).sum() for r in residuals) / sum(len(r) - 1 for r in residuals)
    expected = []
    for k in range(6):
        for i in range(4):
            if parts[k, i] == UNLEARNED:
                means = {}
                for part in (UNLEARNED, OUT):
                    rows = [j for j in range(6) if parts[j, i] == part and j != k]
                    means[part] = np.mean(found[rows, i])
                logs = {p: stats.norm.logpdf(found[k, i], m, variance**0.5) for p, m in means.items()}
                expected.append(logs[UNLEARNED] - logs[OUT])
    np.testing.assert_allclose(np.sort(ratios.parts[0].positives), np.sort(expected), rtol=1e-9)


def test_leaving_nothing_out_would_find_what_is_not_there():
    """Negative control: with means over all shadows even the null is told apart."""
    found, parts = pool(0.0, images=600)
    means = [np.where(parts == p, found, 0).sum(0) / (parts == p).sum(0) for p in (UNLEARNED, OUT)]
    ratio = (found - means[1]) ** 2 - (found - means[0]) ** 2
    own = stats.mannwhitneyu(ratio[parts == UNLEARNED], ratio[parts == OUT]).statistic
    assert own / ((parts == UNLEARNED).sum() * (parts == OUT).sum()) > 0.6


def test_klom_is_scipys_entropy_of_histograms():
    found, parts = pool(1.0, images=5)
    for i, value in enumerate(klom(found, parts)):
        first, second = found[parts[:, i] == UNLEARNED, i], found[parts[:, i] == OUT, i]
        edges = np.linspace(min(first.min(), second.min()), max(first.max(), second.max()), 21)
        p, q = (np.histogram(side, edges)[0] / len(side) + 1e-5 for side in (first, second))
        assert value == pytest.approx(stats.entropy(p, q), rel=1e-9)
    same = np.ones((12, 5))
    assert (klom(same, parts) == 0).all()


def brute_epsilon(first: list[float], second: list[float]) -> float:
    """Every region between two cuts, and its complement, one by one."""
    values = sorted({*first, *second})
    cuts = [(a + b) / 2 for a, b in zip(values, values[1:], strict=False)]
    regions = [(low, high) for low in [-math.inf, *cuts] for high in [*cuts, math.inf] if low < high]
    best = 0.0
    for low, high in regions:
        for inside in (True, False):
            fn = np.mean([(low < x < high) != inside for x in first])
            fp = np.mean([(low < x < high) == inside for x in second])
            if fn == fp == 0:
                return EPSILON_CAP
            if fn > 0 and fp > 0:
                for one, other in ((fp, fn), (fn, fp)):
                    if 1 - DELTA - one > 0:
                        best = max(best, math.log(1 - DELTA - one) - math.log(other))
    return best


def test_epsilon_by_brute_force_and_its_ceiling():
    found, parts = pool(1.0, images=40)
    values = epsilon(found, parts)
    for i, value in enumerate(values):
        first, second = found[parts[:, i] == UNLEARNED, i], found[parts[:, i] == OUT, i]
        assert value == pytest.approx(brute_epsilon(first.tolist(), second.tolist()), abs=1e-9)
    ceiling = epsilon_ceiling(parts)
    assert ceiling == pytest.approx(math.log(3))  # four shadows of each kind: rates of 1/4
    assert (values[values < EPSILON_CAP] <= ceiling + 1e-9).all()
    assert (values == EPSILON_CAP).any() and (values < EPSILON_CAP).any()


def test_all_figures_lie_between_their_ends():
    weak, strong, nothing = (pooled_figures(*pool(shift), RunConfig()) for shift in (0.3, 1.9, 0.0))
    for name in ("u_lira_auc", "klom", "epsilon"):
        for found in (weak, strong, nothing):
            assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
        assert weak[name]["value"] < strong[name]["value"]
        assert nothing[name]["chance_low"] - 0.02 <= nothing[name]["value"] <= nothing[name]["chance_high"] * 1.1
        assert strong[name]["value"] > strong[name]["chance_high"]
        assert strong[name]["nothing_forgotten"] > strong[name]["chance_high"]
    assert 0 < strong["epsilon"]["score"] < nothing["epsilon"]["score"] <= 1
    json.dumps(weak, allow_nan=False)
