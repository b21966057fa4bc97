"""The whole loss of `third_party`, every evaluator, on 2 processes of every backend against plain torch in one process.

The same on 4 processes, which two cores take minutes for: pytest -m matrix tests/dist. The ranks run this file as a script; one start per backend does everything that the tests below look at. Shares are
uneven (2 and 3 forgotten images), calibration included, and the constraint outweighs the utility.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from constraint_training import ENCODERS, EVALUATORS, SHARDED, Case, errors, plain, sharded, warm, within
from processes import launch
from toys import update_error

from distunlearn.methods import Context, third_party
from distunlearn.objectives import Bank
from distunlearn.objectives.gather import get_rank, get_world

pytestmark = pytest.mark.slow

BACKENDS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
PRECISE = ("ddp", "fsdp2")  # DeepSpeed keeps float32
OBJECTIVE = {"resnet": "byol", "vit": "simclr"}
STEPS = {torch.float32: 2, torch.float64: 4}


def cases(backend: str) -> list[tuple[str, str]]:
    return [(e, n) for e in ENCODERS for n in EVALUATORS if n != "double_backward" or backend not in SHARDED]


def case_of(encoder: str, evaluator: str) -> Case:
    return Case(evaluator, encoder, OBJECTIVE[encoder])


def wrong_world(power: int):
    """The surrogate with another power of the world than 1: every backend averages, and the constraint changes by W."""
    right = third_party.surrogate
    return mock.patch.object(third_party, "surrogate", lambda x, cotangent, world: right(x, cotangent, world**power))


def bank_of_one_rank():
    """The retain keys of this rank alone: the loss of a sample then depends on where it is computed."""

    def alone(ctx: Context, branches) -> Bank:
        return Bank(*ctx.objective.bank_keys(branches), ctx.objective.temperature)

    return mock.patch.object(third_party, "retain_bank", alone)


# What is done wrong -> the encoder that shows it.
WRONG = {
    "no factor of the world": ("resnet", lambda: wrong_world(0)),
    "the factor of the world twice": ("resnet", lambda: wrong_world(2)),
    "a bank of each rank's own": ("vit", bank_of_one_rank),
}


def main() -> None:
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    for encoder in ENCODERS:
        warm(case_of(encoder, "head"))  # before there are other processes: its loss would be over all of them
    results = {}
    for encoder, name in cases(kind):
        case = case_of(encoder, name)
        results[f"{encoder}-{name}"] = sharded(case, kind, steps=STEPS[torch.float32])
        if kind in PRECISE:
            results[f"{encoder}-{name}-precise"] = sharded(case, kind, torch.float64)
    for mistake, (encoder, patched) in WRONG.items():
        with patched():
            results[mistake] = sharded(case_of(encoder, "sketch"), kind, steps=1)
    results["world"] = get_world()
    torch.save(results, folder / f"rank-{get_rank()}.pt")


@pytest.fixture(
    scope="module",
    params=[*BACKENDS, *(pytest.param(f"{kind}-4", marks=pytest.mark.matrix) for kind in BACKENDS)],
)
def ran(request, tmp_path_factory):
    kind, _, world = request.param.partition("-")
    ranks = launch(__file__, int(world or 2), tmp_path_factory.mktemp(request.param), kind, timeout=1200)
    assert [r["world"] for r in ranks] == [len(ranks)] * len(ranks)
    return kind, ranks


@pytest.fixture(scope="module")
def references():
    pairs = [(e, n) for e in ENCODERS for n in EVALUATORS]
    found = {f"{e}-{n}": plain(case_of(e, n), steps=STEPS[torch.float32]) for e, n in pairs}
    return found | {f"{e}-{n}-precise": plain(case_of(e, n), torch.float64) for e, n in pairs}


def beyond(ranks: list[dict], references: dict, case: Case, suffix: str, dtype: torch.dtype) -> dict:
    """The errors of the ranks that are too far from one process."""
    key = f"{case.encoder}-{case.evaluator}{suffix}"
    found = [errors(rank[key]["states"], references[key]["states"]) for rank in ranks]
    return {key: pair for pair in found if not within(pair, case, dtype, STEPS[dtype])}


def test_gradients_and_trajectories_are_those_of_one_process(ran, references):
    """The second step starts where the first one's rounding led."""
    kind, ranks = ran
    wrong = [beyond(ranks, references, case_of(e, n), "", torch.float32) for e, n in cases(kind)]
    assert not any(wrong), wrong


def test_in_float64_nothing_is_left_of_the_difference(ran, references):
    kind, ranks = ran
    if kind not in PRECISE:
        pytest.skip("DeepSpeed keeps float32")
    wrong = [beyond(ranks, references, case_of(e, n), "-precise", torch.float64) for e, n in cases(kind)]
    assert not any(wrong), wrong


def test_calibration_and_metrics_agree(ran, references):
    kind, ranks = ran
    for encoder, name in cases(kind):
        case = f"{encoder}-{name}"
        for rank in ranks:
            assert rank[case]["started"] == pytest.approx(references[case]["started"], rel=1e-3, abs=1e-4), case
            for key in ("phi_gradient", "phi_output"):
                assert rank[case]["metrics"][key] == pytest.approx(references[case]["metrics"][key], rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("mistake", WRONG)
def test_negative_control(ran, references, mistake):
    _, ranks = ran
    expected = references[f"{WRONG[mistake][0]}-sketch"]["states"]
    assert update_error(ranks[0][mistake]["states"][1], expected[1], expected[0]) > 0.02


if __name__ == "__main__":
    main()
