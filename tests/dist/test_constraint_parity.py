"""The whole loss of `third_party`, every evaluator, on 2 processes of every backend against plain torch in one process.

By default one evaluator and the memory of past steps on three backends, in the sharpest precision, and one in float32:
test_matrix.py has every evaluator on every backend. All backends, encoders, evaluators and precisions, on 2 and on 4
processes: pytest -m matrix tests/dist. The ranks run this file as a script; one start per backend does everything that
the tests below look at. Shares are uneven (2 and 3 forgotten images), calibration included, and the constraint
outweighs the utility.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from constraint_training import ENCODERS, EVALUATORS, SHARDED, Case, errors, plain, sharded, warm, within
from processes import launch
from toys import update_error

from distunlearn.constraints.cross_batch_memory import FeatureMemory
from distunlearn.distributed.collectives import get_rank, get_world
from distunlearn.methods import third_party
from distunlearn.objectives import Bank
from distunlearn.objectives.forward import Context

pytestmark = pytest.mark.slow

BACKENDS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
SOME = ("ddp", "fsdp2")  # whole weights, and shards
OBJECTIVE = {"resnet": "byol", "vit": "simclr"}
# "mixed": weights, gradients, their exchange and the updates in float32, layers in float64. With layers in float32 one
# process alone is further from float64 than the limits allow, and nothing could be said about the exchange.
STEPS = {"float64": 4, "mixed": 2, "float32": 2}
MEMORY = "+memory"  # after an evaluator: with the samples of one past step
WITH_MEMORY = [("resnet", "head" + MEMORY), ("vit", "sketch" + MEMORY)]


def cases(backend: str, which: str) -> list[tuple[str, str]]:
    """which: "every" pair of encoder and evaluator, or "some": the sketch, encoders and backends in turn."""
    if which == "some":
        return [([*ENCODERS][BACKENDS.index(backend) % 2], "sketch"), *WITH_MEMORY]
    fitting = [name for name in EVALUATORS if name != "double_backward" or backend not in SHARDED]
    return [(e, n) for e in ENCODERS for n in fitting] + WITH_MEMORY


def runs(backend: str, which: str) -> list[tuple[str, str, str]]:
    """(encoder, evaluator, precision); "some": float32 for one evaluator alone."""
    return [
        (encoder, name, precision) for encoder, name in cases(backend, which) for precision in precisions(backend)
        if which == "every" or precision == precisions(backend)[0] or (precision, name) == ("float32", "sketch")
    ]  # fmt: skip


def precisions(kind: str) -> list[str]:
    """The sharpest first; DeepSpeed keeps its weights in float32."""
    return ["mixed", "float32"] if kind.startswith("zero") else ["float64", "mixed", "float32"]


def case_of(encoder: str, evaluator: str) -> Case:
    return Case(evaluator.removesuffix(MEMORY), encoder, OBJECTIVE[encoder], memory=int(evaluator.endswith(MEMORY)))


def wrong_world(power: int):
    """The surrogate with another power of the world than 1: every backend averages, and the constraint changes by W."""
    right = third_party.surrogate
    return mock.patch.object(third_party, "surrogate", lambda x, cotangent, world: right(x, cotangent, world**power))


def bank_of_one_rank():
    """The retain keys of this rank alone: the loss of a sample then depends on where it is computed."""

    right = third_party.retain_bank

    def alone(ctx: Context, branches) -> Bank:
        whole, own = right(ctx, branches), ctx.objective.bank_keys(branches)[1]
        return Bank(whole.keys, whole.ids, ctx.objective.temperature, torch.isin(whole.ids, own))

    return mock.patch.object(third_party, "retain_bank", alone)


def memory_of_one_rank():
    """Past features of this rank alone, as if they were all."""
    right = FeatureMemory.push

    def push(self: FeatureMemory, x: torch.Tensor, y: torch.Tensor) -> None:
        right(self, *(part.tensor_split(get_world())[get_rank()] for part in (x, y)))

    return mock.patch.object(FeatureMemory, "push", push)


# What is done wrong -> the encoder and evaluator that show it, after so many steps.
WRONG = {
    "no factor of the world": ("resnet", "sketch", 1, lambda: wrong_world(0)),
    "the factor of the world twice": ("resnet", "sketch", 1, lambda: wrong_world(2)),
    "a bank of each rank's own": ("vit", "sketch", 1, bank_of_one_rank),
    "a memory of each rank's own": ("resnet", "head" + MEMORY, 2, memory_of_one_rank),
}


def main() -> None:
    folder, kind, which = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    for encoder in ENCODERS:
        warm(case_of(encoder, "head"))  # before there are other processes: its loss would be over all of them
    results = {}
    for encoder, name, precision in runs(kind, which):
        found = sharded(case_of(encoder, name), kind, precision, STEPS[precision])
        results[f"{encoder}-{name}-{precision}"] = found
    for mistake, (encoder, name, steps, patched) in WRONG.items():
        with patched():
            results[mistake] = sharded(case_of(encoder, name), kind, precisions(kind)[0], steps)
    results["world"] = get_world()
    torch.save(results, folder / f"rank-{get_rank()}.pt")


@pytest.fixture(
    scope="module",
    params=[
        *(f"{kind}-2-some" for kind in SOME),
        *(pytest.param(f"{kind}-{n}-every", marks=pytest.mark.matrix) for kind in BACKENDS for n in (2, 4)),
    ],
)
def ran(request, tmp_path_factory):
    """(backend and which cases, results by rank)."""
    kind, world, which = request.param.split("-")
    ranks = launch(__file__, int(world), tmp_path_factory.mktemp(request.param), kind, which, timeout=1200)
    assert [r["world"] for r in ranks] == [len(ranks)] * len(ranks)
    return (kind, which), ranks


@functools.cache
def reference(encoder: str, name: str, precision: str) -> dict:
    return plain(case_of(encoder, name), precision, STEPS[precision])


def test_gradients_and_trajectories_are_those_of_one_process(ran):
    """float64 and mixed: within the stated limits; float32: or within what rounding does to one process."""
    (kind, which), ranks = ran
    wrong = {}
    for encoder, name, precision in runs(kind, which):
        case, key = case_of(encoder, name), f"{encoder}-{name}-{precision}"
        expected = reference(encoder, name, precision)["states"]
        found = [errors(rank[key]["states"], expected) for rank in ranks]
        if not all(within(pair, case, precision, STEPS[precision]) for pair in found):
            wrong[key] = found
    assert not wrong, wrong


def test_calibration_and_metrics_agree(ran):
    (kind, which), ranks = ran
    for encoder, name in cases(kind, which):
        precision = precisions(kind)[0]
        case, expected = f"{encoder}-{name}-{precision}", reference(encoder, name, precision)
        for rank in ranks:
            assert rank[case]["started"] == pytest.approx(expected["started"], rel=1e-3, abs=1e-4), case
            for key in ("phi_gradient", "phi_output"):
                assert rank[case]["metrics"][key] == pytest.approx(expected["metrics"][key], rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("mistake", WRONG)
def test_negative_control(ran, mistake):
    (kind, _), ranks = ran
    encoder, name, steps, _ = WRONG[mistake]
    expected = reference(encoder, name, precisions(kind)[0])["states"]
    found = ranks[0][mistake]["states"]
    assert update_error(found[steps], expected[steps], expected[steps - 1]) > 0.02


if __name__ == "__main__":
    main()
