"""Every method's loss and gradient against the formula of its docstring, written out image by image in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from method_batches import batch, in_float64
from parts import METHODS, method_settings, objective_settings
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor

from distunlearn.config.schema import EncoderConfig, PretrainConfig, RunConfig, UnlearnConfig
from distunlearn.data.schedule import Batch
from distunlearn.data.views.colour import make_view
from distunlearn.data.views.draws import id_hashes
from distunlearn.encoders.model import MomentumEncoder, batchnorm_mode, build_model
from distunlearn.methods.base import Method
from distunlearn.methods.held_out_distillation import followed
from distunlearn.methods.salun import largest
from distunlearn.objectives import KeyQueue, make_objective
from distunlearn.objectives.forward import Context

OBJECTIVES = ("simclr", "moco", "byol")
ALL_OBJECTIVES = (*OBJECTIVES, "mocov3", "supervised")
BY_HAND = ("finetune", "retrain", "l1_sparse")  # whose loss is the utility, below
TAU = 0.5
CLOSE = 1e-9
BATCHES = {role: batch(role) for role in ("retain", "forget", "third_party")}


def config(name: str, objective: str = "simclr", **method) -> RunConfig:
    encoder = EncoderConfig(
        name="resnet18", image_size=16, in_chans=1, stem="deep",
        args={"stem_width": 4, "channels": [4, 6, 8, 8], "layers": [1, 1, 1, 1]},
    )  # fmt: skip
    return RunConfig(
        encoder=encoder,
        objective=objective_settings(name=objective, hidden_dim=10, output_dim=6, temperature=TAU, queue_size=32),
        pretrain=PretrainConfig(batch=12),
        unlearn=UnlearnConfig(retain_batch=12, forget_batch=6, third_party_batch=8),
        method=method_settings(name=name, **method),
    )


def context(cfg: RunConfig, moved: float = 0.1) -> Context:
    """An encoder in float64 a little away from its original, a momentum encoder, and a queue of keys."""
    original = build_model(cfg, 3).double()
    model, objective = copy.deepcopy(original), make_objective(cfg.objective)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(moved * weight.std(unbiased=False) * torch.randn(weight.shape, generator=generator))
    momentum = MomentumEncoder(original) if objective.needs_momentum else None
    if momentum:
        momentum.model.double()
    queue = None
    if objective.uses_queue:
        queue = KeyQueue(32, 6, dtype=torch.float64)
        keys = torch.nn.functional.normalize(torch.randn(20, 6, generator=generator).double(), dim=-1)
        ids = torch.from_numpy(id_hashes([*(f"retain-{i}" for i in range(8)), *(f"other-{i}" for i in range(12))]))
        queue.push(keys, ids)
    ctx = Context(cfg, objective, model, model, torch.device("cpu"), momentum, queue)
    ctx.original = original.eval().requires_grad_(False)
    return ctx


@dataclass
class Seen:
    """What an encoder makes of two views of a batch: rows of unit vectors by branch, [V][n]."""

    output: list[Tensor]
    embedding: list[Tensor]
    target: list[Tensor] | None


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def see(ctx: Context, shown: Batch, mode: str, *, network=None, pair: int = 0) -> Seen:
    """Without `embed`: views, forward, heads."""
    views = [
        make_view(
            shown.views([2 * pair + v])[:, 0],
            ctx.cfg.views,
            seed=0,
            epochs=shown.epochs,
            ids=shown.ids,
            view=2 * pair + v,
        ).double()
        for v in (0, 1)
    ]
    online = views[: ctx.objective.branches]
    with batchnorm_mode(network or ctx.model, mode):
        out = (network or ctx.model)(torch.cat(online))
    count, target = len(shown.ids), None
    if ctx.momentum is not None:
        other = [views[1]] if len(online) == 1 else [views[1], views[0]]
        with torch.no_grad(), batchnorm_mode(ctx.momentum.model, mode):
            target = list(unit(ctx.momentum.model(torch.cat(other)).projection).split(count))
    output = out.output if ctx.objective.name == "supervised" else unit(out.output)
    return Seen(list(output.split(count)), list(unit(out.embedding).split(count)), target)


def merged(a: Batch, b: Batch) -> Batch:
    return Batch(a.ids + b.ids, np.r_[a.epochs, b.epochs], torch.cat([a.labels, b.labels]), a.cut)


def rows(ctx: Context, seen: Seen, shown: Batch, partner: Callable[[int], int] = lambda i: i) -> list[Tensor]:
    """The encoder's own loss of every image, whose second view is that of image partner(i)."""
    name, found = ctx.objective.name, []
    for i in range(len(shown.ids)):
        j = partner(i)
        if name == "simclr":
            everyone = [*seen.output[0], *seen.output[1]]
            pair = [(seen.output[0][i], i, seen.output[1][j]), (seen.output[1][j], 12 + 6 + j, seen.output[0][i])]
            if len(shown.ids) == 12:
                pair[1] = (pair[1][0], 12 + j, pair[1][2])
            terms = []
            for anchor, own, positive in pair:
                total = sum(torch.exp(anchor @ other / TAU) for k, other in enumerate(everyone) if k != own)
                terms.append(-torch.log(torch.exp(anchor @ positive / TAU) / total))
            found.append(sum(terms) / 2)
        elif name == "moco":
            query, key = seen.output[0][i], seen.target[0][j]
            own = int(id_hashes([shown.ids[i]])[0])
            held = zip(ctx.queue.keys, ctx.queue.ids.tolist(), ctx.queue.valid.tolist(), strict=True)
            others = [torch.exp(query @ k / TAU) for k, owner, valid in held if valid and owner != own]
            positive = torch.exp(query @ key / TAU)
            found.append(-torch.log(positive / (positive + sum(others))))
        elif name == "byol":
            found.append(sum((seen.output[v][i] - seen.target[v][j]).square().sum() for v in (0, 1)))
        elif name == "supervised":
            found.append(sum(-seen.output[v][i].log_softmax(-1)[shown.labels[i]] for v in (0, 1)) / 2)
        else:
            terms = []
            for v in (0, 1):
                scores = [torch.exp(seen.output[v][i] @ k / TAU) for k in seen.target[v]]
                terms.append(-2 * TAU * torch.log(torch.exp(seen.output[v][i] @ seen.target[v][j] / TAU) / sum(scores)))
            found.append(sum(terms))
    return found


def mean(values: list[Tensor]) -> Tensor:
    return sum(values) / len(values)


def utility(ctx: Context) -> Tensor:
    return mean(rows(ctx, see(ctx, BATCHES["retain"], "train"), BATCHES["retain"]))


def distance(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """1 - cosine, averaged over images and views."""
    return mean([1 - a @ b for u, v in zip(first, second, strict=True) for a, b in zip(u, v, strict=True)])


def gradients(loss: Tensor, ctx: Context) -> Tensor:
    weights = list(ctx.model.parameters())
    parts = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for w, g in zip(weights, parts, strict=True)])


def started(name: str, objective: str, **settings) -> tuple[Method, Context, Context]:
    """The method, its context, and a copy of it for the computation by hand."""
    cfg = config(name, objective, **settings)
    ctx = context(cfg)
    method = METHODS[name](cfg)
    with in_float64():
        method.calibrate(ctx, batch)
    ctx.images = 0
    return method, ctx, copy.deepcopy(ctx)


def agree(method: Method, ctx: Context, hand: Context, expected: Tensor) -> None:
    with in_float64():
        out = method.loss(ctx, BATCHES)
    assert out.loss.dtype == torch.float64 and float(out.loss.detach()) == pytest.approx(float(expected.detach()))
    found, right = gradients(out.loss, ctx), gradients(expected, hand)
    assert right.norm() > 1e-4 and (found - right).norm() < CLOSE * right.norm()


# -- one by one --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ALL_OBJECTIVES)
def test_neg_grad(objective):
    method, ctx, hand = started("neg_grad", objective, ascent_weight=0.7)
    both = merged(BATCHES["retain"], BATCHES["forget"])
    found = rows(hand, see(hand, both, "train"), both)
    agree(method, ctx, hand, (sum(found[:12]) - 0.7 * sum(found[12:])) / 18)
    if objective == "moco":  # the keys of retained images alone entered the queue
        pushed = set(ctx.queue.ids.tolist()) - set(hand.queue.ids.tolist())
        assert pushed and pushed <= set(id_hashes(BATCHES["retain"].ids).tolist())


@pytest.mark.parametrize("objective", [o for o in ALL_OBJECTIVES if o != "supervised"])
def test_alignment_calibration(objective):
    method, ctx, hand = started("alignment_calibration", objective, alignment_weight=3.0, calibration_weight=0.4)
    both, forget = merged(BATCHES["retain"], BATCHES["forget"]), BATCHES["forget"]
    seen, alike = see(hand, both, "train"), see(hand, forget, "eval", pair=1)
    second = alike.output[1:] + alike.output[:1] if alike.target is None else alike.target
    cosines = [u @ v for a, b in zip(alike.output, second, strict=True) for u, v in zip(a, b, strict=True)]
    expected = {}
    for shift in range(6):
        found = rows(hand, seen, both, lambda i, s=shift: i if i < 12 else 12 + (i - 12 + s) % 6)
        calibrated = (sum(found[:12]) + 0.4 * sum(found[12:])) / (12 + 0.4 * 6)
        expected[shift] = calibrated + 3.0 * 6 / 18 * mean(cosines)
    with in_float64():
        value = float(method.loss(copy.deepcopy(ctx), BATCHES).loss.detach())
    [shift] = [s for s, loss in expected.items() if math.isclose(float(loss.detach()), value, rel_tol=1e-12)]
    assert shift > 0  # with 0 every image would be its own partner
    agree(method, ctx, hand, expected[shift])


def test_partners_change_from_step_to_step_and_nobody_is_its_own():
    method, ctx, hand = started("alignment_calibration", "simclr", alignment_weight=0.0, calibration_weight=1.0)
    both, losses = merged(BATCHES["retain"], BATCHES["forget"]), set()
    seen = see(hand, both, "train")
    of_shift = [float(mean(rows(hand, seen, both, lambda i, s=s: i if i < 12 else 12 + (i - 12 + s) % 6)).detach())
                for s in range(6)]  # fmt: skip
    with in_float64():
        for ctx.step in range(40):
            losses.add(round(float(method.loss(copy.deepcopy(ctx), BATCHES).loss.detach()), 9))
    assert losses == {round(loss, 9) for loss in of_shift[1:]}  # each of them drawn
    assert round(of_shift[0], 9) not in losses


@pytest.mark.parametrize("objective", ALL_OBJECTIVES)
def test_scrub(objective):
    method, ctx, hand = started("scrub", objective, forget_weight=0.6, retain_weight=1.5, max_share=0.02)
    task = utility(hand)
    away = {
        role: distance(
            see(hand, BATCHES[role], "eval").embedding,
            see(hand, BATCHES[role], "eval", network=hand.original).embedding,
        )
        for role in ("retain", "forget")
    }
    later, later_by_hand = copy.deepcopy((ctx, hand))
    agree(method, ctx, hand, task + 1.5 * away["retain"] - 0.6 * away["forget"])
    later.step = method.forget_steps()  # min steps alone, which do not touch the images to forget
    assert later.step == 3
    with in_float64():
        out = method.loss(later, BATCHES)
    assert float(out.loss.detach()) == pytest.approx(float((task + 1.5 * away["retain"]).detach()))
    assert out.consumed["forget"] == [] and "forget_distance" not in out.metrics and later_by_hand.step == 0


@pytest.mark.parametrize("objective", ALL_OBJECTIVES)
@pytest.mark.parametrize("name", ["random_target", "salun"])
def test_random_target_and_the_loss_of_salun(name, objective):
    method, ctx, hand = started(name, objective, forget_weight=2.0)
    targets = method.targets(BATCHES["forget"].ids)
    seen = see(hand, batch("retain"), "eval", network=hand.original).embedding
    places = unit(sum(seen) / len(seen))
    nearest = (targets @ places.mT).max(1).values
    assert torch.allclose(nearest, torch.ones_like(nearest)) and len({tuple(t.tolist()) for t in targets}) > 1
    assert torch.equal(method.targets(BATCHES["forget"].ids[::-1]), targets.flip(0))  # the id's, not the row's
    other = METHODS[name](replace(method.cfg, seed=1))
    other.places = method.places
    assert not torch.equal(other.targets(BATCHES["forget"].ids), targets)
    task = utility(hand)
    away = [distance([view], [targets]) for view in see(hand, BATCHES["forget"], "eval").embedding]
    agree(method, ctx, hand, task + 2.0 * mean(away))


@pytest.mark.parametrize("objective", ALL_OBJECTIVES)
def test_held_out_distillation(objective):
    method, ctx, hand = started("held_out_distillation", objective, forget_weight=2.0)
    task = utility(hand)
    strangers, known = (
        see(hand, BATCHES[role], "eval", network=hand.original).embedding for role in ("third_party", "forget")
    )
    chosen = []
    for i in range(6):
        likeness = [unit(sum(v[i] for v in known)) @ unit(sum(v[j] for v in strangers)) for j in range(8)]
        chosen.append(int(np.argmax(likeness)))
    targets = [torch.stack([view[j] for j in chosen]) for view in strangers]
    agree(method, ctx, hand, task + 2.0 * distance(see(hand, BATCHES["forget"], "eval").embedding, targets))


def test_the_followed_stranger_keeps_its_views_apart():
    generator = torch.Generator().manual_seed(0)
    forget, strangers = (unit(torch.randn(2, n, 5, generator=generator)) for n in (3, 4))
    strangers[:, 2] = forget[:, 1].flip(0)  # the same mean direction, other views
    assert torch.equal(followed(forget, strangers)[:, 1], forget[:, 1].flip(0))


@pytest.mark.parametrize("objective", ALL_OBJECTIVES)
def test_sure(objective):
    method, ctx, hand = started("sure", objective, forget_weight=0.8, critic_width=7, critic_lr=0.01)
    with in_float64():
        method.loss(copy.deepcopy(ctx), BATCHES)  # a classifier that has learned something
    before = copy.deepcopy(method.critic.net)
    task = utility(hand)
    forget, third = (see(hand, BATCHES[role], "eval").embedding for role in ("forget", "third_party"))

    def domain(net) -> Tensor:
        f = mean([torch.log(1 + torch.exp(-net(h))) for view in forget for h in view])
        t = mean([torch.log(1 + torch.exp(net(h))) for view in third for h in view])
        return (f + t).squeeze() / 2

    lost = domain(before)
    with torch.no_grad():
        scores = torch.cat([*map(before, forget), *map(before, third)]).sigmoid().flatten()
    truth = [1] * 6 * len(forget) + [0] * 8 * len(third)
    weight = [1 / (2 * truth.count(t)) for t in truth]
    assert float(lost.detach()) == pytest.approx(log_loss(truth, scores.numpy(), sample_weight=weight))
    with in_float64():
        out = method.loss(ctx, BATCHES)
    assert float(out.loss.detach()) == pytest.approx(float((task + lost).detach()))  # the value as it is ...
    right = gradients(task - 0.8 * lost, hand)  # ... its gradient turned round on the way into the encoder
    assert (gradients(out.loss, ctx) - right).norm() < CLOSE * right.norm()
    told = accuracy_score(truth, scores.numpy() > 0.5, sample_weight=weight)
    assert out.metrics["domain_accuracy"] == pytest.approx(told)
    assert float(domain(method.critic.net).detach()) < float(lost.detach())  # the classifier itself went down


@pytest.mark.parametrize("objective", ALL_OBJECTIVES)
def test_the_mask_of_salun_is_where_the_forget_gradient_is_large(objective):
    method, _, hand = started("salun", objective, mask_share=0.3)
    net = copy.deepcopy(hand.original).requires_grad_(True)
    with in_float64():
        bank = method._bank(hand, batch("retain"))
    forget = BATCHES["forget"]
    seen, found = see(hand, forget, "eval", network=net), []
    for i in range(6):
        if objective == "supervised":
            found.append(rows(hand, seen, forget)[i])
            continue
        keys = [k for row, k in enumerate(bank.keys) if bank.valid is None or bank.valid[row]]
        branches = seen.output if seen.target is None else [*zip(seen.output, seen.target, strict=True)]
        pairs = [(branches[0][i], branches[1][i]), (branches[1][i], branches[0][i])] if seen.target is None else [
            (u[i], k[i]) for u, k in branches
        ]  # fmt: skip
        terms = []
        for u, partner in pairs:
            positive = torch.exp(u @ partner / TAU)
            terms.append(-torch.log(positive / (positive + sum(torch.exp(u @ k / TAU) for k in keys))))
        found.append(mean(terms))
    named = dict(net.named_parameters())
    parts = torch.autograd.grad(mean(found), list(named.values()), allow_unused=True)
    size = np.concatenate([(torch.zeros_like(w) if g is None else g).abs().flatten().numpy()
                           for w, g in zip(named.values(), parts, strict=True)])  # fmt: skip
    mask = np.concatenate([method.mask[name].flatten().numpy() for name in named])
    assert mask.sum() == round(0.3 * len(size)) and size[mask].min() >= size[~mask].max() - 1e-12
    assert not any(weight.requires_grad for weight in hand.original.parameters())


def test_a_mask_has_exactly_its_share_even_among_equals():
    mask = largest({"a": torch.zeros(10), "b": torch.tensor([3.0, -5.0])}, 0.25)
    assert sum(int(m.sum()) for m in mask.values()) == 3 and mask["b"].all()
    assert sum(int(m.sum()) for m in largest({"a": torch.zeros(3)}, 0.01).values()) == 1


@pytest.mark.parametrize("objective", ALL_OBJECTIVES)
@pytest.mark.parametrize("name", BY_HAND)
def test_references_train_on_the_retain_images_by_the_encoders_own_loss(name, objective):
    method, ctx, hand = started(name, objective)
    agree(method, ctx, hand, utility(hand))


@pytest.mark.parametrize("objective", ["simclr", "supervised"])
def test_grad_ascent(objective):
    """Every image against the retain keys, as the encoder is used: no image of the batch enters another's loss."""
    method, ctx, hand = started("grad_ascent", objective, ascent_weight=0.7)
    retain, forget = BATCHES["retain"], BATCHES["forget"]
    seen, found = see(hand, forget, "eval"), []
    if objective == "supervised":
        found = rows(hand, seen, forget)
    else:
        keys = [key.detach() for view in see(hand, retain, "eval").output for key in view]
        for a, b in zip(*seen.output, strict=True):
            positive = torch.exp(a @ b / TAU)
            sides = [positive / (positive + sum(torch.exp(u @ key / TAU) for key in keys)) for u in (a, b)]
            found.append(-(sides[0].log() + sides[1].log()) / 2)
    agree(method, ctx, hand, -0.7 * mean(found))
