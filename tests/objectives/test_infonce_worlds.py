"""Every form over 1, 2 and 4 gloo processes with uneven shares against one process; and which schemes scale wrongly.

The second half is a table of schemes that contrastive code uses over W ranks: with gradients averaged over the ranks,
as every backend does, only two give the gradient of the global batch. A factor 1/W in one term hides under Adam, but
changes what that term weighs against all others with the number of processes.

The processes run this very file as a script and leave their results in a folder. Rank r holds images `share(N)`.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parts import objective_settings
from torch.nn.functional import cross_entropy, normalize
from worlds import launch

from distunlearn.distributed.collectives import (
    RingPass,
    all_gather_detached,
    all_gather_with_grad,
    all_reduce_mean,
    gather_sizes,
    get_rank,
    get_world,
    mean_scale,
)
from distunlearn.objectives import Branches, make_objective
from distunlearn.objectives.infonce import infonce
from distunlearn.objectives.simclr import nt_xent
from distunlearn.objectives.tiled_softmax import Columns

D_IN, D, TAU = 6, 5, 0.3
WORLDS = (1, 2, 4)
COUNTS = (8, 7, 3)  # even in all worlds; uneven; a rank without any image in the world of 4
FORMS = ("plain", "tiled", "ring")
LOSSES = ("nt_xent", "two towers", "roles and ids", "mocov3")
TIGHT = {"rtol": 0.0, "atol": 1e-10}
Results = dict[str, dict[str, torch.Tensor]]


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def share(count: int) -> slice:
    """This rank's contiguous images."""
    edges = [count * r // get_world() for r in range(get_world() + 1)]
    return slice(edges[get_rank()], edges[get_rank() + 1])


def leaves() -> tuple[torch.Tensor, torch.Tensor]:
    """Weight of a linear encoder, and the temperature, both learned."""
    return draw(D, D_IN, seed=3).requires_grad_(), torch.tensor(TAU, dtype=torch.float64, requires_grad=True)


def averaged(loss: torch.Tensor, weight: torch.Tensor, tau: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss and gradients as every backend averages them over the ranks."""
    grads = torch.autograd.grad(loss, (weight, tau), allow_unused=True)
    names = zip(("grad", "tau"), grads, strict=True)
    return {"loss": all_reduce_mean(loss)} | {name: all_reduce_mean(g) for name, g in names if g is not None}


# -- the forms ---------------------------------------------------------------------------------------------------


def masked_loss(u: torch.Tensor, count: int, tau: torch.Tensor, form: str, live_keys: bool = True) -> torch.Tensor:
    """Both views of each image against all, less one role (every fifth image) and the same person."""
    sizes = gather_sizes(u.shape[1], u.device)
    start = 2 * sum(sizes[: get_rank()])
    rows = torch.arange(2 * u.shape[1]) + start
    person = (torch.arange(count) % 3).repeat_interleave(2)
    valid = (torch.arange(count) % 5 > 0).repeat_interleave(2)
    columns = Columns(rows ^ 1, own=rows, query_ids=person[rows], key_ids=person, valid=valid)
    queries = normalize(u, dim=-1).transpose(0, 1).flatten(0, 1)
    keys = queries if live_keys else queries.detach()
    losses = infonce(queries, keys, columns, tau, [2 * size for size in sizes], budget=70, form=form)
    return losses.sum() * mean_scale(sizes) / 2


def two_towers(image: torch.Tensor, text: torch.Tensor, tau: torch.Tensor, form: str) -> torch.Tensor:
    """Both directions as one call with a leading dimension, and a temperature with a graph."""
    u, v = normalize(image, dim=-1), normalize(text, dim=-1)
    sizes = gather_sizes(u.shape[0], u.device)
    pairs = Columns(torch.arange(u.shape[0]) + sum(sizes[: get_rank()]))
    losses = infonce(torch.stack([u, v]), torch.stack([v, u]), pairs, tau, sizes, budget=70, form=form)
    return losses.sum() * mean_scale(sizes) / 2


def form_results(loss: str, count: int, form: str) -> dict[str, torch.Tensor]:
    weight, tau = leaves()
    output = draw(2, count, D_IN, seed=count)[:, share(count)] @ weight.T
    if loss == "nt_xent":
        return averaged(nt_xent(output, tau, 70, form), weight, tau)
    if loss == "two towers":
        return averaged(two_towers(output[0], output[1] ** 2, tau, form), weight, tau)
    if loss == "roles and ids":
        return averaged(masked_loss(output, count, tau, form), weight, tau)
    # By the byte budget alone: 1 is less than the gathered keys take, 2,000 more than they and less than the rest.
    budget = {"plain": 1 << 30, "tiled": 2 * count * D * 8, "ring": 1}[form]
    b = Branches(output, output.detach(), target=draw(2, count, D, seed=count + 1)[:, share(count)])
    objective = make_objective(objective_settings("mocov3"))
    objective.temperature, objective.budget = TAU, budget
    return averaged(objective.task_loss(b), weight, tau)


def ring_results(count: int) -> dict[str, torch.Tensor]:
    """Blocks of uneven size go all the way round and come home."""
    sizes = gather_sizes(share(count).stop - share(count).start, torch.device("cpu"))
    world, rank = get_world(), get_rank()
    block, seen = draw(count, 2, seed=1)[share(count)], []
    for hop in range(world):
        seen.append(block.clone())
        block = RingPass(block, sizes[(rank - hop - 1) % world]).wait()
    return {"seen": torch.cat([seen[(rank - r) % world] for r in range(world)]), "home": block}


# -- the table ---------------------------------------------------------------------------------------------------


class AverageBackward(torch.autograd.Function):
    """DisCo-CLIP's example: the gradients of a gathered slice are averaged over the ranks."""

    @staticmethod
    def forward(ctx, x, sizes):
        ctx.rows = slice(sum(sizes[: get_rank()]), sum(sizes[: get_rank() + 1]))
        return all_gather_detached(x, sizes)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce_mean(grad)[ctx.rows], None


class OwnSliceBackward(AverageBackward):
    """The early SimCLR GatherLayer: a rank keeps what it asks of its own slice itself."""

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.rows], None


def scheme_loss(scheme: str, u: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """u: this rank's embeddings [m, D], rows 2i and 2i + 1 a pair, the same m on all ranks. A rank's own loss."""
    sizes = [u.shape[0]] * get_world()
    mine = slice(u.shape[0] * get_rank(), u.shape[0] * (get_rank() + 1))
    own, every = torch.arange(mine.start, mine.stop), torch.arange(sum(sizes))

    def loss(queries, keys, rows):
        logits = (queries @ keys.T / tau).scatter(1, rows[:, None], -torch.inf)
        return cross_entropy(logits, rows ^ 1)

    def live(gathered):
        return torch.cat([gathered[: mine.start], u, gathered[mine.stop :]])

    detached, summed = all_gather_detached(u, sizes), all_gather_with_grad(u, sizes)
    if scheme == "local loss, sum":
        return loss(u, summed, own)
    if scheme == "global loss, sum":
        return loss(summed, summed, every)
    if scheme == "global loss, own slice live":
        return loss(live(detached), live(detached), every)
    if scheme == "local loss, average":
        gathered = AverageBackward.apply(u, sizes)
        return loss(gathered[mine], gathered, own)
    if scheme == "global loss, own slice of the gradient":
        gathered = OwnSliceBackward.apply(u, sizes)
        return loss(gathered, gathered, every)
    if scheme == "local loss, no gradient":
        return loss(u, detached, own)
    if scheme == "local loss, own slice live":
        return loss(u, live(detached), own)
    assert scheme == "no gather"
    return loss(u, u, torch.arange(u.shape[0]))


SCHEMES = {  # factor on the encoder's gradient where it is one number; else None
    "local loss, sum": lambda world: 1.0,
    "global loss, sum": lambda world: 1.0,
    "global loss, own slice live": lambda world: 1 / world,
    "local loss, average": lambda world: 1 / world,
    "global loss, own slice of the gradient": lambda world: 1 / world,
    "local loss, no gradient": lambda world: None,
    "local loss, own slice live": lambda world: None if world > 1 else 1.0,
    "no gather": lambda world: None if world > 1 else 1.0,
}
TABLE_COUNT = 16


def scheme_results(scheme: str) -> dict[str, torch.Tensor]:
    weight, tau = leaves()
    output = draw(2, TABLE_COUNT, D_IN, seed=8)[:, share(TABLE_COUNT)] @ weight.T
    u = normalize(output, dim=-1).transpose(0, 1).flatten(0, 1).contiguous()
    return averaged(scheme_loss(scheme, u, tau), weight, tau)


# -- processes ---------------------------------------------------------------------------------------------------


def all_results() -> Results:
    results = {f"{loss} {c} {form}": form_results(loss, c, form) for loss in LOSSES for c in COUNTS for form in FORMS}
    results |= {f"ring {c}": ring_results(c) for c in COUNTS} if get_world() > 1 else {}
    results |= {scheme: scheme_results(scheme) for scheme in SCHEMES}
    weight, tau = leaves()
    output = draw(2, 8, D_IN, seed=8)[:, share(8)] @ weight.T
    results["keys held"] = averaged(masked_loss(output, 8, tau, "ring", live_keys=False), weight, tau)
    return results


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder / 'init'}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world, timeout=timedelta(seconds=90))
    torch.save(all_results(), folder / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks_of(tmp_path_factory):
    """world -> results by rank; the processes of a world run once. A world of 1 needs none."""
    done: dict[int, list[Results]] = {}

    def results(world: int) -> list[Results]:
        if world not in done:
            folder = tmp_path_factory.mktemp(f"world-{world}")
            done[world] = launch(__file__, world, folder) if world > 1 else [all_results()]
        return done[world]

    return results


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("world", WORLDS)
def test_every_form_equals_the_plain_form_on_one_process(ranks_of, world, loss, count, form):
    expected = form_results(loss, count, "plain")
    assert expected["grad"].abs().max() > 1e-3
    for rank in ranks_of(world):
        for name, value in expected.items():
            torch.testing.assert_close(rank[f"{loss} {count} {form}"][name], value, **TIGHT)


@pytest.mark.parametrize("world", WORLDS)
def test_the_key_gradients_that_travel_are_seen(ranks_of, world):
    """Negative control: a ring whose key gradients do not come home."""
    expected = form_results("roles and ids", 8, "plain")
    found = ranks_of(world)[0]["keys held"]
    torch.testing.assert_close(found["loss"], expected["loss"], **TIGHT)
    assert (found["grad"] - expected["grad"]).abs().max() > 1e-3


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("world", [2, 4])
def test_blocks_go_round_the_ring_and_come_home(ranks_of, world, count):
    rows = draw(count, 2, seed=1)
    for rank in ranks_of(world):
        assert torch.equal(rank[f"ring {count}"]["seen"], rows)
    assert torch.equal(torch.cat([rank[f"ring {count}"]["home"] for rank in ranks_of(world)]), rows)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("world", WORLDS)
def test_which_schemes_are_right_and_by_which_factor_the_others_are_off(ranks_of, world, scheme):
    weight, tau = leaves()
    expected = averaged(nt_xent(draw(2, TABLE_COUNT, D_IN, seed=8) @ weight.T, tau), weight, tau)
    found, factor = ranks_of(world)[0][scheme], SCHEMES[scheme](world)
    cosine = torch.cosine_similarity(found["grad"].flatten(), expected["grad"].flatten(), dim=0).item()
    ratio = (found["grad"].norm() / expected["grad"].norm()).item()
    if factor is not None:
        torch.testing.assert_close(found["grad"], factor * expected["grad"], **TIGHT)
    else:
        assert cosine < 1 - 1e-4
    if scheme == "no gather" and world > 1:  # fewer negatives: another loss altogether
        assert cosine < 0.998
        assert not torch.allclose(found["tau"], expected["tau"], rtol=1e-2)
        return
    torch.testing.assert_close(found["tau"], expected["tau"], **TIGHT)  # a temperature's gradient shows nothing
    if scheme == "local loss, no gradient":
        assert 0.4 < ratio < 0.7
    if scheme == "local loss, own slice live" and world > 1:
        assert 0.5 < ratio < 0.99


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
