"""The mailbox of the ranks of one machine: the process group's numbers, and no rank waits for one that has left.

The ranks run this file as a script: FOLDER, then what to do.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import launch

from distunlearn.errors import RankLostError
from distunlearn.objectives import gather, mailbox

WORLD = 2
ROUNDS = 300
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.uint8)
DIFFERENT = {"shape": "gather float32 (4,)", "type": "gather int32 (3,)", "purpose": "sum float32 (3,)"}
REFUSED = ("no room", "another machine", "no lock", "too few cores")
needs_mailbox = pytest.mark.skipif(not mailbox.usable_cores(), reason="no mailbox but on Linux on x86-64")


def part(dtype: torch.dtype, rows: int, seed: int) -> torch.Tensor:
    """Rows of this rank alone."""
    draw = torch.Generator().manual_seed(seed * WORLD + gather.get_rank())
    return torch.randn(rows, 5, generator=draw).mul(10).to(dtype)


def values() -> dict[str, torch.Tensor]:
    """Every function that may use the mailbox, on equal and on uneven shares, with and without gradient."""
    rank, found = gather.get_rank(), {}
    for dtype in DTYPES:
        found[f"detached {dtype}"] = gather.all_gather_detached(part(dtype, 3, 1))
        found[f"uneven {dtype}"] = gather.all_gather_uneven(part(dtype, 4 * rank, 2))
    for dtype in DTYPES[:2]:
        found[f"sum {dtype}"] = gather.sum_over_ranks(part(dtype, 3, 3).t())
        found[f"mean {dtype}"] = gather.all_reduce_mean(part(dtype, 1, 4)[0, 0])
        x = part(dtype, 2, 5).requires_grad_()
        (gather.all_gather_with_grad(x) * part(dtype, 2 * WORLD, 6)).sum().backward()
        found[f"gradient {dtype}"] = x.grad
    found["sizes"] = torch.tensor(gather.gather_sizes(7 + rank, torch.device("cpu")))
    large = torch.arange(mailbox.CAPACITY // 4 + 1.0) + rank  # one value more than a slot holds
    found["large"] = gather.sum_over_ranks(large)
    return found


def conversation() -> int:
    """How many of `ROUNDS` exchanges were wrong, the ranks being late in turn and sizes and types changing."""
    rank, wrong = gather.get_rank(), 0
    for number in range(ROUNDS):
        dtype, rows = DTYPES[number % 3], 1 + 37 * number % 101
        if number % 7 == 3 * rank:
            time.sleep(0.002 if number % 5 else 0.02)  # within `SPIN`, and beyond
        expected = torch.arange(WORLD).repeat_interleave(rows)[:, None].expand(-1, 2) + number
        try:
            everyone = gather.all_gather_detached(torch.full((rows, 2), float(number + rank), dtype=dtype))
        except RankLostError:
            everyone = expected[:0]
        wrong += not torch.equal(everyone, expected.to(dtype))
    return wrong


def told(work: Any) -> dict[str, Any]:
    """The error of `work` and how long it took."""
    start = time.perf_counter()
    try:
        work()
    except (RuntimeError, RankLostError) as error:
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - start}
    return {"error": "", "seconds": time.perf_counter() - start}


def compare(box: mailbox.Mailbox) -> dict[str, Any]:
    by_group = values()
    gather.use_mailbox(box)
    by_mailbox, wrong = values(), conversation()
    took = box.count
    child = os.fork()
    if not child:
        os._exit(box.takes(torch.ones(1)))  # a forked child has no part in it
    status = os.waitpid(child, 0)[1]
    dist.barrier()
    box._await = lambda rank: None  # negative control: nobody waits
    return {"group": by_group, "mailbox": by_mailbox, "wrong": wrong, "count": took, "child": status,
            "impatient": conversation()}  # fmt: skip


def failing(what: str, box: mailbox.Mailbox) -> dict[str, Any]:
    rank = gather.get_rank()
    box.gather(torch.ones(3))
    if what in DIFFERENT:
        other = {"shape": torch.ones(4), "type": torch.ones(3, dtype=torch.int32), "purpose": torch.ones(3)}[what]
        mine = (other, "sum" if what == "purpose" else "gather") if rank else (torch.ones(3),)
        return told(lambda: box.gather(*mine))
    if what == "late":
        box.patience = 0.3
        if rank:
            time.sleep(1.5)
        return told(lambda: box.gather(torch.ones(3)))
    if rank:
        torch.save({}, Path(sys.argv[1]) / "rank-1.pt")
        os._exit(0)
    return told(lambda: box.gather(torch.ones(3)))


def refused(what: str) -> dict[str, Any]:
    if what == "no room":

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        os.posix_fallocate = full
    elif what == "another machine" and gather.get_rank() == 1:
        mailbox._opened = lambda told, world: None
    elif what == "no lock" and gather.get_rank() == 1:

        def none_left(*_: object) -> None:
            raise OSError(37, "No locks available")

        mailbox.fcntl.lockf = none_left
    elif what == "too few cores":
        mailbox.usable_cores = lambda: {0}
    return {"none": mailbox.open_mailbox(60) is None}


def main(folder: Path, what: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if mailbox.usable_cores():
        mailbox.usable_cores = lambda: set(range(WORLD))  # with one core it is slow, not wrong
    if what in REFUSED:
        found = refused(what)
    else:
        box = mailbox.open_mailbox(60)
        assert box is not None
        found = compare(box) if what == "compare" else failing(what, box)
    torch.save(found, folder / f"rank-{gather.get_rank()}.pt")
    if what == "leaves":
        os._exit(0)  # the other one has gone, and with it the connection that would be closed
    dist.barrier()  # gloo may abort a rank whose connections are taken down while it is still at work
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    before = set(Path(mailbox.FOLDER).glob("distunlearn-*"))
    found = launch(__file__, WORLD, tmp_path_factory.mktemp("compare"), "compare")
    return found, set(Path(mailbox.FOLDER).glob("distunlearn-*")) - before


@needs_mailbox
def test_numbers_are_those_of_the_process_group_bit_for_bit(compared):
    for rank in compared[0]:
        assert rank["group"].keys() == rank["mailbox"].keys() and len(rank["group"]) == 22
        for name, expected in rank["group"].items():
            assert torch.equal(rank["mailbox"][name], expected), name
            assert rank["mailbox"][name].dtype == expected.dtype, name
        assert rank["count"] > ROUNDS, "the mailbox was not used"


@needs_mailbox
def test_late_ranks_and_changing_sizes_do_not_mix_exchanges_up(compared):
    assert [rank["wrong"] for rank in compared[0]] == [0] * WORLD


@needs_mailbox
def test_the_check_can_fail(compared):
    assert sum(rank["impatient"] for rank in compared[0]) > 10


@needs_mailbox
def test_a_forked_child_has_no_part_in_it(compared):
    assert [rank["child"] for rank in compared[0]] == [0] * WORLD


def test_many_ranks_share_what_room_there_is():
    assert mailbox.capacity(2) == mailbox.capacity(4) == mailbox.CAPACITY > mailbox.capacity(8)
    for world in (16, 17, 64, 192):
        assert 2**16 < mailbox.capacity(world) <= 2**20 and mailbox.size(world) <= 2**25 + world * mailbox.LINE
        assert mailbox.capacity(world) % 8 == 0  # slots start where any type may


@needs_mailbox
def test_nothing_is_left_behind(compared):
    assert compared[1] == set()


@needs_mailbox
def test_a_rank_that_ends_is_noticed_at_once(tmp_path):
    found = launch(__file__, WORLD, tmp_path, "leaves")[0]
    assert found["error"].startswith("DistNetworkError: rank 1 has ended") and found["seconds"] < 2


@needs_mailbox
def test_a_rank_that_does_not_come_is_not_waited_for_longer_than_asked(tmp_path):
    found = launch(__file__, WORLD, tmp_path, "late")
    assert "did not come within" in found[0]["error"] and found[0]["seconds"] < 1.4
    assert found[1]["error"] == ""  # the other one had left its part


@needs_mailbox
@pytest.mark.parametrize("what", DIFFERENT)
def test_different_things_are_an_error_on_all_ranks(tmp_path, what):
    for rank in launch(__file__, WORLD, tmp_path, what):
        expected = f"different things, in rank order: gather float32 (3,), {DIFFERENT[what]};"
        assert rank["error"].startswith("RankLostError") and expected in rank["error"]


@pytest.mark.parametrize("what", REFUSED)
def test_where_there_can_be_none_no_rank_has_one(tmp_path, what):
    before = set(Path(mailbox.FOLDER).glob("distunlearn-*"))
    assert [rank["none"] for rank in launch(__file__, WORLD, tmp_path, what)] == [True] * WORLD
    assert set(Path(mailbox.FOLDER).glob("distunlearn-*")) - before == set()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
