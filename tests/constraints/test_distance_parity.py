"""Every distance over 2 and 4 gloo processes with uneven counts: value and gradient of one process; negative controls.

The processes run this very file as a script and leave their results in a folder.
"""

from __future__ import annotations

import gc
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from worlds import launch

from distunlearn.constraints.distances.energy import DISTANCES, surrogate, value_and_cotangent
from distunlearn.distributed.collectives import (
    all_gather_detached,
    all_gather_uneven,
    gather_sizes,
    get_rank,
    get_world,
)

SEED, STEP = 5, 17
FORGET, THIRD = 11, 9
CUTS = {1: ([11], [9]), 2: ([4, 7], [6, 3]), 4: ([3, 1, 0, 7], [0, 5, 3, 1])}  # images per rank: forget, third-party


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def share(counts: list[int]) -> slice:
    start = sum(counts[: get_rank()])
    return slice(start, start + counts[get_rank()])


def flat_gradient(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters()])


def reference(name: str) -> dict[str, torch.Tensor]:
    """Autograd through the distance itself, on one process, with the third party held."""
    module = net()
    x, y = module(draw(FORGET, 4, seed=3)), module(1.5 * draw(THIRD, 4, seed=4)).detach()
    phi = DISTANCES[name](x, y, seed=SEED, step=STEP)
    phi.backward()
    return {"phi": phi.detach(), "grad": flat_gradient(module)}


def sharded(name: str, step: int, factor: float) -> dict[str, torch.Tensor]:
    """As the method does it: gathered features, own rows of the derivative, gradients averaged by DDP."""
    world = get_world()
    forget, third = (share(counts) for counts in CUTS[world])
    module = net()
    model = nn.parallel.DistributedDataParallel(module) if world > 1 else module
    count = forget.stop - forget.start
    features = model(torch.cat([draw(FORGET, 4, seed=3)[forget], 1.5 * draw(THIRD, 4, seed=4)[third]]))
    x, y = features[:count], features[count:]
    sizes = gather_sizes(count, x.device)
    phi, cotangent = value_and_cotangent(
        DISTANCES[name], all_gather_detached(x, sizes), all_gather_uneven(y), seed=SEED, step=step
    )
    (factor * surrogate(x, cotangent[forget], world)).backward()
    return {"phi": phi, "grad": flat_gradient(module)}


def all_results() -> dict[str, dict[str, torch.Tensor]]:
    results = {name: sharded(name, STEP, 1.0) for name in DISTANCES}
    results["factor W dropped"] = sharded("mmd", STEP, 1 / get_world())
    results["own draw on every rank"] = sharded("mmd", STEP + get_rank(), 1.0)
    return results


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder / 'init'}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world, timeout=timedelta(seconds=90))
    torch.save(all_results(), folder / f"rank-{rank}.pt")
    # A DDP wrapper sits in a reference cycle; one that outlives the group aborts the process at exit, now and then.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """Results by rank of one world."""
    world, folder = request.param, tmp_path_factory.mktemp(f"world-{request.param}")
    return launch(__file__, world, folder)


@pytest.mark.parametrize("name", DISTANCES)
def test_value_and_gradient_equal_one_process(ranks, name):
    expected = reference(name)
    assert expected["grad"].norm() > 1e-3
    for found in ranks:
        torch.testing.assert_close(found[name]["phi"], expected["phi"], atol=1e-13, rtol=1e-11)
        torch.testing.assert_close(found[name]["grad"], expected["grad"], atol=1e-13, rtol=1e-10)


@pytest.mark.parametrize("mistake", ["factor W dropped", "own draw on every rank"])
def test_the_parity_test_can_fail(ranks, mistake):
    expected = reference("mmd")["grad"]
    for found in ranks:
        assert (found[mistake]["grad"] - expected).norm() / expected.norm() > 1e-3


@pytest.mark.parametrize("name", DISTANCES)
def test_one_process_needs_no_group(name):
    found, expected = sharded(name, STEP, 1.0), reference(name)
    torch.testing.assert_close(found["phi"], expected["phi"], atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(found["grad"], expected["grad"], atol=1e-14, rtol=1e-11)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
