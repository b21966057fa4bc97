"""Ranks that work at their own pace: who waits hears the others, what one raises reaches all, and silence ends it.

The ranks run this file as a script.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
from processes import launch

from distunlearn.config.schema import RunConfig
from distunlearn.distributed import meeting
from distunlearn.distributed.meeting import Meeting
from distunlearn.distributed.process_group import join
from distunlearn.distributed.world import World
from distunlearn.errors import DataError, RankLostError

SILENCE = 1.0


def main(folder: Path) -> None:
    world = join(RunConfig(backend="ddp"))
    meeting.BEAT, meeting.SILENCE = 0.2, SILENCE
    found = {}
    if world.is_main:  # as in its own work, while the others wait: it must not shift those that all hold
        with Meeting(World(0, 1, torch.device("cpu"))):
            pass

    def held(name: str, work) -> None:
        begun = time.monotonic()
        try:
            with Meeting(world) as here:
                work(here)
            said = f"ended with {here.count('images')}"
        except (DataError, RankLostError, ValueError) as error:
            said = f"{type(error).__name__}, agreed {getattr(error, 'agreed', False)}: {error}"
        found[name] = (said, time.monotonic() - begun)
        world.barrier()

    def long(here: Meeting) -> None:
        time.sleep(2.5 * SILENCE * world.rank)
        here.count("images", world.rank + 1)

    def fails(error: Exception):
        def work(here: Meeting) -> None:
            if world.rank == 1:
                raise error
            while True:  # at work, too: `check` ends it
                here.check()
                time.sleep(0.01)

        return work

    def silent(here: Meeting) -> None:
        time.sleep(2.5 * SILENCE * world.rank)

    held("long", long)
    held("data", fails(DataError("the image is gone.")))
    held("bug", fails(ValueError("a bug")))
    alive = Meeting._beat
    if world.rank == 1:
        Meeting._beat = lambda self: self._store.add("pulse 1", 1)  # one sign of life and no more
    held("silent", silent)
    Meeting._beat = alive
    held("main", lambda here: time.sleep(2.5 * SILENCE * (world.rank == 0)))
    found["on main"] = world.on_main(lambda: time.sleep(2 * SILENCE) or "done")
    found["bytes"] = [len(part) for part in world.gather_bytes(bytes(3 * world.rank))]
    torch.save(found, folder / f"rank-{world.rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch(__file__, 2, tmp_path_factory.mktemp("meeting"))


def test_who_waits_hears_the_others_for_as_long_as_they_work(ranks):
    for found in ranks:
        said, seconds = found["long"]
        assert said == "ended with 3" and seconds > 2 * SILENCE
        assert found["main"][0] == "ended with 0"
    assert [found["on main"] for found in ranks] == ["done", None]


def test_what_one_rank_raises_is_raised_by_all(ranks):
    assert [found["data"][0] for found in ranks] == ["DataError, agreed True: the image is gone."] * 2
    assert ranks[1]["bug"][0] == "ValueError, agreed False: a bug"
    assert ranks[0]["bug"][0].startswith("RankLostError, agreed False: rank 1 failed (ValueError)")


def test_control_a_rank_without_a_sign_of_life_is_lost(ranks):
    said, seconds = ranks[0]["silent"]
    assert said.startswith("RankLostError, agreed True: rank 1 has said nothing") and seconds < 2.4 * SILENCE


def test_bytes_of_uneven_length_arrive_on_the_main_rank(ranks):
    assert [found["bytes"] for found in ranks] == [[0, 3], []]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
