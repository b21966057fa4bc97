"""Estimates for GPUs: counts and prices against counts by hand, labels, and refusals before anything is computed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from distunlearn.cli.main import main
from distunlearn.config.schema import (
    ConstraintConfig,
    EncoderConfig,
    ObjectiveConfig,
    PretrainConfig,
    RunConfig,
    UnlearnConfig,
)
from distunlearn.errors import ConfigError
from distunlearn.plan.gpu_estimate import (
    GIB,
    GPUS,
    Encoder,
    count_encoder,
    estimate,
    machine_of,
    memory_of,
    phases_of,
    work_of,
)
from distunlearn.plan.gpu_target import Target

VIT = EncoderConfig(
    name="vit_tiny_patch16_224", image_size=16, in_chans=3, stem="standard",
    args={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "class_token": False, "global_pool": "avg"},
)  # fmt: skip
CFG = RunConfig(
    encoder=VIT, objective=ObjectiveConfig(name="simclr", hidden_dim=16, output_dim=8),
    pretrain=PretrainConfig(batch=64), unlearn=UnlearnConfig(retain_batch=32, forget_batch=8, third_party_batch=8),
)  # fmt: skip
MOCO = replace(CFG, objective=replace(CFG.objective, name="mocov3"))
COUNTED = Encoder("vit", forward=1e9, activations=1e6, weights=4e8, units=10, batchnorms=1)


def test_operations_and_activations_by_hand():
    """4 patches of 8 x 8 x 3 numbers, width 24, two blocks, and the projector."""
    found = count_encoder(CFG)
    block = 4 * 24 * 72 + 2 * 4 * 4 * 24 + 4 * 24 * 24 + 2 * 4 * 24 * 96
    assert found.forward == 2 * (4 * 192 * 24 + 2 * block + 24 * 16 + 16 * 8)
    assert found.weights == 4 * sum(p for p in _parameters())
    assert found.kind == "vit" and found.batchnorms == 1
    # At least what every linear layer gets as input, at most three times all outputs of all layers.
    inputs = 4 * (4 * (2 * (24 + 24 + 24 + 96)))
    assert inputs < found.activations < 10 * inputs


def _parameters() -> list[int]:
    block = [24, 24, 24 * 72, 72, 24 * 24, 24, 24, 24, 24 * 96, 96, 96 * 24, 24]
    return [192 * 24, 24, 4 * 24, *block, *block, 24, 24, 24 * 16, 16, 16, 16 * 8, 8]


def test_activations_grow_with_the_images_alone():
    larger = replace(CFG, encoder=replace(VIT, image_size=32))  # 16 patches instead of 4
    assert 3.5 < count_encoder(larger).activations / count_encoder(CFG).activations < 4.5


@pytest.mark.parametrize(("cfg", "passes"), [(CFG, 3 * 2 * 64), (MOCO, 3 * 2 * 64 + 2 * 64)])
def test_a_step_by_hand(cfg, passes):
    """Two views, three forwards' work each; a momentum encoder's two views, one each."""
    work = work_of(cfg, COUNTED, None, world=4)
    assert work.flops == {"vit": passes / 4 * 1e9}
    assert work.momentum == (4e8 if cfg is MOCO else 0)


def test_memory_by_hand():
    """Weights, gradients, two moments; 2 x 64 passes of 1 MB over 4 processes; bf16 halves activations alone."""
    active = 2 * 64 / 4 * 1e6
    found = {name: memory_of(CFG, COUNTED, name, 4, None) for name in ("ddp", "zero1", "zero2", "zero3", "fsdp2")}
    assert found == pytest.approx({
        "ddp": 16e8 + active, "zero1": (4 + 4 + 2) * 1e8 + active, "zero2": (4 + 1 + 2) * 1e8 + active,
        "zero3": 4e8 + active, "fsdp2": 4e8 + active,
    })  # fmt: skip
    assert memory_of(replace(CFG, precision="bf16"), COUNTED, "ddp", 4, None) == pytest.approx(16e8 + active / 2)


def test_between_nodes_the_network_is_the_slower_link():
    card = GPUS["h100"]
    within, across = (machine_of(card, "bf16", world, "vit", 0.5) for world in (8, 9))
    assert within.bandwidth == pytest.approx(0.6 * 450e9) and across.bandwidth == pytest.approx(0.6 * 50e9)
    assert within.rate == {"vit": 0.5 * 989e12}


def test_an_estimate_adds_up_and_says_what_it_is():
    target = Target(gpu="a100", world=16, mfu=0.5, price=2.0)
    found = estimate(CFG, phases_of(CFG, {"pretrain": 1000, "unlearn": 100, "retrain": 0}), target)
    assert found["label"].startswith("extrapolation") and "no GPU was measured" in found["label"]
    assert set(found["phases"]) == {"pretrain", "unlearn"}
    own = found["phases"]["pretrain"]
    total = own["step_seconds"]["total"]
    assert total == pytest.approx(sum(v for k, v in own["step_seconds"].items() if k != "total"), abs=1e-5)
    assert own["gpu_hours"] == pytest.approx(1000 * total * 16 / 3600, abs=1e-3)
    assert own["cost"] == pytest.approx(2 * own["gpu_hours"], abs=0.02)
    assert own["passes_per_second"] == pytest.approx(2 * 64 / total, rel=0.01)
    assert total == min(b["step_seconds"] for b in own["by_backend"].values())
    assert found["assumptions"]["mfu"] == 0.5 and found["assumptions"]["price_per_gpu_hour"] == 2.0
    assert own["memory_gib"] == own["by_backend"][own["backend"]]["memory_gib"] and own["fits"]


def test_a_configured_backend_is_kept_and_what_does_not_fit_is_said():
    steps = {"pretrain": 10}
    found = estimate(replace(CFG, backend="zero3"), phases_of(CFG, steps), Target(gpu="h100", world=8))
    assert found["phases"]["pretrain"]["backend"] == "zero3"
    large = replace(CFG, pretrain=replace(CFG.pretrain, batch=10**8))
    own = estimate(large, phases_of(large, steps), Target(gpu="h100", world=8))["phases"]["pretrain"]
    assert not own["fits"] and own["memory_gib"] > 80e9 / GIB


def test_forgetting_costs_more_images_with_an_evaluator_of_the_whole_network():
    head = work_of(CFG, COUNTED, "third_party", 1).flops["vit"]
    sketch = replace(CFG, constraint=ConstraintConfig(evaluator="sketch"))
    assert head == 3 * 2 * (32 + 8 + 8) * 1e9
    for backend, again in (("ddp", 0), ("zero2", 0), ("fsdp2", 8), ("zero3", 8)):  # third-party images shown twice
        work = work_of(replace(sketch, backend=backend), COUNTED, "third_party", 8)
        assert work.flops["vit"] * 8 == head + 3 * 2 * (2 * 8 + again) * 1e9


def test_passes_are_those_of_the_backend_that_is_chosen():
    """On one process fsdp2 has nothing to shard, and the third party is shown once."""
    sketch = replace(CFG, backend="fsdp2", constraint=ConstraintConfig(evaluator="sketch"))
    own = estimate(sketch, phases_of(sketch, {"unlearn": 10}), Target(gpu="h100", world=1))["phases"]["unlearn"]
    assert own["backend"] == "single"
    expected = work_of(replace(sketch, backend="single"), COUNTED, "third_party", 1).flops["vit"] / 3e9
    assert own["passes_per_second"] == pytest.approx(expected / own["step_seconds"]["total"], rel=0.01)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (Target(gpu="h1000"), "--gpu is 'h1000', expected one of a100, h100"),
        (Target(gpu="h100", world=-1), "--world is -1"),
        (Target(gpu="h100", mfu=1.5), "--mfu is 1.5"),
        (Target(gpu="h100", price=float("nan")), "--price is nan"),
        (Target(gpu="h100", world=33), "unlearn.retain_batch is 32, which 33 processes cannot share"),
        (Target(world=4), "add --gpu"),
    ],
)
def test_refusals(target, said):
    with pytest.raises(ConfigError, match=said):
        estimate(CFG, {}, target)


def test_plan_prints_the_estimate(capsys):
    assert main(["plan", "digits", "--gpu", "h100", "--world", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["estimate"]["world"] == 8 and set(found["estimate"]["phases"]) == {"pretrain", "unlearn", "retrain"}
    assert main(["plan", "digits", "--world", "8"]) == 2
    assert "add --gpu" in capsys.readouterr().err
