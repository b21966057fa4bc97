"""Batches that a thread fetches ahead are those of the schedule, and an error waits for the step that asks."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from distunlearn.data.schedule import Batch
from distunlearn.engine.prefetch import Ahead
from distunlearn.errors import DataError


class Feeder:
    """Counts what is asked of it; `broken` cannot be read."""

    def __init__(self, broken: int | None = None) -> None:
        self.broken, self.asked, self.threads = broken, [], set()

    def batch_at(self, step: int) -> Batch:
        self.asked.append(step)
        self.threads.add(threading.get_ident())
        if step == self.broken:
            raise DataError(f"batch {step} cannot be read")
        images = torch.full((2, 1, 4, 4), step, dtype=torch.uint8)
        return Batch([f"{step}-a", f"{step}-b"], images, np.zeros(2, dtype=np.int64), torch.zeros(2, dtype=torch.int64))


CPU = torch.device("cpu")


@pytest.mark.parametrize("threaded", [True, False])
def test_every_draw_gets_its_own_batches(threaded):
    retain, forget = Feeder(), Feeder()
    with Ahead({"retain": retain, "forget": forget}, CPU, 12, threaded) as batches:
        for draw in (0, 1, 2, 5, 6, 3, 10, 11):  # on and on, and jumps, as after a resume
            found = batches.at(draw)
            assert [batch.ids[0] for batch in found.values()] == [f"{draw}-a"] * 2
            assert all((batch.images == draw).all() for batch in found.values())
    assert max(retain.asked) == 11, "nothing beyond the phase's last draw is fetched"
    assert retain.asked == forget.asked


def test_the_next_batch_is_fetched_by_another_thread_and_only_once():
    feeder = Feeder()
    with Ahead({"retain": feeder}, CPU, 4, True) as batches:
        for draw in range(4):
            batches.at(draw)
    assert feeder.asked == [0, 1, 2, 3]
    assert threading.get_ident() not in feeder.threads and len(feeder.threads) == 1


def test_an_error_reaches_the_step_that_asks_for_the_batch():
    with Ahead({"retain": Feeder(broken=2)}, CPU, 4, True) as batches:
        batches.at(0)
        batches.at(1)  # has asked for 2 already
        with pytest.raises(DataError, match="batch 2 cannot be read"):
            batches.at(2)


def test_a_phase_that_ends_early_is_not_disturbed_by_what_was_fetched_ahead():
    with Ahead({"retain": Feeder(broken=1)}, CPU, 4, True) as batches:
        batches.at(0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_without_a_thread_nothing_is_fetched_ahead():
    feeder = Feeder()
    with Ahead({"retain": feeder}, CPU, 4) as batches:
        batches.at(0)
    assert feeder.asked == [0]
