"""What a few steps of every method do, what its state brings back, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from method_batches import in_float64
from parts import METHODS
from test_method_losses import BATCHES, OBJECTIVES, agree, config, context, started, utility

from distunlearn.errors import ConfigError, NumericsError
from distunlearn.methods.base import Method, missing, refuse_missing
from distunlearn.objectives.forward import Context


def test_scrub_counts_fewer_images_once_it_has_ceased_to_push_away():
    method, ctx, _ = started("scrub", "simclr")
    retain, forget = 2 * 12, 2 * 6
    for ctx.step, images in ((0, 3 * retain + 2 * forget), (method.forget_steps(), 3 * retain)):
        ctx.images = 0
        with in_float64():
            method.loss(ctx, BATCHES)
        assert ctx.images == images


# What each method drives, and which way.
DRIVEN = {
    "neg_grad": ("forget_loss", 1), "alignment_calibration": ("forget_agreement", -1), "scrub": ("forget_distance", 1),
    "salun": ("target_distance", -1), "random_target": ("target_distance", -1), "sure": ("domain_loss", 1),
    "held_out_distillation": ("target_distance", -1),
}  # fmt: skip
STRONG = {
    "alignment_calibration": {"alignment_weight": 30.0}, "salun": {"forget_weight": 10.0},
    "random_target": {"forget_weight": 10.0}, "held_out_distillation": {"forget_weight": 10.0},
    "scrub": {"forget_weight": 10.0, "retain_weight": 0.1}, "sure": {"forget_weight": 30.0, "critic_lr": 1e-9},
    "neg_grad": {"ascent_weight": 2.0},
}  # fmt: skip


WEIGHTS = ("alignment_weight", "ascent_weight", "forget_weight")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", DRIVEN)
def test_a_few_steps_do_what_the_formula_says(name, objective):
    """Against the same steps without the method's term: the task and the running statistics move the figure, too."""
    key, sign = DRIVEN[name]
    without = {**STRONG[name], next(k for k in STRONG[name] if k in WEIGHTS): 0.0}
    driven, idle = (few_steps(*started(name, objective, **how)[:2], key) for how in (STRONG[name], without))
    assert driven[0] == idle[0] and sign * (driven[-1] - idle[-1]) > 0, (driven, idle)


def few_steps(method: Method, ctx: Context, key: str) -> list[float]:
    """A metric before each of 8 steps of Adam, which change `ctx.model`."""
    optimizer = torch.optim.Adam(ctx.model.parameters(), lr=2e-3)
    ctx.rate, values = 2e-3, []
    for ctx.step in range(8):
        with in_float64():
            out = method.loss(ctx, BATCHES)
        assert torch.isfinite(out.loss)
        values.append(out.metrics[key])
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if method.adjusts:
            with torch.no_grad():
                for part, weight in ctx.model.named_parameters():
                    weight.copy_(method.adjust(ctx, part, weight, lambda whole: whole))
    return values


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_l1_sparse_ends_with_smaller_weights_and_zeros(objective):
    sizes, zeros = {}, {}
    for name in ("finetune", "l1_sparse"):
        method, ctx, _ = started(name, objective, **({"l1_weight": 1.0} if name == "l1_sparse" else {}))
        few_steps(method, ctx, "task_loss")
        flat = torch.cat([p.detach().flatten() for p in ctx.model.parameters()])
        sizes[name], zeros[name] = float(flat.abs().sum()), int((flat == 0).sum())
    assert sizes["l1_sparse"] < 0.98 * sizes["finetune"] and zeros["l1_sparse"] > zeros["finetune"]


@pytest.mark.parametrize("name", ["random_target", "salun", "sure"])
def test_state_round_trip_gives_the_same_next_loss(name):
    method, ctx, _ = started(name, "byol")
    with in_float64():
        method.loss(copy.deepcopy(ctx), BATCHES)
        saved = {key: value.clone() for key, value in method.state_dict().items()}
        other, fresh = (METHODS[name](method.cfg) for _ in range(2))
        other.load_state_dict(saved)
        again = other.state_dict()
        assert again.keys() == saved.keys() and all(torch.equal(again[key], saved[key]) for key in saved)
        losses = []
        for one in (method, other):
            step = copy.deepcopy(ctx)
            losses.append([float(one.loss(step, BATCHES).loss.detach()) for _ in range(3)])
        assert losses[0] == losses[1]
        after = other.state_dict()
        assert all(torch.equal(after[key], value) for key, value in method.state_dict().items())
        if name == "sure":  # the state does matter
            assert float(fresh.loss(copy.deepcopy(ctx), BATCHES).loss.detach()) != losses[0][0]


def test_ascent_is_bounded():
    method, ctx, _ = started("neg_grad", "simclr", ascent_bound=1e-6)
    with pytest.raises(NumericsError, match=r"neg_grad: .*ascent_bound"), in_float64():
        method.loss(ctx, BATCHES)


def test_what_a_method_needs_and_the_run_lacks_is_refused():
    everything = {role: 5 for role in ("retain", "forget", "third_party", "calibration", "holdout")}
    for name in METHODS:
        assert not missing(config(name), everything)
    for name, entry in METHODS.items():
        for role in ("retain", "forget", "third_party", "calibration"):
            assert bool(missing(config(name), everything | {role: 0})) == (role in entry.needs), (name, role)
    with pytest.raises(ConfigError, match="sure needs third-party images"):
        refuse_missing(config("sure"), everything | {"third_party": 0})
    with pytest.raises(ConfigError, match="alignment_calibration needs an objective that compares views"):
        refuse_missing(config("alignment_calibration", "supervised"), everything)


def test_masked_weights_stay_whatever_the_optimizer_does():
    method, ctx, _ = started("salun", "simclr", mask_share=0.5)
    ctx.model.load_state_dict(ctx.original.state_dict())
    optimizer = torch.optim.AdamW(ctx.model.parameters(), lr=0.01, weight_decay=0.5)  # moves every weight
    with in_float64():
        method.loss(ctx, BATCHES).loss.backward()
    optimizer.step()
    start = dict(ctx.original.named_parameters())
    for name, weight in ctx.model.named_parameters():
        moved = weight.detach() != start[name]
        weight.data.copy_(method.adjust(ctx, name, weight.detach(), lambda whole: whole))
        assert torch.equal(weight.detach() != start[name], moved & method.mask[name])
    assert any((w.detach() != start[n]).any() for n, w in ctx.model.named_parameters())


def test_l1_sparse_shrinks_by_the_rate_and_stops_at_zero():
    cfg = config("l1_sparse", l1_weight=2.0)
    method, ctx = METHODS["l1_sparse"](cfg), context(cfg)
    ctx.rate = 0.05
    weight = torch.tensor([0.3, -0.3, 0.1, -0.04, 0.0], dtype=torch.float64)
    grid = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    found = method.adjust(ctx, "any", weight, lambda whole: whole)
    for value, shrunk in zip(weight, found, strict=True):  # the proximal operator's definition
        best = grid[((grid - value).square() / 2 + 0.05 * 2.0 * grid.abs()).argmin()]
        assert float(shrunk) == pytest.approx(float(best), abs=1e-5)
    hand = copy.deepcopy(ctx)
    agree(method, ctx, hand, utility(hand))
