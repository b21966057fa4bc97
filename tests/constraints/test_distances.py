"""Energy distance: value, unbiasedness, exact gradient over shards (simulated and over gloo), permutation test."""

from __future__ import annotations

import functools
import gc
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy import stats
from torch import nn
from worlds import launch

from distunlearn.constraints.distances.energy import (
    DISTANCES,
    energy_distance,
    own_rows,
    permutation_test,
    surrogate,
    value_and_cotangent,
)


def brute_force(x: np.ndarray, y: np.ndarray, *, self_pairs: bool = False) -> float:
    """The definition with loops; `self_pairs` makes it the V-statistic."""

    def mean(a, b, same):
        every = self_pairs or not same
        pairs = [np.linalg.norm(p - q) for i, p in enumerate(a) for j, q in enumerate(b) if every or i != j]
        return sum(pairs) / len(pairs)

    return 2 * mean(x, y, False) - mean(x, x, True) - mean(y, y, True)


def v_statistic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return 2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()


def normal(*shape: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- value and derivative ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "k"), [(2, 2, 1), (5, 9, 3), (40, 31, 65)])
def test_value_equals_the_definition(n, m, k):
    x, y = normal(n, k, seed=0), normal(m, k, seed=1) * 1.5 + 0.3
    assert energy_distance(x, y).item() == pytest.approx(brute_force(x.numpy(), y.numpy()), rel=1e-12, abs=1e-12)
    assert energy_distance(x, y).item() == pytest.approx(energy_distance(y, x).item(), rel=1e-12)
    assert DISTANCES["energy"] is energy_distance


def test_one_dimension_is_twice_cramers_distance():
    """E = 2 * integral of (F - G)^2, here between point masses at 0 and at 1 (both doubled): 2."""
    x, y = torch.zeros(2, 1), torch.ones(2, 1)
    assert energy_distance(x, y).item() == 2.0


def test_close_pairs_far_from_the_origin_keep_their_distance_in_float32():
    x, y = normal(60, 3, seed=0), normal(60, 3, seed=1)
    exact = energy_distance(x + 100, y + 100)
    assert energy_distance((x + 100).float(), (y + 100).float()).item() == pytest.approx(exact.item(), abs=1e-4)


def test_derivatives():
    x, y = normal(4, 3, seed=0).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(energy_distance, (x, y))


def test_coinciding_points_have_finite_derivatives():
    x = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    energy_distance(x, torch.zeros(3, 3, dtype=torch.float64)).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    x = normal(4, 3, seed=0)
    x[1] = x[0]
    x.requires_grad_()
    energy_distance(x, torch.cat([x.detach()[:1], normal(3, 3, seed=1)])).backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.zeros(1, 2), torch.zeros(5, 2), "at least 2 of each, got 1 and 5"),
        (torch.zeros(5, 2), torch.zeros(1, 2), "at least 2 of each, got 5 and 1"),
        (torch.zeros(5, 2), torch.zeros(5, 3), "are compared, got"),
        (torch.zeros(5), torch.zeros(5), "are compared, got"),
    ],
)
def test_impossible_samples_are_refused(x, y, words):
    with pytest.raises(ValueError, match=words):
        energy_distance(x, y)
    with pytest.raises(ValueError, match=words):
        permutation_test(x, y, 10, 0)


# -- unbiasedness ------------------------------------------------------------------------------------------------


@functools.cache
def null_statistics(kind: str, n: int = 16, repetitions: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Value and derivative with respect to the scale of x at scale 1, for x and y of one Student-t(5) distribution."""
    rng = np.random.default_rng(11)
    distance = {"u": energy_distance, "v": v_statistic}[kind]
    values, slopes = [], []
    for _ in range(repetitions):
        x, y = (torch.from_numpy(rng.standard_t(5, size=(n, 2))) for _ in range(2))
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        value = distance(scale * x, y)
        value.backward()
        values.append(value.item())
        slopes.append(scale.grad.item())
    return np.array(values), np.array(slopes)


def deviation(sample: np.ndarray) -> float:
    """Mean in standard errors."""
    return sample.mean() / (sample.std(ddof=1) / np.sqrt(len(sample)))


def test_u_statistic_is_unbiased_when_both_are_alike():
    values, slopes = null_statistics("u")
    assert abs(deviation(values)) < 3
    assert abs(deviation(slopes)) < 3
    assert (values < 0).mean() > 0.3  # as an unbiased estimate of 0 must be


def test_v_statistic_is_biased():
    """Negative control: with self-pairs the value is too large and its derivative shrinks x."""
    values, slopes = null_statistics("v")
    assert deviation(values) > 20
    assert deviation(slopes) > 20


def test_derivative_of_the_u_statistic_is_unbiased_away_from_the_null():
    """Mean over small batches against one large sample, x twice as wide as y."""
    rng = np.random.default_rng(5)

    def slope(n):
        x, y = (torch.from_numpy(rng.standard_normal((n, 2))) for _ in range(2))
        scale = torch.full((), 2.0, dtype=torch.float64, requires_grad=True)
        energy_distance(scale * x, y).backward()
        return scale.grad.item()

    # E|ax - y| - 1/2 E|ax - ax'| for 2-d normals: lengths are Rayleigh with mean s * sqrt(pi / 2)
    expected = np.sqrt(np.pi / 2) * (2 * 2 / np.sqrt(4 + 1) - np.sqrt(2))
    slopes = np.array([slope(8) for _ in range(3000)])
    assert abs(deviation(slopes - expected)) < 3


# -- exact over shards -------------------------------------------------------------------------------------------


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def flat_gradient(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def reference_gradient(inputs: torch.Tensor, third: torch.Tensor) -> torch.Tensor:
    net = small_net()
    energy_distance(net(inputs), net(third).detach()).backward()
    return flat_gradient(net)


def sharded_gradient(inputs, third, split: list[slice], world_factor: float) -> torch.Tensor:
    """Mean over simulated ranks of the gradient of each rank's surrogate."""
    net = small_net()
    with torch.no_grad():
        x_global, y_global = net(inputs), net(third)
    _, cotangent = value_and_cotangent(energy_distance, x_global, y_global)
    for rows in split:
        (surrogate(net(inputs[rows]), cotangent[rows], len(split)) * world_factor / len(split)).backward()
    return flat_gradient(net)


SPLITS = {
    "even": [slice(0, 6), slice(6, 12)],
    "uneven": [slice(0, 7), slice(7, 12)],
    "empty": [slice(0, 12), slice(12, 12)],
}
DATA = functools.partial(normal, 12, 4, seed=3), functools.partial(normal, 9, 4, seed=4)


@pytest.mark.parametrize("split", SPLITS)
def test_mean_over_ranks_of_the_surrogates_is_the_global_gradient(split):
    inputs, third = (make() for make in DATA)
    expected = reference_gradient(inputs, third)
    torch.testing.assert_close(sharded_gradient(inputs, third, SPLITS[split], 1), expected, atol=1e-13, rtol=1e-12)
    for wrong in (0.5, 2.0):  # negative controls: W dropped, W twice
        off = (sharded_gradient(inputs, third, SPLITS[split], wrong) - expected).norm() / expected.norm()
        assert off > 0.4


def test_value_and_cotangent_leave_no_graph_and_move_only_x():
    net = small_net()
    x, y = net(normal(6, 4, seed=0)), net(normal(7, 4, seed=1))
    phi, cotangent = value_and_cotangent(energy_distance, x, y)
    assert not phi.requires_grad and not cotangent.requires_grad and cotangent.shape == x.shape
    assert phi.item() == energy_distance(x, y).item()
    with torch.no_grad():
        again = value_and_cotangent(energy_distance, x, y)
    assert torch.equal(again[1], cotangent)


def rank_results(rank: int, world: int) -> dict[str, torch.Tensor]:
    """DDP averages the gradients, features are gathered over gloo."""
    from torch.nn.parallel import DistributedDataParallel

    from distunlearn.distributed.collectives import all_gather_uneven

    inputs, third = (make() for make in DATA)
    rows, third_rows = SPLITS["uneven"][rank], [slice(0, 4), slice(4, 9)][rank]
    results = {}
    for name, factor in (("right", 1.0), ("dropped", 1 / world), ("twice", float(world))):
        net = DistributedDataParallel(small_net())
        features = net(torch.cat([inputs[rows], third[third_rows]]))
        count = rows.stop - rows.start
        forget, strangers = features[:count], features[count:]
        phi, cotangent = value_and_cotangent(energy_distance, all_gather_uneven(forget), all_gather_uneven(strangers))
        (factor * surrogate(forget, cotangent[rows], world)).backward()
        results |= {name: flat_gradient(net.module), "phi": phi}
    return results


def rank_main(rank: int, world: int, folder: str) -> None:
    """One of two real processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    assert dist.get_world_size() == world == 2
    torch.save(rank_results(rank, world), Path(folder) / f"rank-{rank}.pt")
    # A DDP wrapper sits in a reference cycle; one that outlives the group aborts the process at exit, now and then.
    gc.collect()
    dist.destroy_process_group()


def test_two_processes_over_gloo_get_the_gradient_of_one(tmp_path):
    ranks = launch(__file__, 2, tmp_path)
    inputs, third = (make() for make in DATA)
    expected = reference_gradient(inputs, third)
    net = small_net()
    phi = energy_distance(net(inputs), net(third)).item()
    for got in ranks:
        assert got["phi"].item() == pytest.approx(phi, rel=1e-12)
        torch.testing.assert_close(got["right"], expected, atol=1e-13, rtol=1e-11)
        for wrong in ("dropped", "twice"):
            assert (got[wrong] - expected).norm() / expected.norm() > 0.4


# -- permutation test --------------------------------------------------------------------------------------------


def test_permutation_p_equals_brute_force_over_the_same_labelling_law():
    """All 20 splits of 3 + 3 points are equally likely: p must approach their exact tail."""
    from itertools import combinations

    x, y = normal(3, 2, seed=0), normal(3, 2, seed=1) + 1.2
    pooled = torch.cat([x, y]).numpy()
    observed = brute_force(x.numpy(), y.numpy())
    tail = []
    for chosen in combinations(range(6), 3):
        rest = [i for i in range(6) if i not in chosen]
        tail.append(brute_force(pooled[list(chosen)], pooled[rest]) >= observed - 1e-12)
    assert permutation_test(x, y, 20000, 0) == pytest.approx(np.mean(tail), abs=0.015)


@pytest.mark.parametrize(("n", "m"), [(2, 5), (6, 3), (4, 4)])
def test_every_labelling_gets_its_own_energy_distance(n, m):
    from distunlearn.constraints.distances.energy import _energy_of_labels

    pooled = normal(n + m, 3, seed=5)
    rng = np.random.default_rng(0)
    labels = np.stack([rng.permutation(np.arange(n + m) < n) for _ in range(6)])
    got = _energy_of_labels(torch.cdist(pooled, pooled).numpy(), labels.astype(float))
    expected = [energy_distance(pooled[row], pooled[~row]).item() for row in torch.from_numpy(labels)]
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_permutation_p_is_uniform_when_both_are_alike():
    rng = np.random.default_rng(2)

    def sample() -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal((12, 3)))

    p = [permutation_test(sample(), sample(), 199, seed) for seed in range(400)]
    jittered = np.array(p) - rng.uniform(0, 1 / 200, size=len(p))  # p lives on a grid of 1/200
    assert stats.kstest(jittered, "uniform").pvalue > 1e-3
    assert np.mean(np.array(p) <= 0.05) < 0.05 + 4 * np.sqrt(0.05 * 0.95 / 400)


def test_permutation_p_is_small_for_different_distributions_and_reproducible():
    x, y = normal(40, 3, seed=0), normal(40, 3, seed=1) + 1
    assert permutation_test(x, y, 199, 0) == 1 / 200
    near = normal(40, 3, seed=2)
    assert permutation_test(x, near, 199, 3) == permutation_test(x.requires_grad_(), near, 199, 3)


def test_permutation_p_of_identical_points_is_one():
    assert permutation_test(torch.full((5, 2), 0.1), torch.full((6, 2), 0.1), 99, 0) == 1.0


def test_a_permutation_test_without_permutations_is_refused():
    with pytest.raises(ValueError, match="at least 1 permutation, got 0"):
        permutation_test(torch.zeros(3, 1), torch.zeros(3, 1), 0, 0)


@pytest.mark.parametrize("name", sorted(DISTANCES))
def test_rows_of_three_ranks_add_up_to_the_whole(name):
    """The last rank has no row of x; a row that meets itself in both samples is its own neighbour at distance 0."""
    x, y = normal(7, 5, seed=0), normal(6, 5, seed=1)
    y[2] = x[1]
    shares = [(slice(0, 4), slice(0, 1)), (slice(4, 7), slice(1, 6)), (slice(7, 7), slice(6, 6))]
    phi, cotangent = value_and_cotangent(DISTANCES[name], x, y, seed=3, step=1)
    found = [own_rows(DISTANCES[name], x, y, rows, 3, seed=3, step=1) for rows in shares]
    torch.testing.assert_close(sum(share for share, _ in found), phi)
    torch.testing.assert_close(torch.cat([rows for _, rows in found]), cotangent)
    assert not torch.allclose(sum(share for share, _ in found[:1]), phi)  # control


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
