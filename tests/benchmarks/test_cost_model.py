"""Points of several runs put together: each name once, with the median of its runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from cost_model import merged  # noqa: E402
from scaling import modelled  # noqa: E402
from scaling_report import errors_of  # noqa: E402

from distunlearn.plan.cost_model import Measured, Work  # noqa: E402


def run(noise: list[float]) -> list[tuple[str, Measured]]:
    """Steps of 1e10 operations/s with a relative error each."""
    works = [(f"batch {k}", Work({"vit": k * 1e9}, weights=0.0)) for k in range(1, 5)]
    return [
        (name, Measured(work, "single", 1, work.flops["vit"] / 1e10 * (1 + off)))
        for (name, work), off in zip(works, noise, strict=True)
    ]


def test_a_name_counts_once_with_its_median():
    points = merged([run([0.5, 0, 0, 0])[:3], run([0, 0, 0, 0]), run([-0.5, 0, 0.1, 0])])
    assert [name for name, _ in points] == ["batch 1", "batch 2", "batch 3", "batch 4"]
    assert [point.seconds for _, point in points] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert errors_of(modelled(points)) == pytest.approx((0, 0), abs=1e-9)


def test_noise_of_one_run_shows_where_it_is_alone():
    """Negative control: unmerged, the point that is half as long again is missed by a third."""
    worst, median = errors_of(modelled(run([0.5, 0, 0, 0])))
    assert worst == pytest.approx(1 / 3, abs=0.02) and median < 0.15
