"""N gloo processes against one process on the same global batch: losses, gradients, gathers; and what would be wrong.

The processes run this very file as a script (so that no import mode of pytest matters) and leave their results in
a folder. N = global images, W = world; rank r holds the images `share(N, r, W)`, uneven where W does not divide N.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parts import OBJECTIVES, objective_settings
from worlds import launch

from distunlearn.distributed.collectives import (
    all_gather_detached,
    all_gather_uneven,
    all_gather_with_grad,
    all_reduce_mean,
    gather_ids,
    gather_sizes,
    get_rank,
    get_world,
    mean_scale,
)
from distunlearn.errors import RankLostError
from distunlearn.objectives import Bank, Branches, make_objective
from distunlearn.objectives.queue import KeyQueue
from distunlearn.objectives.simclr import nt_xent

D_IN, D, TAU = 6, 5, 0.3
WORLDS = (2, 4)
COUNTS = (8, 7, 3)  # even in both worlds; uneven in both; a rank without any image in the world of 4
WRONG = ("no-grad gather, global loss", "no-grad gather, local loss", "extra factor W", "plain mean of uneven means")
TIGHT = {"rtol": 0.0, "atol": 1e-10}


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def share(count: int) -> slice:
    """This rank's contiguous images; shares differ by at most one."""
    edges = [count * r // get_world() for r in range(get_world() + 1)]
    return slice(edges[get_rank()], edges[get_rank() + 1])


def branches_of(name: str, count: int, weight: torch.Tensor) -> Branches:
    """This rank's part of a global batch of `count` images through one linear layer."""
    objective = OBJECTIVES[name]
    hidden = draw(objective.branches, count, D_IN, seed=count)
    return Branches(
        output=hidden @ weight.T,
        hidden=hidden,
        target=draw(objective.branches, count, D, seed=count + 1) if objective.needs_momentum else None,
        labels=torch.arange(count) % D,
        ids=torch.arange(count),
    ).part(share(count))


def queue_bank() -> Bank:
    queue = KeyQueue(9, D, dtype=torch.float64)
    keys = draw(7, D, seed=70)
    queue.push(keys / keys.norm(dim=1, keepdim=True), torch.tensor([0, 1, 2, 50, 51, 52, 53]))
    return queue.bank(TAU)


def averaged(loss: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss and gradient as every backend averages them over the ranks."""
    (grad,) = torch.autograd.grad(loss, weight)
    return {"loss": all_reduce_mean(loss), "grad": all_reduce_mean(grad)}


def utility_results(name: str, count: int) -> dict[str, torch.Tensor]:
    weight = draw(D, D_IN, seed=3).requires_grad_()
    return averaged(
        make_objective(objective_settings(name, temperature=TAU)).task_loss(
            branches_of(name, count, weight), queue_bank()
        ),
        weight,
    )


def wrong_results(scheme: str, count: int) -> dict[str, torch.Tensor]:
    """NT-Xent with the mistakes that the field has made."""
    weight = draw(D, D_IN, seed=3).requires_grad_()
    output = branches_of("simclr", count, weight).output
    sizes = gather_sizes(output.shape[1], output.device)
    start = sum(sizes[: get_rank()])
    if scheme == "extra factor W":
        return averaged(nt_xent(output, TAU) * get_world(), weight)
    if scheme == "plain mean of uneven means":
        return averaged(nt_xent(output, TAU) / mean_scale(sizes) / output.shape[1], weight)
    u = torch.nn.functional.normalize(output, dim=-1).transpose(0, 1)
    everyone = all_gather_detached(u.contiguous(), sizes)
    mine = slice(start, start + u.shape[0])
    if scheme == "no-grad gather, global loss":
        everyone = torch.cat([everyone[: mine.start], u, everyone[mine.stop :]])
        mine = slice(0, sum(sizes))
    rows = everyone if mine.stop - mine.start == len(everyone) else u
    own = torch.arange(2 * mine.start, 2 * mine.stop)
    logits = rows.flatten(0, 1) @ everyone.flatten(0, 1).T / TAU
    logits = logits.scatter(1, own[:, None], -torch.inf)
    return averaged(torch.nn.functional.cross_entropy(logits, own ^ 1), weight)


def gather_results(count: int) -> dict[str, torch.Tensor]:
    """All collectives once; every rank asks something else of the gathered rows."""
    rows = draw(count, D, seed=4)[share(count)].requires_grad_()
    sizes = gather_sizes(rows.shape[0], rows.device)
    gathered = all_gather_with_grad(rows, sizes)
    wish = draw(count, D, seed=100 + get_rank())
    (grad,) = torch.autograd.grad((gathered * wish).sum(), rows)
    keys, ids = rows.detach(), torch.arange(count)[share(count)]
    bank = Bank.gather(keys, ids, TAU)
    queue = KeyQueue(5, D, dtype=torch.float64)
    queue.push(bank.keys, bank.ids)
    return {
        "sizes": torch.tensor(sizes),
        "gathered": gathered.detach(),
        "grad": grad,
        "detached": all_gather_uneven(rows),
        "ids": gather_ids(ids),
        "scale": torch.tensor(mean_scale(sizes)),
        "mean": all_reduce_mean(torch.tensor(float(get_rank()))),
        "bank_keys": bank.keys,
        "bank_ids": bank.ids,
        "queue_ids": queue.ids,
    }


def all_results() -> dict[str, dict[str, torch.Tensor]]:
    results = {f"utility {n} {c}": utility_results(n, c) for n in OBJECTIVES for c in COUNTS}
    results |= {f"gather {c}": gather_results(c) for c in COUNTS}
    if get_world() > 1:
        results |= {f"wrong {s}": wrong_results(s, 8 if s != WRONG[3] else 7) for s in WRONG}
    return results


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder / 'init'}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world, timeout=timedelta(seconds=90))
    results = all_results()
    twice = draw(2, D, seed=1).requires_grad_()
    (first,) = torch.autograd.grad(all_gather_with_grad(twice).pow(3).sum(), twice, create_graph=True)
    try:
        torch.autograd.grad(first.sum(), twice)
        results["second order"] = {"refused": torch.tensor(False)}
    except RuntimeError:
        results["second order"] = {"refused": torch.tensor(True)}
    torch.save(results, folder / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks_of(tmp_path_factory):
    """world -> results by rank; the processes of a world run once."""
    done = {}

    def results(world: int) -> list[dict[str, dict[str, torch.Tensor]]]:
        if world not in done:
            done[world] = launch(__file__, world, tmp_path_factory.mktemp(f"world-{world}"))
        return done[world]

    return results


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("world", WORLDS)
def test_utility_and_its_gradient_equal_one_process(ranks_of, world, name, count):
    expected = utility_results(name, count)
    assert expected["grad"].abs().max() > 1e-3
    for rank in ranks_of(world):
        found = rank[f"utility {name} {count}"]
        torch.testing.assert_close(found["loss"], expected["loss"], **TIGHT)
        torch.testing.assert_close(found["grad"], expected["grad"], **TIGHT)


@pytest.mark.parametrize("scheme", WRONG)
@pytest.mark.parametrize("world", WORLDS)
def test_the_parity_test_can_fail(ranks_of, world, scheme):
    expected = utility_results("simclr", 7 if scheme == WRONG[3] else 8)["grad"]
    found = ranks_of(world)[0][f"wrong {scheme}"]["grad"]
    assert (found - expected).abs().max() > 1e-3
    ratio = found.norm() / expected.norm()
    if scheme == "no-grad gather, global loss":
        torch.testing.assert_close(found, expected / world, **TIGHT)
    elif scheme == "extra factor W":
        torch.testing.assert_close(found, expected * world, **TIGHT)
    elif scheme == "no-grad gather, local loss":
        assert 0.3 < ratio < 0.95


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("world", WORLDS)
def test_gathers_give_the_global_batch_on_every_rank_in_one_order(ranks_of, world, count):
    expected = gather_results(count)
    for rank in ranks_of(world):
        found = rank[f"gather {count}"]
        for name in ("gathered", "detached", "ids", "bank_keys", "bank_ids", "queue_ids"):
            assert torch.equal(found[name], expected[name]), name
        sizes = found["sizes"].tolist()
        assert sum(sizes) == count and len(sizes) == world and max(sizes) - min(sizes) <= 1
        assert found["scale"].item() == pytest.approx(world / count)
        assert found["mean"].item() == pytest.approx((world - 1) / 2)
    if count < world:
        assert 0 in sizes


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("world", WORLDS)
def test_the_backward_of_a_gather_sums_what_all_ranks_ask(ranks_of, world, count):
    wishes = sum(draw(count, D, seed=100 + rank) for rank in range(world))
    found = torch.cat([rank[f"gather {count}"]["grad"] for rank in ranks_of(world)])
    torch.testing.assert_close(found, wishes, rtol=0.0, atol=1e-14)


@pytest.mark.parametrize("world", WORLDS)
def test_a_second_derivative_through_a_gather_is_refused(ranks_of, world):
    assert all(rank["second order"]["refused"].item() for rank in ranks_of(world))


def test_without_a_process_group_everything_is_the_identity():
    x = draw(3, D, seed=0).requires_grad_()
    assert get_world() == 1 and get_rank() == 0 and gather_sizes(3, x.device) == [3]
    assert gather_sizes(3, x.device, (3,)) == [3]
    for wrong in ((4,), (3, 3)):  # shares that the settings give, and this rank does not hold
        with pytest.raises(RankLostError, match="rank 0 holds 3 rows of a batch whose shares are"):
            gather_sizes(3, x.device, wrong)
    assert all_gather_with_grad(x) is x
    assert torch.equal(all_gather_uneven(x), x) and not all_gather_uneven(x).requires_grad
    mean = all_reduce_mean(x)
    mean.zero_()
    assert x.detach().abs().max() > 0  # a copy


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
