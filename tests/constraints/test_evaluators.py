"""Evaluators against plain double backward over one image at a time: order, precision, objectives, wrong uses."""

from __future__ import annotations

import contextlib
import functools
import importlib
from dataclasses import replace

import pytest
import small
import torch
from parts import EVALUATORS
from small import at, config, constrained, context, cosine, features_of, reference, relative
from torch.utils._python_dispatch import TorchDispatchMode

from distunlearn.config.checks import cross_checks
from distunlearn.constraints import evaluators
from distunlearn.constraints.evaluators import base
from distunlearn.errors import ConfigError

PROBING = ("sketch", "sliced", "ghost_norm")
# Images through an encoder beside one forward of f forgotten and t third-party images, for each branch.
EXTRA = {
    "head": lambda f, t, momentum: 0,
    "sketch": lambda f, t, momentum: 2 * f,
    "sliced": lambda f, t, momentum: f + 2 * t,
    "ghost_norm": lambda f, t, momentum: 2 * f,
    "input_gp": lambda f, t, momentum: (4 if momentum else 3) * f,
    "double_backward": lambda f, t, momentum: 0,
}
ENCODERS = ("vit", "resnet")
WIDE = ("wide vit", "wide resnet")
CASES = [(e, n, "simclr", 1) for e in ENCODERS for n in PROBING]
CASES += [("resnet", "sketch", "moco", 2), ("vit", "ghost_norm", "moco", 2), ("resnet", "sliced", "byol", 1)]
CASES += [("vit", "sketch", "mocov3", 1), ("resnet", "ghost_norm", "supervised", 1)]


@functools.cache
def expected(encoder: str, name: str, objective: str = "simclr", pairs: int = 1):
    """(Phi, its gradient) in float64, by no code of the evaluators."""
    ctx = context(config(encoder, name, objective, pairs))
    return reference(ctx, *features_of(name, ctx))


def check_bf16(found: torch.Tensor, rounded: torch.Tensor, exact: torch.Tensor) -> None:
    """Gradients of an evaluator in bf16, by double backward in bf16, and by double backward in float64.

    How far the encoder's own rounding turns a gradient depends on the images. Ten batches, cosines to float64: double
    backward in bf16 -0.15 to 0.99 (sketch, ResNet), 0.79 to 1 (ghost_norm, ResNet), 0.97 to 1 (wide ResNet), and the
    evaluators with it: their distance was below 0.01, or below twice that of double backward, in all these 40.
    """
    found, rounded = found.double(), rounded.double()
    assert cosine(found, rounded) >= 0.99
    assert 1 - cosine(found, exact) <= min(max(0.01, 2 * (1 - cosine(rounded, exact))), 0.05)


@pytest.mark.parametrize(("encoder", "name", "objective", "pairs"), CASES)
def test_the_error_falls_with_the_square_of_the_step(encoder, name, objective, pairs):
    phi, exact = expected(encoder, name, objective, pairs)
    errors = []
    for rho in (1e-3, 1e-4):
        cfg = config(encoder, name, objective, pairs, rho=rho)
        found, gradient = constrained(cfg, context(cfg))
        assert float(found.phi) == pytest.approx(float(phi), abs=1e-4 if name == "sliced" else 1e-10)
        assert float(found.term.detach()) == pytest.approx(float(found.phi), rel=1e-12)
        errors.append(relative(gradient, exact))
    assert 50 <= errors[0] / errors[1] <= 200
    assert errors[1] <= 1e-6


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(("objective", "pairs"), [("simclr", 1), ("moco", 2), ("byol", 1), ("supervised", 1)])
def test_double_backward_is_exact(encoder, objective, pairs):
    phi, exact = expected(encoder, "double_backward", objective, pairs)
    cfg = config(encoder, "double_backward", objective, pairs)
    found, gradient = constrained(cfg, context(cfg))
    assert float(found.phi) == pytest.approx(float(phi), abs=1e-12)
    assert relative(gradient, exact) <= 1e-10


@pytest.mark.parametrize("encoder", [*ENCODERS, *WIDE])
@pytest.mark.parametrize("name", PROBING)
def test_float32_at_the_default_step(encoder, name):
    cfg = config(encoder, name)
    _, gradient = constrained(cfg, context(cfg, torch.float32))
    # ghost_norm, wide ViT: the step's error (in float64 the same to 1e-5) is 0.0006 to 0.0026 over 20 sets of views.
    bound = 4e-3 if (encoder, name) == ("wide vit", "ghost_norm") else 2e-3
    assert relative(gradient.double(), expected(encoder, name)[1]) <= bound


@pytest.mark.parametrize("encoder", [*ENCODERS, *WIDE])
@pytest.mark.parametrize("name", ["sketch", "ghost_norm"])
def test_bf16_at_the_default_step(encoder, name):
    cfg = replace(config(encoder, name), precision="bf16")
    _, gradient = constrained(cfg, context(cfg, torch.float32, autocast=True))
    ctx = context(cfg, torch.float32, autocast=True)
    check_bf16(gradient, reference(ctx, *features_of(name, ctx))[1], expected(encoder, name)[1])


def test_negative_control_a_step_too_long_for_ordinary_width():
    """What a narrow network bears: the error is of third order in the step, and grows with the width."""
    cosines = {}
    for encoder in ("vit", "wide vit"):
        cfg = replace(config(encoder, "ghost_norm", rho=3e-2), precision="bf16")
        _, gradient = constrained(cfg, context(cfg, torch.float32, autocast=True))
        cosines[encoder] = cosine(gradient.double(), expected(encoder, "ghost_norm")[1])
    assert cosines["vit"] >= 0.99 > 0.9 > cosines["wide vit"]


def test_bf16_is_refused_where_gradients_are_single_numbers():
    cfg = replace(config("vit", "sliced"), precision="bf16")
    with pytest.raises(ConfigError, match="precision=bf16 changes; set constraint.evaluator=sketch, or precision=fp32"):
        small.evaluator(cfg)
    assert ["precision=bf16" in problem for problem in cross_checks(cfg)] == [True]
    for allowed in (replace(cfg, precision="fp32"), at(cfg, evaluator="sketch")):
        assert cross_checks(allowed) == []
        small.evaluator(allowed)


def error_of(name: str, encoder: str = "resnet") -> float:
    cfg = config(encoder, name, rho=1e-4)
    _, gradient = constrained(cfg, context(cfg))
    return relative(gradient, expected(encoder, name)[1])


@pytest.mark.parametrize("name", PROBING)
def test_negative_control_one_sign_for_both_copies(name, monkeypatch):
    module = evaluators.sliced if name == "sliced" else evaluators.two_passes
    right = base.signed_copies
    monkeypatch.setattr(module, "signed_copies", lambda *args: (right(*args)[0], tuple(map(abs, right(*args)[1]))))
    assert error_of(name) > 0.5


def embedding_by(monkeypatch, change) -> None:
    """All evaluators embed by change(ctx, images, batchnorm=..., **how)."""
    for name in ("head", "two_passes", "sketch", "sliced", "ghost_norm", "input_gp"):
        monkeypatch.setattr(importlib.import_module(f"distunlearn.constraints.evaluators.{name}"), "embed", change)


def test_negative_control_batch_statistics_over_both_copies(monkeypatch):
    """Against double backward with batch statistics too: the copies change one another's statistics."""

    def in_train_mode(ctx, images, *, batchnorm, **how):
        return small.embed(ctx, images, batchnorm="train", **how)

    embedding_by(monkeypatch, in_train_mode)
    ctx = context(config("resnet", "double_backward"))
    state = {n: b.clone() for n, b in ctx.model.named_buffers()}
    _, exact = constrained(ctx.cfg, ctx)
    for n, b in ctx.model.named_buffers():
        b.copy_(state[n])
    cfg = config("resnet", "sketch", rho=1e-4)
    _, gradient = constrained(cfg, ctx)
    assert relative(gradient, exact) > 0.1


@pytest.mark.parametrize("name", PROBING)
def test_negative_control_dropout(name, monkeypatch):
    def with_dropout(ctx, images, **how):
        drop = ctx.model.backbone.register_forward_hook(lambda m, a, out: torch.nn.functional.dropout(out, 0.2))
        try:
            return small.embed(ctx, images, **how)
        finally:
            drop.remove()

    embedding_by(monkeypatch, with_dropout)
    torch.manual_seed(0)
    assert error_of(name) > 0.5


def test_negative_control_patterns_of_their_own(monkeypatch):
    """Without the common pattern a jump at a kink, divided by the step, drowns the gradient."""
    cfg = config("resnet", "sketch", rho=1e-3)
    exact = expected("resnet", "sketch")[1]
    assert relative(constrained(cfg, context(cfg))[1], exact) < 1e-4
    monkeypatch.setattr(evaluators.two_passes, "shared", lambda *args: contextlib.nullcontext())
    assert relative(constrained(cfg, context(cfg))[1], exact) > 0.1


@pytest.mark.parametrize("name", PROBING)
def test_negative_control_probes_that_end_before_the_forward(name, monkeypatch):
    """Without anything added both copies are alike, and what is left of the gradient is none of it."""
    from distunlearn.constraints.gradients.ghost_norms import GhostGradients
    from distunlearn.constraints.gradients.probes import ProbeSet

    kind = GhostGradients if name == "ghost_norm" else ProbeSet
    monkeypatch.setattr(kind, "armed", lambda *args: contextlib.nullcontext())
    assert error_of(name, "vit") > 0.9


def input_penalty(ctx, mixed: list[torch.Tensor], center: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The penalty at these images and its gradient, by double backward."""
    leaves = [x.clone().requires_grad_() for x in mixed]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        losses = ctx.objective.per_sample_loss(small.look(ctx, small.batch("forget"), views=leaves), small.bank(ctx))
        slopes = torch.stack(torch.autograd.grad(losses.sum(), leaves, create_graph=True)).square().sum((0, 2, 3, 4))
        penalty = (slopes.sqrt() - center).square().mean()
        return penalty.detach(), small.gradient(ctx, penalty)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("center", [0, 1])
def test_input_penalty_against_double_backward(encoder, center):
    cfg = config(encoder, "input_gp", center=center)
    ctx = context(cfg)
    gp = small.evaluator(cfg)
    forget, third = small.batch("forget"), small.batch("third_party")
    shown = [torch.cat(both) for both in zip(small.views(ctx, forget), small.views(ctx, third), strict=True)]
    mixed = gp._interpolates(ctx, shown, len(forget), 0, 0)
    own, other = (small.views(ctx, b) for b in (forget, third))
    rows = torch.arange(len(forget)) % len(third)
    share = (mixed[0] - other[0][rows]).flatten(1).norm(dim=1) / (own[0] - other[0][rows]).flatten(1).norm(dim=1)
    assert ((0 <= share) & (share <= 1)).all() and len(share.unique()) == len(share)
    penalty, exact = input_penalty(ctx, mixed, center)
    errors = []
    for rho in (1e-2, 1e-3):
        found, gradient = constrained(at(cfg, rho=rho), ctx)
        assert float(found.phi) == pytest.approx(float(penalty), rel=1e-10)
        errors.append(relative(gradient, exact))
    assert 50 <= errors[0] / errors[1] <= 200 and errors[1] <= 1e-5
    single = replace(cfg, precision="fp32")
    _, gradient = constrained(single, context(single, torch.float32))
    assert relative(gradient.double(), exact) <= 2e-3
    half = replace(cfg, precision="bf16")
    _, gradient = constrained(half, context(half, torch.float32, autocast=True))
    rounded = input_penalty(context(half, torch.float32, autocast=True), [x.float() for x in mixed], center)[1]
    check_bf16(gradient, rounded, exact)


def test_the_step_is_checked_and_a_bad_one_reported_once():
    notes: list[str] = []
    for rho, bad in ((1e-3, False), (3.0, True)):
        cfg = config("vit", "sketch", rho=rho, check_every=2)
        ctx = context(cfg)
        ctx.note = notes.append
        it, keys = small.evaluator(cfg), small.bank(ctx)
        figures = []
        for step in range(3):
            ctx.step = step
            found = small.step(it, ctx, small.batch("forget"), small.batch("third_party"), keys)
            figures.append(found.metrics)
        changes = [f.get("step_size_change") for f in figures]
        assert changes[1] is None and (changes[0] > 0.05) is bad and (changes[2] > 0.05) is bad
        assert len(notes) == bad
    assert "constraint.rho" in notes[0] and "sketch" in notes[0]


@pytest.mark.parametrize("name", EVALUATORS)
@pytest.mark.parametrize("objective", ["simclr", "moco", "byol"])
def test_every_image_through_an_encoder_is_counted(name, objective):
    cfg = config("resnet", name, objective, pairs=2)
    ctx = context(cfg)
    ctx.step, keys = 1, small.bank(ctx)  # no step check
    ctx.images = 0
    it = small.evaluator(cfg)
    small.step(it, ctx, small.batch("forget"), small.batch("third_party"), keys)
    branches, momentum, images = ctx.objective.branches, ctx.momentum is not None, 4 + 5
    expected = branches * images * (2 if momentum else 1) + branches * EXTRA[name](4, 5, momentum)
    assert ctx.images == 2 * expected


@pytest.mark.parametrize("name", ["head", *PROBING, "double_backward"])
def test_features_of_a_whole_role_are_those_of_its_parts(name, monkeypatch):
    """Calibration takes a role a part at a time, and describes it as training does."""
    cfg = config("vit", name, "moco")
    ctx = context(cfg)
    seen: list[torch.Tensor] = []

    def remember(forget, third):
        seen.extend([forget.detach(), third.detach()])
        return small.energy(forget, third)

    it, keys, third = small.evaluator(cfg), small.bank(ctx), small.batch("third_party")
    small.step(it, ctx, small.batch("forget"), third, keys, remember)
    with torch.no_grad():
        whole, branches = it.describe(ctx, third, keys, 0)
    tolerance = 1e-5 if name == "sliced" else 1e-10
    torch.testing.assert_close(whole, seen[1], rtol=tolerance, atol=tolerance)
    assert not whole.requires_grad and all(len(b.ids) == 5 for b in branches)
    for module in (evaluators.sketch, evaluators.sliced, evaluators.ghost_norm):
        monkeypatch.setattr(module, "CALIBRATION_CHUNK", 2)
    with torch.no_grad():
        parts, again = it.describe(ctx, third, keys, 0)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(again[0].output, branches[0].output, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_double_backward_refuses_sharded_weights(backend):
    cfg = replace(config("vit", "double_backward"), backend=backend)
    with pytest.raises(ConfigError, match=f"backend={backend}; set constraint.evaluator=sketch"):
        small.evaluator(cfg)


class Kernels(TorchDispatchMode):
    """Names of all operators that are dispatched within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.queries: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        if "flash_attention" in str(function) and "backward" not in str(function):
            self.queries.add(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", EVALUATORS)
def test_attention_stays_fused_but_for_double_backward(name):
    """By the kernels that run: fused attention forward and backward, or its parts in plain operators."""
    cfg = config("vit", name)
    ctx = context(cfg, torch.float32)
    keys, roles = small.bank(ctx), (small.batch("forget"), small.batch("third_party"))
    small.step(small.evaluator(cfg), ctx, *roles, keys)  # looks which layers can be followed: once, and fused for all
    with Kernels() as seen:
        small.gradient(ctx, small.step(small.evaluator(cfg), ctx, *roles, keys).term)
    fused = any("flash_attention" in kernel and "backward" in kernel for kernel in seen.names)
    in_parts = any("_safe_softmax" in kernel for kernel in seen.names)
    assert (fused, in_parts) == ((False, True) if name == "double_backward" else (True, False))


@pytest.mark.parametrize("name", ["sketch", "ghost_norm"])
def test_attention_sees_bf16_where_probes_add(name):
    cfg = replace(config("vit", name), precision="bf16")
    ctx = context(cfg, torch.float32, autocast=True)
    keys, roles = small.bank(ctx), (small.batch("forget"), small.batch("third_party"))
    with Kernels() as seen:
        small.gradient(ctx, small.step(small.evaluator(cfg), ctx, *roles, keys).term)
    assert seen.queries == {torch.bfloat16}
