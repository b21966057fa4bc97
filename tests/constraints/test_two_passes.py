"""Third-party images shown once: the gradients of showing them twice, in fewer operations, and where it is done."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import small
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from distunlearn.config.schema import RuntimeConfig
from distunlearn.constraints.evaluators import Evaluator, two_passes
from distunlearn.constraints.gradients.ghost_norms import Recorder
from distunlearn.constraints.gradients.inplace_ops import MovedRows, reduced_rows
from distunlearn.constraints.gradients.layers import probed_layers
from distunlearn.constraints.gradients.probes import ProbeSet
from distunlearn.encoders.activation_checkpointing import checkpointed
from distunlearn.methods.third_party import ThirdParty

TWO_PASSES = ("sketch", "ghost_norm")
BATCHES = {role: small.batch(role) for role in small.SIZES}
CASES = [(e, n, "simclr", 1) for e in ("vit", "resnet") for n in TWO_PASSES]
CASES += [("resnet", "sketch", "moco", 2), ("vit", "ghost_norm", "byol", 1), ("vit", "sketch", "supervised", 2)]


def configured(encoder: str, name: str, objective: str = "simclr", pairs: int = 1):
    cfg = small.config(encoder, name, objective, pairs)
    method = replace(cfg.method, confidence_loss="hinge", confidence_weight=3.0, output_weight=2.0)
    return replace(cfg, method=method)


def loss(ctx) -> torch.Tensor:
    """The whole loss of a step, all of whose terms pull."""
    method = ThirdParty(ctx.cfg)
    method.evaluator.views = small.views
    method.calibrate(ctx, lambda role: small.batch({"calibration": "retain"}.get(role, role)))
    method.threshold = method.threshold - 10
    return method.loss(ctx, BATCHES).loss


def found(cfg, *, checkpointing: bool = False) -> tuple[float, torch.Tensor, int, int]:
    """Loss, gradient, operations of loss and backward, and images shown."""
    ctx = small.context(cfg)
    ctx.step = 1  # no step check
    if checkpointing:
        for part in ctx.model.backbone.blocks:
            part.forward = checkpointed(part, part.forward)
    with FlopCounterMode(display=False) as counter:
        value = loss(ctx)
        gradient = small.gradient(ctx, value)
    return float(value.detach()), gradient, counter.get_total_flops(), ctx.images


@pytest.mark.parametrize(("encoder", "name", "objective", "pairs"), CASES)
def test_shown_once_or_twice_the_gradient_is_the_same(encoder, name, objective, pairs, monkeypatch):
    cfg = configured(encoder, name, objective, pairs)
    value, gradient, operations, images = found(cfg)
    monkeypatch.setattr(Evaluator, "shown_once", lambda *args: False)
    twice = found(cfg)
    assert value == pytest.approx(twice[0], rel=1e-10)
    assert small.relative(gradient, twice[1]) < 1e-9
    assert operations < twice[2]
    branches = small.context(cfg).objective.branches
    assert twice[3] - images == pairs * branches * len(BATCHES["third_party"])


@pytest.mark.parametrize("name", TWO_PASSES)
def test_negative_control_third_party_without_a_graph(name, monkeypatch):
    cfg = configured("vit", name)
    expected = found(cfg)[1]
    right = two_passes.first_pass

    def cut(*args):
        first = right(*args)
        return first._replace(strangers=[two_passes.without_graph(b) for b in first.strangers])

    monkeypatch.setattr(f"distunlearn.constraints.evaluators.{name}.first_pass", cut)
    assert small.relative(found(cfg)[1], expected) > 1e-2


@pytest.mark.parametrize("name", TWO_PASSES)
def test_a_kept_graph_may_run_its_forward_again(name):
    """Activation checkpointing: every backward through the graph repeats the forward as it was."""
    cfg = configured("vit", name)
    expected = found(cfg)
    value, gradient, operations, _ = found(cfg, checkpointing=True)
    assert value == pytest.approx(expected[0], rel=1e-12)
    assert small.relative(gradient, expected[1]) < 1e-10
    assert operations > expected[2]  # it was checkpointed


def test_where_third_party_images_are_shown_once():
    def shown_once(cfg, forget, third):
        return small.evaluator(cfg).shown_once(forget, third)

    cfg = configured("vit", "sketch")
    assert shown_once(cfg, 4, 5)
    assert all(shown_once(replace(cfg, backend=backend), 4, 5) for backend in ("ddp", "zero1", "zero2"))
    assert not any(shown_once(replace(cfg, backend=backend), 4, 5) for backend in ("fsdp2", "zero3"))
    assert not shown_once(replace(cfg, runtime=RuntimeConfig(compile=True)), 4, 5)
    assert not shown_once(cfg, 0, 5) and not shown_once(cfg, 4, 0)


def test_a_rank_with_images_of_one_kind_alone():
    """It shows what it has in both passes, and its constraint is 0 or without a pull."""
    for name in TWO_PASSES:
        cfg = configured("vit", name)
        ctx = small.context(cfg)
        ctx.step, keys = 1, small.bank(ctx)
        none = BATCHES["forget"].part(slice(0, 0))
        it = small.evaluator(cfg)
        flat = lambda own, other: (own.sum() * 0, own.sum() * 0)  # noqa: E731
        done = small.step(it, ctx, none, BATCHES["third_party"], keys, flat)
        assert float(done.term.detach()) == 0 and all(len(b.ids) == 0 for b in done.forget)
        assert all(len(b.ids) == 5 and b.output.requires_grad for b in done.third)


@pytest.mark.parametrize("encoder", ["vit", "resnet"])
def test_a_later_backward_measures_nothing(encoder):
    """Through a graph that was listened to or recorded: its own gradient, and not once more the first one's."""
    cfg = configured(encoder, "sketch")
    ctx = small.context(cfg)
    images = BATCHES["third_party"]
    layers = probed_layers(ctx.model)
    weights = list(ctx.model.parameters())

    def outputs():
        return small.look(ctx, images).output

    def total(out):
        return (out * torch.arange(1, out.numel() + 1).view_as(out).sin()).sum()

    expected = small.flat(torch.autograd.grad(outputs().square().sum(), weights, allow_unused=True))
    probes = ProbeSet(layers, 3, 2, seed=0, step=0, dtype=torch.float64)
    leaves = probes.leaves(len(images))
    with probes.listening(leaves, torch.arange(5).repeat(ctx.objective.branches)):
        out = outputs()
    first = torch.autograd.grad(total(out), leaves, retain_graph=True)
    assert sum(float(part.abs().sum()) for part in first) > 0
    second = torch.autograd.grad(out.square().sum(), [*leaves, *weights], allow_unused=True)
    assert all(part is None for part in second[: len(leaves)])
    assert small.relative(small.flat(second), expected) < 1e-12
    recorder = Recorder(layers, 5 * ctx.objective.branches)
    with recorder.recording():
        out = outputs()
    before = copy.deepcopy(recorder.gradients(total(out), 5, lasting=True).norm())
    assert float(before.min()) > 0
    again = torch.autograd.grad(out.square().sum(), weights, allow_unused=True)
    assert small.relative(small.flat(again), expected) < 1e-12


class Products(TorchDispatchMode):
    """Counts batched products that are added in place."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.baddbmm_.default
        return function(*args, **(kwargs or {}))


def test_a_gradient_that_nobody_asks_for_is_not_multiplied():
    """Where a sketch is only measured, nothing comes back for A x: no product with zeros is added to x's gradient."""
    x = torch.randn(4, 5, 3, requires_grad=True)
    inner, moved = torch.randn(2, 3), MovedRows(1, 4, 4)

    def products(use) -> int:
        value = use(*reduced_rows(x * 1, inner, moved))
        with Products() as seen:
            value.backward()
        return seen.count

    assert products(lambda x, small: x.sum()) == 0
    assert products(lambda x, small: x.sum() + small.sum()) == 1
