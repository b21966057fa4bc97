"""HSDP: two copies of two shards train and save as fsdp2 and ddp on four processes do, and as one process.

The four ranks run this file as a script.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import constraint_training
import pytest
import test_sharded_checkpoints
import torch
from constraint_training import Case, errors, limits, plain, sharded, warm
from processes import launch
from test_backends import CLOSE, opened, train
from test_sharded_checkpoints import load, same, train_and_save
from torch import nn
from toys import reference, update_error

from distunlearn.config.schema import RuntimeConfig
from distunlearn.distributed.collectives import get_rank
from distunlearn.engine.backends import fsdp2

pytestmark = pytest.mark.slow

WAYS = {"mesh": "fsdp2", "fsdp2": "fsdp2", "ddp": "ddp"}
READERS = (("mesh", "fsdp2"), ("fsdp2", "mesh"), ("mesh", "ddp"), ("ddp", "mesh"), ("mesh", "single"))
CASES = [Case(evaluator, encoder, "byol") for evaluator, encoder in (("head", "resnet"), ("sketch", "vit"))]
FEW = [("ddp", Case("sketch", "vit", "simclr")), ("fsdp2", Case("sketch", "vit", "simclr")),
       ("fsdp2", Case("head", "vit", "byol"))]  # fmt: skip
HALF = Case("sketch", "vit", "simclr", bf16=True)
STEPS = 3


def start(way: str, **changes):
    """What `opened` gives, on the mesh where it is asked for."""
    mesh = (2, 2) if way == "mesh" else None
    return opened(WAYS[way], runtime=RuntimeConfig(threads=1, mesh=mesh), **changes)


def config(case: Case, way: str = "single"):
    made = CONFIG(case, WAYS.get(way, way))
    return made if way != "mesh" else replace(made, runtime=RuntimeConfig(threads=1, mesh=(2, 2)))


CONFIG = Case.config


def main(folder: Path, kind: str) -> None:
    results: dict = {}
    for case in (*CASES, *(case for _, case in FEW), HALF):
        if kind != "backend":
            warm(case)  # before there are other processes
    if kind == "half":
        results = half_weights()
    elif kind == "few":
        with few_to_forget():
            results = {f"{way} {case.evaluator}": sharded(case, way, "float64", STEPS) for way, case in FEW}
    elif kind == "constraint":
        with mock.patch.object(Case, "config", config):
            for case in CASES:
                for way in WAYS:
                    results[f"{case.evaluator} {way}"] = sharded(case, way, "float64", STEPS)
    else:
        with mock.patch.object(test_sharded_checkpoints, "opened", start):
            for way in WAYS:
                backend = start(way)
                results[way] = train(backend, "vit", 7)
                results[f"saved by {way}"] = train_and_save(way, folder)
            for reader, writer in READERS:
                results[f"{reader} reads {writer}"] = load(reader, folder, writer)
        with mock.patch.object(fsdp2, "sum_over_ranks", lambda x: 2 * constraint_sum(x)):  # every copy counted
            results["twice"] = train(start("mesh"), "vit", 7, steps=1)
    torch.save(results, folder / f"rank-{get_rank()}.pt")


constraint_sum = fsdp2.sum_over_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hsdp")
    alone = train_and_save("single", folder)
    found = launch(__file__, 4, folder, "backend", timeout=280)
    alone_reads = {f"single reads {writer}": load("single", folder, writer) for writer in WAYS}
    return [{**rank, **alone_reads, "saved by single": alone} for rank in found]


def test_weights_norms_and_momentum_are_those_of_one_process(ranks):
    expected = reference("vit", count=7)
    for rank in ranks:
        for way in WAYS:
            found = rank[way]
            for step in (1, 4):
                assert update_error(found["states"][step], expected.states[step], expected.states[0]) < CLOSE, way
            assert found["norms"] == pytest.approx(expected.norms, rel=CLOSE), way
            assert update_error(found["momentum"], expected.momentum, expected.states[0]) < CLOSE, way
        assert rank["twice"]["norms"][0] == pytest.approx(2**0.5 * expected.norms[0], rel=1e-4)  # control
    held = [[rank[way]["held"] / rank[way]["whole"] for rank in ranks] for way in WAYS]
    assert all(0.4 < share < 0.7 for share in held[0]) and all(share < 0.45 for share in held[1])
    assert held[2] == [1.0] * 4


@pytest.mark.parametrize(("reader", "writer"), (*READERS, *(("single", way) for way in WAYS)))
def test_checkpoints_go_both_ways(ranks, reader, writer):
    for rank in ranks:
        assert same(rank[f"{reader} reads {writer}"], rank[f"saved by {writer}"])
        begun = {**rank[f"{reader} reads {writer}"], "weights": rank[f"{reader} reads {writer}"]["before"]}
        assert not same(begun, rank[f"saved by {writer}"])  # control


def few_to_forget():
    """Two images for four ranks: the first and the third have none."""
    return mock.patch.dict(constraint_training.SIZES, forget=2)


def test_ranks_without_images_to_forget(tmp_path):
    found = launch(__file__, 4, tmp_path, "few", timeout=280)
    for way, case in FEW:
        with few_to_forget():
            expected = plain(case, "float64", STEPS)
        others = plain(case, "float64", STEPS)  # control: of nine images
        first, last = limits(case, "float64")
        for rank in found:
            states = rank[f"{way} {case.evaluator}"]["states"]
            error = errors(states, expected["states"])
            assert error[0] <= first and error[1] <= last, (way, case.evaluator, error)
            assert errors(states, others["states"])[0] > 100 * first


def half_weights() -> dict:
    """Weights that travel in bf16 where a layer norm takes them, as autocast on a GPU has it."""
    norm, gathered, sent = nn.functional.layer_norm, [], fsdp2.fully_shard

    def layer_norm(x, shape, weight, bias, eps):
        gathered.append(weight.dtype)
        return norm(x.float(), shape, weight.float(), bias.float(), eps)

    def config(case: Case, way: str = "single"):
        made = CONFIG(case, way)
        return replace(made, runtime=RuntimeConfig(threads=1, bf16_gather=True))

    kept: list[torch.dtype] = []

    def shard(module, **how):
        made = sent(module, **how)
        kept.extend(p.dtype for p in module.parameters())
        return made

    with (
        mock.patch.object(nn.functional, "layer_norm", layer_norm), mock.patch.object(fsdp2, "MIXES", ("cpu",)),
        mock.patch.object(fsdp2, "fully_shard", shard), mock.patch.object(Case, "config", config),
    ):  # fmt: skip
        found = sharded(HALF, "fsdp2", "float32", STEPS)
    return {**found, "travelled": torch.bfloat16 in gathered, "kept": set(kept) == {torch.float32}}


def test_weights_that_travel_in_bf16_are_kept_in_float32(tmp_path):
    expected = plain(HALF, "float32", STEPS)
    first, last = limits(HALF, "float32")
    for rank in launch(__file__, 2, tmp_path, "half", timeout=280):
        assert rank["travelled"] and rank["kept"]
        error = errors(rank["states"], expected["states"])
        assert error[0] <= first and error[1] <= last, error
        assert error[0] > 1e-5  # control: it is not the same computation


@pytest.mark.matrix
def test_the_constraint_trains_alike(tmp_path):
    found = launch(__file__, 4, tmp_path, "constraint", timeout=280)
    for case in CASES:
        expected = plain(case, "float64", STEPS)
        first, last = limits(case, "float64")
        for rank in found:
            for way in WAYS:
                error = errors(rank[f"{case.evaluator} {way}"]["states"], expected["states"])
                assert error[0] <= first and error[1] <= last, (case.evaluator, way, error)
                for figure in ("losses", "norms"):
                    found_here = rank[f"{case.evaluator} {way}"][figure]
                    assert found_here == pytest.approx(expected[figure], rel=1e-6), (case.evaluator, way, figure)
                metrics = rank[f"{case.evaluator} {way}"]["metrics"]
                assert metrics["phi_gradient"] == pytest.approx(expected["metrics"]["phi_gradient"], rel=1e-6)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
