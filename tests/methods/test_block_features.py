"""Activation checkpointing and torch.compile change neither loss, nor gradients, nor running statistics.

The whole loss of `third_party`, every evaluator, in float64, against the same encoder without them.
"""

from __future__ import annotations

import functools
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from method_batches import batch, in_float64
from parts import EVALUATORS, constraint_settings, method_settings, objective_settings
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.utils.checkpoint import CheckpointError

from distunlearn.config.schema import (
    EncoderConfig,
    RunConfig,
    RuntimeConfig,
    UnlearnConfig,
)
from distunlearn.constraints.gradients import ghost_norms
from distunlearn.encoders import activation_checkpointing
from distunlearn.encoders import compile as compiling
from distunlearn.encoders.blocks import blocks, replace_forward
from distunlearn.encoders.model import MomentumEncoder, build_model
from distunlearn.errors import ConfigError
from distunlearn.methods.third_party import ThirdParty
from distunlearn.objectives import make_objective
from distunlearn.objectives.forward import Context

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from constraint_cost import LiveBytes  # noqa: E402

ENCODERS = {
    "resnet": EncoderConfig(
        name="resnet18", image_size=16, in_chans=1, stem="deep",
        args={"stem_width": 4, "channels": [4, 6, 8, 8], "layers": [1, 1, 1, 1]},
    ),
    "vit": EncoderConfig(
        name="vit_tiny_patch16_224", image_size=16, in_chans=1, stem="standard",
        args={"patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "class_token": False, "global_pool": "avg"},
    ),
}  # fmt: skip
MATRIX = pytest.mark.matrix
EQUAL = 1e-11  # of the norm of all gradients; recomputed products are the same products


def config(encoder: str, evaluator: str, objective: str) -> RunConfig:
    return RunConfig(
        encoder=ENCODERS[encoder],
        objective=objective_settings(name=objective, hidden_dim=10, output_dim=6, temperature=0.5, queue_size=32),
        unlearn=UnlearnConfig(retain_batch=12, forget_batch=6, third_party_batch=8),
        method=method_settings(),
        constraint=constraint_settings(evaluator=evaluator, sketch_out=3, sketch_in=2, check_every=1),
    )


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The same tracing and the same bypass without a compiler of C++; a list with an entry for every compiled call."""
    made: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        run = aot_eager(graph, inputs)

        def call(*args):
            made.append(len(args))
            return run(*args)

        return call

    monkeypatch.setattr(compiling, "COMPILER", counting)
    yield made
    torch._dynamo.reset()


FEATURES = {"checkpointing": (activation_checkpointing, "checkpointed"), "compile": (compiling, "compiled")}


def trained(encoder: str, evaluator: str, *features: str, objective: str = "byol") -> dict[str, torch.Tensor]:
    """Two steps' loss and gradients, and the buffers after them."""
    runtime = RuntimeConfig(threads=1, compile="compile" in features)
    cfg = replace(config(encoder, evaluator, objective), runtime=runtime)
    model = build_model(cfg, None).double()
    momentum = MomentumEncoder(model)
    momentum.model.double()
    for part in blocks(model):
        for feature in features:
            module, name = FEATURES[feature]
            replace_forward(part, functools.partial(getattr(module, name), part))
    ctx = Context(cfg, make_objective(cfg.objective), model, model, torch.device("cpu"), momentum)
    method, found = ThirdParty(cfg), {}
    with in_float64():
        method.calibrate(ctx, batch)
        for ctx.step in range(2):
            model.zero_grad()
            out = method.loss(ctx, {role: batch(role) for role in ("retain", "forget", "third_party")})
            out.loss.backward()
            found |= {f"{ctx.step} {name}": p.grad.clone() for name, p in model.named_parameters()}
            found[f"{ctx.step} loss"] = out.loss.detach()
    return found | {f"buffer {name}": b.clone() for name, b in model.named_buffers()}


@functools.cache
def plain(encoder: str, evaluator: str) -> dict[str, torch.Tensor]:
    return trained(encoder, evaluator)


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    off = torch.cat([(found[k] - expected[k]).double().flatten() for k in expected]).norm()
    return float(off / torch.cat([expected[k].double().flatten() for k in expected]).norm())


def cells() -> list:
    """Each evaluator on each encoder with one of the features in turn, `sketch` compiled on both; all with all: pytest
    -m matrix.
    """
    features = [("checkpointing",), ("compile",), ("compile", "checkpointing")]

    def default(cell: int, number: int, evaluator: str) -> bool:
        return cell % 3 == number or (evaluator == "sketch" and features[number] == ("compile",))

    return [
        pytest.param(encoder, evaluator, chosen, marks=() if default(row + column, number, evaluator) else MATRIX)
        for row, encoder in enumerate(ENCODERS) for column, evaluator in enumerate(EVALUATORS)
        for number, chosen in enumerate(features)
    ]  # fmt: skip


@pytest.mark.parametrize(("encoder", "evaluator", "features"), cells())
def test_nothing_changes(encoder, evaluator, features, calls):
    expected = plain(encoder, evaluator)
    counters.clear()
    with mock.patch.object(compiling, "_hooks", wraps=compiling._hooks) as asked:
        assert difference(trained(encoder, evaluator, *features), expected) < EQUAL
    assert bool(calls) == ("compile" in features)
    count = len(blocks(build_model(config(encoder, evaluator, "byol"), None)))
    left = asked.call_count - len(calls) - count * bool(calls)  # forwards of blocks that were plain Python
    if not calls or evaluator in ("head", "input_gp"):
        assert left == 0
    elif evaluator in ("sketch", "sliced"):
        assert left == count * len(features)  # one pass of a run, which finds the layers; repeated by checkpointing
    else:
        assert left > count  # records, and what is differentiated twice
    assert not counters["graph_break"] and counters["frames"]["total"] == counters["frames"]["ok"]


# -- negative controls: what each precaution is for ------------------------------------------------------------------


@pytest.mark.parametrize(("encoder", "evaluator"), [("vit", "sketch"), ("resnet", "ghost_norm")])
def test_a_repetition_without_the_hooks_of_then_is_another_forward(encoder, evaluator, monkeypatch):
    monkeypatch.setattr(activation_checkpointing, "_contexts", lambda part: (nullcontext(), nullcontext()))
    try:
        found = trained(encoder, evaluator, "checkpointing")
    except (CheckpointError, ValueError):  # other tensors were kept, other calls recorded
        return
    assert difference(found, plain(encoder, evaluator)) > 1e-4


def test_a_repetition_that_keeps_running_statistics_counts_them_twice(monkeypatch):
    monkeypatch.setattr(activation_checkpointing, "_BatchNorm", ())
    found, expected = trained("resnet", "head", "checkpointing"), plain("resnet", "head")
    counts = [name for name in expected if name.endswith("num_batches_tracked")]
    assert sum(int(found[n]) for n in counts) > sum(int(expected[n]) for n in counts)


def test_a_record_of_the_repetition_would_be_taken_for_a_forward_of_its_own(monkeypatch):
    monkeypatch.setattr(ghost_norms, "recomputing", lambda: False)
    with pytest.raises(ConfigError, match="takes no part"):  # its calls never all get a gradient
        trained("vit", "ghost_norm", "checkpointing")


def hooked_output(ones: torch.Tensor) -> torch.Tensor:
    """What a compiled block gives to a hook that came after the first call."""
    part = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    replace_forward(part, functools.partial(compiling.compiled, part))
    without = part(ones)
    with part[0].register_forward_hook(lambda module, args, output: output + 1):
        return (part(ones) - without).detach()


def test_compiled_code_does_not_see_hooks_and_is_left_for_them(monkeypatch, calls):
    ones = torch.ones(1, 2)
    assert hooked_output(ones).norm() > 0.01 and len(calls) == 1
    monkeypatch.setattr(compiling, "_hooks", lambda modules: [])
    assert hooked_output(ones).norm() == 0 and len(calls) == 3


# -- what they are for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_block_is_reached_and_given_back(encoder):
    model = build_model(config(encoder, "head", "simclr"), None)
    parts = blocks(model)
    assert len(parts) == {"resnet": 4, "vit": 2}[encoder]
    assert not any(a is not b and a in set(b.modules()) for a in parts for b in parts)
    before = [part.forward for part in parts]
    undo = [replace_forward(part, functools.partial(activation_checkpointing.checkpointed, part)) for part in parts]
    undo += [replace_forward(part, functools.partial(activation_checkpointing.checkpointed, part)) for part in parts]
    assert all("forward" in part.__dict__ for part in parts)
    for take_back in reversed(undo):
        take_back()
    assert [part.forward for part in parts] == before and not any("forward" in part.__dict__ for part in parts)


def kept(model: nn.Module, images: torch.Tensor) -> int:
    """Bytes that a forward's graph holds on to, without weights: what stays alive of what the forward made."""
    with LiveBytes() as live:
        out = model(images)
        after = live.now
    del out
    return after


@pytest.mark.parametrize("encoder", ENCODERS)
def test_checkpointing_keeps_a_fraction_of_the_activations(encoder):
    sizes = {"resnet": {"layers": [3, 3, 3, 3]}, "vit": {"depth": 12}}[encoder]
    deep = replace(ENCODERS[encoder], args={**ENCODERS[encoder].args, **sizes})
    model = build_model(replace(config(encoder, "head", "simclr"), encoder=deep), None)
    images = torch.randn(16, 1, 16, 16)
    plainly = kept(model, images)
    for part in blocks(model):
        replace_forward(part, functools.partial(activation_checkpointing.checkpointed, part))
    share = {"resnet": 0.75, "vit": 0.3}[encoder]  # stem and heads, which keep theirs, are much of a small ResNet
    assert kept(model, images) < share * plainly


def test_a_forward_without_gradients_is_not_checkpointed():
    part = nn.Sequential(nn.Linear(2, 2))
    replace_forward(part, functools.partial(activation_checkpointing.checkpointed, part))
    with mock.patch.object(activation_checkpointing, "checkpoint", side_effect=AssertionError), torch.no_grad():
        part(torch.ones(1, 2))
