"""Parts of the throughput benchmarks: intervals by hand, and exclusive timers."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from distunlearn.config.schema import RunConfig
from distunlearn.distributed.world import World
from distunlearn.engine.backends.base import Backend

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(SCRIPTS))

from throughput_split import Split  # noqa: E402
from throughput_stats import interval, ratio  # noqa: E402


@pytest.mark.parametrize(("n", "first"), [(4, 1), (6, 1), (8, 1), (9, 2), (10, 2), (20, 6), (40, 14)])
def test_interval_of_a_median_by_the_tables(n, first):
    """Order statistics of the usual table of 95 % intervals (n = 10: second and ninth; n = 20: sixth and fifteenth)."""
    values = torch.randperm(n).tolist()
    assert interval(values) == (first - 1, n - first)


def test_a_ratio_is_of_pairs():
    found = ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0])
    assert (found["median"], found["low"], found["high"], found["pairs"]) == (3.0, 2.0, 4.0, 3)
    with pytest.raises(ValueError):
        ratio([1.0], [1.0, 2.0])


def test_every_moment_is_counted_once_and_the_constraint_keeps_its_own():
    split = Split()

    def wait(part: str, *inner) -> None:
        def body() -> None:
            time.sleep(0.02)
            for call in inner:
                call()

        return split._timed(body, part)

    forward, communication = wait("forward", wait("communication")), wait("communication")
    utility = wait("forward")
    constrain = wait("constraint", forward)
    whole = wait("constraint", utility, constrain, communication)
    start = time.perf_counter()
    whole()
    total = time.perf_counter() - start
    found = split.take(total)
    assert sum(found.values()) == pytest.approx(total, rel=1e-6)
    assert 0.06 <= found["constraint"] and 0.04 <= found["communication"] and 0.02 <= found["forward"]
    # The evaluator's forward (0.02) is the constraint's: with it counted as forward there would be 0.04 of that.
    assert found["forward"] < found["constraint"] / 1.5
    assert split.take(1.0)["other"] == 1.0


def test_what_is_timed_exists(monkeypatch):
    """Every function that is to be timed is there by its name; nothing is patched."""
    timed = []
    monkeypatch.setattr(Split, "_patch", lambda self, owner, name, part: timed.append((getattr(owner, name), part)))
    monkeypatch.setattr(DistributedDataParallel, "__init__", DistributedDataParallel.__init__)  # put back afterwards
    Split().install(Backend(RunConfig(), World(0, 1, torch.device("cpu"))))
    assert {part for _, part in timed} >= {"data", "views", "forward", "constraint", "backward", "communication"}
