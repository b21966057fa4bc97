"""The cost model: formulas by hand, exact recovery of synthetic machines, and no silent nonsense."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from distunlearn.plan.cost_model import (
    BACKENDS,
    Call,
    Machine,
    Measured,
    Work,
    collective_time,
    collectives,
    fit,
    leave_one_out,
    step_time,
)

MACHINE = Machine({"conv": 4e10, "vit": 8e10}, sweep=2e9, fixed=0.02, latency=3e-4, bandwidth=5e8, hook=1e-3, copy=3e8)
WORK = Work({"conv": 2e10}, weights=40e6, units=8, batchnorms=20, embeddings=1e5)


def test_collectives_by_hand():
    """8 processes: 3 latencies a tree, 7/8 of the bytes."""
    one = 3 * 3e-4 + 7 / 8 * 1e6 / 5e8
    assert collective_time(Call("all_gather", 1e6), 8, MACHINE) == pytest.approx(one)
    assert collective_time(Call("reduce_scatter", 1e6), 8, MACHINE) == pytest.approx(one)
    assert collective_time(Call("all_reduce", 1e6, 5), 8, MACHINE) == pytest.approx(10 * one)


def test_a_step_of_ddp_by_hand():
    """40 MB are two buckets; 4 processes: 2 latencies a tree, 3/4 of the bytes; an all-reduce is two of them."""
    work = Work({"conv": 2e10}, weights=40e6)
    found = step_time(work, "ddp", 4, MACHINE)
    assert found["compute"] == pytest.approx(0.5) and found["optimizer"] == pytest.approx(0.02)
    assert found["communication"] == pytest.approx(2 * (2 * 2 * 3e-4 + 3 / 4 * 40e6 / 5e8))
    assert found["total"] == pytest.approx(0.5 + 0.02 + found["communication"] + 0.02)


def test_what_backends_send():
    """Whole weights, counted once per gather or scatter and twice per all-reduce."""
    work = Work({"conv": 1.0}, weights=8e6, units=4, forwards=2, momentum=8e6)

    def weights_sent(backend: str) -> float:
        return sum(c.size * c.count * (2 if c.kind == "all_reduce" else 1) for c in collectives(work, backend, 2)) / 8e6

    assert {b: weights_sent(b) for b in BACKENDS} == pytest.approx(
        {"single": 0, "ddp": 2, "zero1": 3, "zero2": 2, "fsdp2": 6, "zero3": 6}
    )
    assert all(collectives(work, backend, 1) == [] for backend in BACKENDS)


def synthetic() -> list[Measured]:
    """Steps as MACHINE would take them."""
    points = []
    for kind, flops in (("conv", 1e10), ("conv", 3e10), ("vit", 2e10), ("vit", 5e10)):
        work = replace(WORK, flops={kind: flops}, weights=flops / 500, batchnorms=20 if kind == "conv" else 1)
        for backend, world in (("single", 1), ("ddp", 2), ("fsdp2", 2), ("zero2", 4), ("zero3", 8)):
            points.append(Measured(work, backend, world, step_time(work, backend, world, MACHINE)["total"]))
    return points


def test_a_fit_recovers_the_machine_that_made_the_points():
    found = fit(synthetic())
    assert found.rate == pytest.approx(MACHINE.rate, rel=1e-6)
    for name in ("sweep", "fixed", "latency", "bandwidth", "hook", "copy"):
        assert getattr(found, name) == pytest.approx(getattr(MACHINE, name), rel=1e-6), name
    assert max(map(abs, leave_one_out(synthetic()))) < 1e-6


def test_a_point_that_does_not_fit_shows():
    """Negative control: a step twice as long as the model's is missed by about half."""
    points = synthetic()
    points[3] = replace(points[3], seconds=2 * points[3].seconds)
    assert leave_one_out(points)[3] == pytest.approx(-0.5, abs=0.02)


def test_unknown_parameters_cost_nothing_and_none_is_negative():
    alone = [Measured(Work({"conv": f}, weights=1e6), "single", 1, f / 4e10) for f in (1e10, 2e10, 4e10)]
    found = fit(alone)
    assert found.rate["conv"] == pytest.approx(4e10) and found.bandwidth == math.inf and found.latency == 0
    assert found.fixed >= 0 and found.sweep > 0


@pytest.mark.parametrize("points", [[], [Measured(WORK, "ddp", 2, 0.0)], [Measured(WORK, "ddp", 2, math.nan)]])
def test_a_fit_of_nothing_is_refused(points):
    with pytest.raises(ValueError, match="above 0"):
        fit(points)
