"""What the ranks consumed, without their ids: the ledger has the line that it would have with them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from distunlearn.data.loading.stream import RoleFeeder
from distunlearn.data.schedule import Cycle
from distunlearn.distributed.world import World
from distunlearn.engine.consumption import REPLACED, Consumption
from distunlearn.engine.ledger import Ledger
from distunlearn.errors import RankLostError

WORLD = 3
FORGET = [f"f{row}" for row in range(5)]  # in batches of 4 over 3 ranks: shares of 1, 1 and 2


def feeder() -> RoleFeeder:
    made = object.__new__(RoleFeeder)
    made.cycle = Cycle(lambda epoch: FORGET[epoch:] + FORGET[:epoch], 4)
    return made


def owned(step: int, rank: int, parts: int) -> dict[str, list[str]]:
    forget = [i for d in range(step * parts, (step + 1) * parts) for i in feeder().ids_by_rank(d, WORLD)[rank]]
    return {"retain": [f"r{rank}", f"r{rank}"], "forget": forget, REPLACED: []}


def line(tmp_path, owns: list[dict], step: int = 1, parts: int = 2, named: str = "forget") -> dict:
    """The line of the main rank of so many, each of which had these ids."""
    phase = SimpleNamespace(
        name="unlearn", names_forget=named, forget_ids=frozenset(FORGET), feeders={"forget": feeder()}, refuse=None,
        optim=SimpleNamespace(accumulate=parts),
    )  # fmt: skip
    sent: list[list[float]] = []
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    ledger, telemetry, device = Ledger(path), SimpleNamespace(note=lambda *a: None), torch.device("cpu")

    def total(self, numbers):
        sent.append(numbers)
        return [] if self.rank else [sum(column) for column in zip(*sent, strict=True)]

    def gathered(self, ids):
        return {name: [i for own in owns for i in own[name]] for name in ids}

    with mock.patch.object(World, "sum_on_main", total), mock.patch.object(World, "gather_ids", gathered):
        made = [
            Consumption(phase, World(rank, WORLD, device), mock.Mock() if rank else ledger, telemetry)
            for rank in range(WORLD)
        ]
        strays = sum(one.strays(own) for one, own in zip(made, owns, strict=True))
        for rank in (2, 1, 0):  # the last one to be asked hears the sum of all
            means = made[rank].account(step, dict(owns[rank]), strays, {"loss": float(rank), "x": 2.0})
    assert means.pop("loss") == 1.0 and means.pop("x") == 2.0
    ledger.close()
    return json.loads(path.read_text().splitlines()[-1])


@pytest.mark.parametrize("parts", [1, 2])
def test_the_schedule_gives_the_line_that_gathering_gave(tmp_path, parts):
    owns = [owned(1, rank, parts) for rank in range(WORLD)]
    found = line(tmp_path, owns, parts=parts)
    assert found["forget"] == [i for own in owns for i in own["forget"]] and len(found["forget"]) == 4 * parts
    assert found["count"] == {"retain": 2 * WORLD, "forget": 4 * parts} and "misused" not in found


def test_a_phase_that_names_nobody_and_a_step_without_images_to_forget(tmp_path):
    owns = [{"members": [f"m{rank}"], REPLACED: []} for rank in range(WORLD)]
    found = line(tmp_path, owns, named="")
    assert found["count"] == {"members": WORLD} and "forget" not in found
    found = line(tmp_path, [{**owned(1, rank, 2), "forget": []} for rank in range(WORLD)])
    assert found["forget"] == [] and found["count"] == {"retain": 2 * WORLD, "forget": 0}


def test_a_rank_that_had_another_share_is_an_error(tmp_path):
    """Two processes with the share of one: as many images, all of the forget set, none unknown."""
    owns = [owned(1, rank, 1) for rank in (0, 0, 2)]
    with pytest.raises(RankLostError, match="at step 1 the ranks had other images to forget than the schedule gives"):
        line(tmp_path, owns, parts=1)


def test_misuse_and_replaced_images_are_named_by_their_ids(tmp_path):
    owns = [owned(1, rank, 1) for rank in range(WORLD)]
    owns[2]["retain"] = ["r2", "f3"]
    found = line(tmp_path, owns, parts=1)
    assert found["misused"] == ["f3"] and found["forget"] == [i for own in owns for i in own["forget"]]
    owns = [owned(1, rank, 1) for rank in range(WORLD)]
    owns[1][REPLACED] = ["r9"]
    found = line(tmp_path, owns, parts=1)
    assert found["count"][REPLACED] == 1
