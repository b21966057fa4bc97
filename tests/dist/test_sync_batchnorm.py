"""SyncBatchNorm on 2 and 4 processes against nn.BatchNorm on the whole batch, in float64: values, gradients, buffers.

The ranks run this file as a script. N = images of the global batch, of which rank r holds a contiguous share.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import launch
from torch import Tensor, nn

from distunlearn.distributed import sync_batchnorm
from distunlearn.distributed.collectives import (
    all_gather_detached,
    all_reduce_mean,
    gather_sizes,
    get_rank,
    get_world,
    mean_scale,
)

pytestmark = pytest.mark.slow

C = 3
WORLDS = (2, 4)
COUNTS = (8, 7, 3)  # even; uneven; a rank without any image in the world of 4
KINDS = ("1d", "2d", "images", "cumulative", "no affine", "no buffers", "act")
WRONG = ("per rank", "dropped reduction", "mean of means")
TIGHT = {"rtol": 0.0, "atol": 1e-12}
STEPS = 2


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def share(count: int) -> slice:
    edges = [count * r // get_world() for r in range(get_world() + 1)]
    return slice(edges[get_rank()], edges[get_rank() + 1])


def build(kind: str) -> nn.Module:
    """A norm with weights that are not those of a fresh one."""
    if kind == "act":
        from timm.layers import BatchNormAct2d

        norm: nn.Module = BatchNormAct2d(C, act_layer=nn.SiLU)
    elif kind == "1d":
        norm = nn.BatchNorm1d(C)
    else:
        settings = {
            "2d": {"momentum": 0.3},
            "images": {},
            "cumulative": {"momentum": None},
            "no affine": {"affine": False},
            "no buffers": {"track_running_stats": False},
        }
        norm = nn.BatchNorm2d(C, **settings[kind])
    norm.double()
    with torch.no_grad():
        for number, parameter in enumerate(norm.parameters()):
            parameter.copy_(1 + draw(C, seed=number))
    return norm


def results(kind: str, count: int, norm: nn.Module | None = None) -> dict[str, Tensor]:
    """Two training steps and an eval forward; a loss that depends on every value, scaled as collectives says."""
    norm = norm or sync_batchnorm.convert(build(kind), get_world())
    # 6 pixels and 30; the loss of 30 is not to be larger, nor its rounding
    shape = (count, C) if kind == "1d" else (count, C, 5, 6) if kind == "images" else (count, C, 2, 3)
    size = 0.2 if kind == "images" else 1.0
    mine = share(count)
    out = {}
    for step in range(STEPS):
        x = (3 + 2 * draw(*shape, seed=10 + step))[mine].requires_grad_()
        y = norm(x)
        weights = draw(*shape, seed=20 + step)[mine]
        scale = mean_scale(gather_sizes(x.shape[0], x.device))
        loss = size * scale * (weights * y.square() + y.pow(3)).sum()
        wanted = [x, *norm.parameters()]
        grad_x, *grads = torch.autograd.grad(loss, wanted)
        # Summed over ranks by the gather; the backends average: the input's share of the mean loss is 1 / W of it.
        out |= {f"y {step}": y.detach(), f"x {step}": grad_x / get_world()}
        out |= {f"parameter {i} {step}": all_reduce_mean(g) for i, g in enumerate(grads)}
        out[f"loss {step}"] = all_reduce_mean(loss)
    norm.eval()
    out["eval"] = norm(3 + 2 * draw(*shape, seed=30)).detach()
    return out | {f"buffer {name}": value for name, value in norm.named_buffers()}


def wrong_results(scheme: str) -> dict[str, Tensor]:
    """What a check that can fail must notice."""
    if scheme == "per rank":
        return results("2d", 8, build("2d"))
    right = sync_batchnorm.sum_over_ranks, sync_batchnorm._global_statistics
    try:
        if scheme == "dropped reduction":
            # of the backward, whose sums are [2, C]
            sync_batchnorm.sum_over_ranks = lambda sums: sums if sums.dim() == 2 else right[0](sums)
            return results("2d", 8)
        sync_batchnorm._global_statistics = unweighted
        return results("2d", 7)
    finally:
        sync_batchnorm.sum_over_ranks, sync_batchnorm._global_statistics = right


def unweighted(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means averaged over ranks as if all had the same number of rows."""
    variance, mean = torch.var_mean(x, [0, 2, 3], correction=0)
    everyone = all_gather_detached(torch.cat([mean, variance])[None])
    count = torch.tensor(float(sum(gather_sizes(x.numel() // C, x.device))), dtype=x.dtype)
    return everyone[:, :C].mean(0), everyone[:, C:].mean(0) * count, count


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {f"{kind} {count}": results(kind, count) for kind in KINDS for count in COUNTS}
    found |= {f"wrong {scheme}": wrong_results(scheme) for scheme in WRONG}
    torch.save(found, folder / f"rank-{get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks_of(tmp_path_factory):
    """world -> results by rank; the processes of a world run once."""
    done = {}

    def found(world: int) -> list[dict[str, dict[str, Tensor]]]:
        if world not in done:
            done[world] = launch(__file__, world, tmp_path_factory.mktemp(f"world-{world}"))
        return done[world]

    return found


def whole(ranks: list[dict[str, dict[str, Tensor]]], case: str) -> dict[str, Tensor]:
    """Rows of all ranks in order; everything else from the first rank."""
    first = ranks[0][case]
    rows = {k: torch.cat([rank[case][k] for rank in ranks]) for k in first if k.startswith(("x ", "y "))}
    return first | rows


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", WORLDS)
def test_values_gradients_and_buffers_are_those_of_the_whole_batch(ranks_of, world, kind, count):
    ranks = ranks_of(world)
    expected, found = results(kind, count, build(kind)), whole(ranks, f"{kind} {count}")
    assert expected.keys() == found.keys() and expected["x 1"].abs().max() > 1e-2
    for name, value in expected.items():
        if name == "eval" and kind == "no buffers":
            continue  # batch statistics without training: of this process's own batch, as in torch
        torch.testing.assert_close(found[name], value, **TIGHT, msg=lambda text, name=name: f"{name}: {text}")
    for rank in ranks:
        for name in rank[f"{kind} {count}"]:
            if name.startswith(("buffer", "parameter", "loss")):
                torch.testing.assert_close(rank[f"{kind} {count}"][name], found[name], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("scheme", WRONG)
@pytest.mark.parametrize("world", WORLDS)
def test_the_check_can_fail(ranks_of, world, scheme):
    expected = results("2d", 7 if scheme == "mean of means" else 8, build("2d"))
    found = whole(ranks_of(world), f"wrong {scheme}")
    assert (found["x 0"] - expected["x 0"]).abs().max() > 1e-3
    if scheme == "dropped reduction":  # the values are right and only the gradient tells
        torch.testing.assert_close(found["y 0"], expected["y 0"], **TIGHT)
    else:
        assert (found["y 0"] - expected["y 0"]).abs().max() > 1e-3


if __name__ == "__main__":
    main(Path(sys.argv[1]))
