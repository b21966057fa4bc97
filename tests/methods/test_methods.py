"""Methods on a small encoder: what enters the loss, where its gradient goes, and what it counts."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from method_batches import darker
from parts import METHODS, constraint_settings, method_settings, objective_settings
from photo_batches import photo_batch

from distunlearn.config.schema import EncoderConfig, RunConfig, UnlearnConfig
from distunlearn.constraints.distances.energy import DISTANCES, energy_distance
from distunlearn.constraints.evaluators import base
from distunlearn.data.schedule import Batch
from distunlearn.data.views.draws import id_hashes
from distunlearn.encoders.model import MomentumEncoder, batchnorm_mode, build_model
from distunlearn.errors import NumericsError
from distunlearn.methods.third_party import ThirdParty
from distunlearn.methods.training import Finetune
from distunlearn.objectives import KeyQueue, make_objective
from distunlearn.objectives.forward import Context, view_pair

OBJECTIVES = ("simclr", "moco", "mocov3", "byol", "supervised")
SIZES = {"retain": 12, "forget": 6, "third_party": 8, "calibration": 10}


def config(objective: str = "simclr", view_pairs: int = 1, **method) -> RunConfig:
    encoder = EncoderConfig(
        name="resnet18", image_size=16, in_chans=1, stem="deep",
        args={"stem_width": 4, "channels": [4, 8, 8, 8], "layers": [1, 1, 1, 1]},
    )  # fmt: skip
    return RunConfig(
        encoder=encoder,
        objective=objective_settings(name=objective, hidden_dim=16, output_dim=8, queue_size=32),
        unlearn=UnlearnConfig(retain_batch=12, forget_batch=6, third_party_batch=8),
        method=method_settings(**method),
        constraint=constraint_settings(view_pairs=view_pairs),
    )


def batch(role: str, count: int | None = None) -> Batch:
    count = count or SIZES[role]
    generator = torch.Generator().manual_seed(sum(map(ord, role)))
    return photo_batch(
        ids=[f"{role}-{i}" for i in range(count)],
        photos=torch.randint(0, 256, (count, 1, 16, 16), generator=generator, dtype=torch.uint8),
        epochs=np.zeros(count, dtype=np.int64),
        labels=torch.arange(count) % 3,
    )


def context(cfg: RunConfig) -> Context:
    model = build_model(cfg, 3)
    objective = make_objective(cfg.objective)
    momentum = MomentumEncoder(model) if objective.needs_momentum else None
    queue = KeyQueue(32, 8) if objective.uses_queue else None
    ctx = Context(cfg, objective, model, model, torch.device("cpu"), momentum, queue)
    ctx.original = copy.deepcopy(model).eval()
    for _ in range(3):  # running statistics and a queue with something in them
        Finetune(cfg).loss(ctx, {"retain": batch("retain")})
    ctx.images = 0
    return ctx


def started(cfg: RunConfig) -> tuple[ThirdParty, Context]:
    method, ctx = ThirdParty(cfg), context(cfg)
    method.calibrate(ctx, batch)
    return method, ctx


def kept(ctx: Context):
    """Puts the running statistics back, which every task loss moves on."""
    state = {name: value.clone() for name, value in ctx.model.named_buffers()}

    def restore() -> None:
        for name, value in ctx.model.named_buffers():
            value.copy_(state[name])

    return restore


BATCHES = {role: batch(role) for role in ("retain", "forget", "third_party")}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_constraint_has_a_gradient_for_every_objective(objective):
    cfg = config(objective)
    method, ctx = started(cfg)
    out = method.loss(ctx, BATCHES)
    assert torch.isfinite(out.loss) and all(np.isfinite(float(value)) for value in out.metrics.values())
    assert out.consumed == {role: BATCHES[role].ids for role in BATCHES}

    def gradient(**weights: float) -> torch.Tensor:
        only = ThirdParty(replace(cfg, method=replace(cfg.method, **weights)))
        only.load_state_dict(method.state_dict())
        loss = only.loss(ctx, BATCHES).loss
        parts = torch.autograd.grad(loss, list(ctx.model.parameters()), allow_unused=True)
        return torch.cat([g.flatten() for g in parts if g is not None])

    nothing = {"gradient_weight": 0.0, "output_weight": 0.0, "confidence_weight": 0.0}
    for name in ("gradient_weight", "output_weight"):
        change = gradient(**nothing | {name: 1.0}) - gradient(**nothing)
        assert change.norm() > 1e-4, name


def test_the_gradient_is_that_of_the_distance_with_third_party_held_still():
    """Against autograd through the energy distance itself, on features the method computes."""
    cfg = config(confidence_weight=0.0, output_weight=0.0, gradient_weight=1.0)
    method, ctx = started(cfg)
    weights = list(ctx.model.parameters())
    features = []

    def remember(ctx, pairs, bank, draw, inner=method.evaluator._described):
        features.append(inner(ctx, pairs, bank, draw))
        return features[-1]

    def gradient(loss):
        parts = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        return torch.cat(
            [(torch.zeros_like(w) if g is None else g).flatten() for g, w in zip(parts, weights, strict=True)]
        )

    restore = kept(ctx)
    utility = Finetune(cfg).loss(ctx, {"retain": BATCHES["retain"]}).loss
    task = gradient(utility)
    restore()
    method.evaluator._described = remember
    out = method.loss(ctx, BATCHES)
    forget, third = (method._scale(found) for found in features)
    held = task + gradient(energy_distance(forget, third.detach()))
    moved = task + gradient(energy_distance(forget, third))
    found = gradient(out.loss)
    difference = (found - held).norm() / held.norm()
    assert difference < 1e-4
    assert (found - moved).norm() / moved.norm() > 100 * difference  # negative control
    expected = float(utility.detach() + energy_distance(forget, third).detach())
    assert float(out.loss.detach()) == pytest.approx(expected, rel=1e-4)  # the objective's value, not the surrogate's


def test_a_constraint_without_gradient_stops_the_run():
    cfg = config()
    method, ctx = started(cfg)
    assert method.loss(ctx, BATCHES).metrics["constraint_gradient"] > 0
    with torch.no_grad():  # a collapsed head: every output is the same, whatever goes in
        (ctx.model.predictor or ctx.model.projector).last.weight.zero_()
        for parameter in ctx.model.projector.body.parameters():
            parameter.zero_()
    with pytest.raises(NumericsError, match="no gradient at the first step"):
        method.loss(ctx, BATCHES)


def test_a_constraint_whose_target_an_earlier_micro_batch_met_runs_on():
    method, ctx = started(config())
    method.switch_gradient.set_target(1e6)
    assert method.loss(ctx, BATCHES).metrics["constraint_gradient"] > 0  # nothing is known of Phi yet
    ctx.micro = 1
    metrics = method.loss(ctx, BATCHES).metrics
    assert (metrics["gradient_term_on"], metrics["constraint_gradient"]) == (False, 0)


def test_a_constraint_without_gradient_on_another_rank_stops_this_one_too(monkeypatch):
    method, ctx = started(config())
    monkeypatch.setattr(base, "all_reduce_mean", lambda x: torch.full_like(x, 0.5))  # one of two says so
    with pytest.raises(NumericsError, match="no gradient at the first step"):
        method.loss(ctx, BATCHES)


@pytest.mark.parametrize("name", DISTANCES)
def test_every_distance_is_drawn_anew_at_every_step(name):
    """The value that is logged is the distance of the method's own features, drawn for this seed and this step."""
    cfg = config()
    cfg = replace(cfg, seed=3, constraint=replace(cfg.constraint, distance=name))
    method, ctx = started(cfg)
    features = []

    def remember(ctx, pairs, bank, draw, inner=method.evaluator._described):
        features.append(inner(ctx, pairs, bank, draw).detach())
        return inner(ctx, pairs, bank, draw)

    ctx.step, method.evaluator._described = 7, remember
    found = float(method.loss(ctx, BATCHES).metrics["phi_gradient"])
    forget, third = (method._scale(rows) for rows in features)
    assert found == pytest.approx(float(DISTANCES[name](forget, third, seed=3, step=7)), rel=1e-5)
    other = float(DISTANCES[name](forget, third, seed=3, step=8))
    assert (abs(other - found) > 1e-5) == (name == "mmd")


def test_a_step_along_the_gradient_lowers_the_distance():
    cfg = config(confidence_weight=0.0)
    method, ctx = started(cfg)
    restore = kept(ctx)
    optimizer = torch.optim.SGD(ctx.model.parameters(), lr=1e-4)
    task = ThirdParty(
        replace(cfg, method=replace(cfg.method, gradient_weight=0.0, output_weight=0.0, confidence_weight=0.0))
    )
    task.load_state_dict(method.state_dict())
    before = method.loss(ctx, BATCHES)
    before.loss.backward()
    restore()
    gradients = [p.grad for p in ctx.model.parameters()]
    for p in ctx.model.parameters():
        p.grad = None
    task.loss(ctx, BATCHES).loss.backward()
    restore()
    for p, whole in zip(ctx.model.parameters(), gradients, strict=True):  # what is left is the constraint's
        p.grad = whole if p.grad is None else whole - p.grad
    optimizer.step()
    after = method.loss(ctx, BATCHES)
    first, second = (o.metrics["phi_gradient"] + o.metrics["phi_output"] for o in (before, after))
    assert second < first


@pytest.mark.parametrize("confidence", ["hinge", "entropy"])
def test_confidence_is_lowered_on_third_party_only(confidence):
    cfg = config(confidence_loss=confidence, confidence_weight=1.0, gradient_weight=0.0, output_weight=0.0)
    method, ctx = started(cfg)
    restore = kept(ctx)
    out = method.loss(ctx, BATCHES)
    restore()
    other = method.loss(ctx, {**BATCHES, "forget": batch("forget-other", 6)})
    restore()
    assert float(out.metrics["confidence_term"]) == pytest.approx(float(other.metrics["confidence_term"]), rel=1e-6)
    third = method.loss(ctx, {**BATCHES, "third_party": batch("third-other", 8)})
    assert float(out.metrics["confidence_term"]) != pytest.approx(float(third.metrics["confidence_term"]), rel=1e-6)


def test_hinge_is_active_at_the_start():
    method, ctx = started(config())
    assert 0.3 <= method.loss(ctx, BATCHES).metrics["hinge_active_share"] <= 1.0


def test_averaging_over_pairs_of_views_changes_views_and_counts_them():
    one, two = (started(config(view_pairs=pairs)) for pairs in (1, 2))
    for method, ctx in (one, two):
        ctx.images = 0
        method.loss(ctx, BATCHES)
    per_pair = 2 * (6 + 8)
    assert one[1].images == 2 * 12 + per_pair and two[1].images == 2 * 12 + 2 * per_pair


@pytest.mark.parametrize(("objective", "pairs"), [("simclr", 1), ("simclr", 2), ("moco", 1)])
def test_the_anchor_is_the_turn_of_third_party_outputs_and_embeddings(objective, pairs):
    method, ctx = started(config(objective, anchor_weight=2.0, view_pairs=pairs))
    plain, _ = started(config(objective, view_pairs=pairs))
    with torch.no_grad():
        for parameter in ctx.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    ctx.images = 0
    other = copy.deepcopy(ctx)
    out = method.loss(ctx, BATCHES)
    online = ctx.objective.branches
    cosines = []
    for pair in range(pairs):  # with the statistics as they are now
        shown = view_pair(ctx, BATCHES["third_party"], pair)[:online]
        with torch.no_grad(), batchnorm_mode(ctx.model, "eval"):
            for view in shown:
                now, before = ctx.model(view), ctx.original(view)
                for u, v in ((now.output, before.output), (now.embedding, before.embedding)):
                    cosines += torch.nn.functional.cosine_similarity(u, v).tolist()
    assert out.metrics["third_party_drift"] == pytest.approx(1 - np.mean(cosines), abs=1e-5)
    assert out.metrics["third_party_drift"] > 0.01
    without = plain.loss(other, BATCHES)
    assert "third_party_drift" not in without.metrics
    assert ctx.images == other.images + online * pairs * 8
    added = float(out.loss.detach() - without.loss.detach())
    assert added == pytest.approx(2 * float(out.metrics["third_party_drift"]), abs=1e-4)


def test_one_single_image_in_resampled_views():
    """A request for one image: a batch of its views, no two alike."""
    method, ctx = started(config())
    image = batch("forget", 1)
    repeated = Batch(image.ids * 6, np.arange(6), image.labels.repeat(6), image.cut)
    out = method.loss(ctx, {**BATCHES, "forget": repeated})
    assert torch.isfinite(out.loss) and out.metrics["phi_gradient"] != 0
    alike = repeated.at_epoch(0)
    assert method.loss(ctx, {**BATCHES, "forget": alike}).metrics["phi_output"] != out.metrics["phi_output"]


def test_state_round_trip_gives_the_same_next_loss():
    method, ctx = started(config())
    method.loss(ctx, BATCHES)
    other = ThirdParty(method.cfg)
    other.load_state_dict({name: value.clone() for name, value in method.state_dict().items()})
    restore = kept(ctx)
    first = method.loss(ctx, BATCHES).loss.item()
    restore()
    assert other.loss(ctx, BATCHES).loss.item() == first
    restore()
    assert ThirdParty(method.cfg).loss(ctx, BATCHES).loss.item() != first  # the state does matter


def test_calibration_finds_a_target_only_where_third_party_differ():
    method, ctx = ThirdParty(config()), context(config())
    alike = method.calibrate(ctx, batch)
    assert alike["phi_star_gradient"] == 0.0 and alike["calibration_p_gradient"] > 0.01

    def foreign(role: str) -> Batch:
        found = batch(role, 60)
        return darker(found, 8) if role == "third_party" else found

    differs = ThirdParty(config()).calibrate(ctx, foreign)
    assert differs["phi_star_output"] > 0 and differs["calibration_p_output"] <= 0.01
    zero = ThirdParty(config(phi_target="zero")).calibrate(ctx, foreign)
    assert zero["phi_star_output"] == 0.0


def test_grad_ascent_climbs_and_is_bounded():
    cfg = replace(config(), method=method_settings("grad_ascent"))
    ctx = context(cfg)
    method = METHODS["grad_ascent"](cfg)
    out = method.loss(ctx, BATCHES)
    assert out.loss.item() == pytest.approx(-out.metrics["forget_loss"])
    assert out.consumed == {"forget": BATCHES["forget"].ids}
    bounded = replace(cfg, method=method_settings("grad_ascent", ascent_bound=1e-6))
    with pytest.raises(NumericsError, match="ascent_bound"):
        METHODS["grad_ascent"](bounded).loss(ctx, BATCHES)


def test_a_purged_queue_leaves_no_key_of_a_forgotten_image():
    ctx = context(config("moco"))
    ids = torch.from_numpy(id_hashes(["retain-0", "retain-5"]))
    held = int(torch.isin(ctx.queue.ids, ids).sum())
    assert held > 0 and ctx.queue.purge(ids) == held
    assert not torch.isin(ctx.queue.ids[ctx.queue.valid], ids).any()


@pytest.mark.parametrize("name", ["finetune", "retrain"])
def test_references_train_on_retain_alone(name):
    cfg = config()
    method = METHODS[name](cfg)
    assert set(method.batch_sizes()) == {"retain"} and not method.forgets
    out = method.loss(context(cfg), {"retain": BATCHES["retain"]})
    assert out.consumed == {"retain": BATCHES["retain"].ids}
