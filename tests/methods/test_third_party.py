"""third_party by hand, in float64: its calibration, and steps of its loss with every term on.

Nothing of constraints/, the objective or the method's own functions is used but the random numbers of the projections
and the permutation test: gradients per sample by autograd, distances as sums over pairs, running means as sums.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from method_batches import batch, darker, in_float64
from test_method_losses import CLOSE, TAU, config, context, gradients, merged, started, unit
from torch import Tensor

from distunlearn.constraints.distances.energy import permutation_test
from distunlearn.constraints.gradients.last_layer import sketch_matrices
from distunlearn.data.schedule import Batch
from distunlearn.data.views.colour import make_view
from distunlearn.encoders.model import batchnorm_mode
from distunlearn.methods.third_party import ThirdParty
from distunlearn.objectives.forward import Context

WEIGHTS = {
    "task_weight": 0.9, "gradient_weight": 1.3, "output_weight": 0.7, "confidence_weight": 0.4,
    "anchor_weight": 0.5, "confidence_quantile": 0.2,
}  # fmt: skip
MEMORY, SPREAD, PHI, DRAWS = 2, 0.6, 0.7, 4
FIRST_EPOCH = 1 << 32  # of the views that the calibration sees


@dataclass
class Seen:
    """One pair of views of n images by branch, [2, n, ...]; unit: lengths of 1."""

    output: Tensor
    hidden: Tensor
    embedding: Tensor


def at(shown: Batch, epoch: int) -> Batch:
    return replace(shown, epochs=np.full(len(shown.ids), epoch, dtype=np.int64))


def look(ctx: Context, shown: Batch, mode: str = "eval", pair: int = 0, network=None) -> Seen:
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
    with batchnorm_mode(network or ctx.model, mode):
        out = (network or ctx.model)(torch.cat(views))
    return Seen(*(part.unflatten(0, (2, -1)) for part in (out.output, out.hidden, out.embedding)))


def keys_of(seen: Seen) -> Tensor:
    """All outputs of both views, as directions, [2n, D]."""
    return unit(seen.output.detach()).flatten(0, 1)


def bank_loss(output: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """(l, c) of every image, [n]: its partner among the keys, from both sides."""
    u = unit(output)
    positive = torch.exp((u[0] * u[1]).sum(-1) / TAU)
    found = [positive / (positive + torch.exp(u[v] @ keys.T / TAU).sum(-1)) for v in (0, 1)]
    return -(found[0].log() + found[1].log()) / 2, (found[0] + found[1]) / 2


def gradient_features(pairs: list[Seen], keys: Tensor, projection: int, cfg) -> Tensor:
    """(log norm, sketch) of the whole gradient of the last layer's weights, image by image."""
    whole = 0
    for seen in pairs:
        losses, _ = bank_loss(seen.output, keys)
        (delta,) = torch.autograd.grad(losses.sum(), seen.output, create_graph=True)
        whole = whole + torch.einsum("vno,vni->noi", delta, seen.hidden) / len(pairs)
    out_dim, in_dim = whole.shape[1:]
    shape = cfg.constraint
    left, right = sketch_matrices(
        cfg.seed, projection, out_dim, in_dim, shape.sketch_out, shape.sketch_in, dtype=torch.float64
    )
    sketch = torch.einsum("ao,noi,bi->nab", left, whole, right).flatten(1)
    return torch.cat([whole.flatten(1).norm(dim=1, keepdim=True).log(), sketch], dim=1)


def output_features(pairs: list[Seen], keys: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 4] and confidence [n]."""
    found, confidences = [], []
    for seen in pairs:
        u, h = unit(seen.output), unit(seen.embedding)
        near = [TAU * torch.log(torch.exp(u[v] @ keys.T / TAU).mean(-1)) for v in (0, 1)]
        loss, confidence = bank_loss(seen.output, keys)
        found.append(torch.stack([(u[0] * u[1]).sum(-1), (near[0] + near[1]) / 2, loss, (h[0] * h[1]).sum(-1)], dim=1))
        confidences.append(confidence)
    return torch.stack(found).mean(0), torch.stack(confidences).mean(0)


def energy(x: Tensor, y: Tensor) -> Tensor:
    """The energy distance, pair by pair."""
    between = [(a - b).norm() for a in x for b in y]
    within = [[(z[i] - z[j]).norm() for i in range(len(z)) for j in range(len(z)) if i != j] for z in (x, y)]
    return 2 * torch.stack(between).mean() - torch.stack(within[0]).mean() - torch.stack(within[1]).mean()


class Spread:
    """Weighted mean of the third party's variances, newest heaviest."""

    def __init__(self) -> None:
        self.variances: list[Tensor] = []

    def update(self, third: Tensor) -> None:
        centred = third.detach() - third.detach().mean(0)
        self.variances.append(centred.square().sum(0) / (len(third) - 1))

    def of(self, features: Tensor, weigh_sketch: bool) -> Tensor:
        weights = [SPREAD**age for age in range(len(self.variances))][::-1]
        variance = sum(w * v for w, v in zip(weights, self.variances, strict=True)) / sum(weights)
        scaled = features / variance.sqrt()
        if weigh_sketch:
            scaled = torch.cat([scaled[:, :1], scaled[:, 1:] / (features.shape[1] - 1) ** 0.5], dim=1)
        return scaled


class Running:
    """Is the term on? As long as the weighted mean of the distances of the steps before is above the target."""

    def __init__(self, target: float) -> None:
        self.target, self.values = target, []

    def on(self) -> float:
        if not self.values or self.target == 0:
            return 1.0
        weights = [PHI**age for age in range(len(self.values))][::-1]
        return float(sum(w * v for w, v in zip(weights, self.values, strict=True)) / sum(weights) > self.target)


def settings(**changes):
    cfg = config("third_party", "simclr", **WEIGHTS | changes)
    shape = replace(
        cfg.constraint, view_pairs=2, memory_steps=MEMORY, spread_momentum=SPREAD, phi_momentum=PHI,
        sketch_out=3, sketch_in=4,
    )  # fmt: skip
    return replace(cfg, constraint=shape)


def samples(role: str) -> Batch:
    """Third-party images darker than those of calibration; more retain images than a bank takes."""
    found = batch(role, {"retain": 20, "third_party": 16, "calibration": 14}[role])
    return darker(found, 3) if role == "third_party" else found


def test_calibration_by_hand():
    cfg = settings()
    ctx, method = context(cfg), ThirdParty(cfg)
    with in_float64():
        found = method.calibrate(ctx, samples)
    retain, spreads = samples("retain"), (Spread(), Spread())
    confidences, phis, p_values = [], ([], []), []
    for draw in range(DRAWS):
        rows = [(draw * 12 + i) % 20 for i in range(12)]
        shown = Batch(
            [retain.ids[r] for r in rows], retain.epochs[rows], retain.labels[rows], retain.cut
        )  # another window for every draw
        with torch.no_grad():
            keys = keys_of(look(ctx, at(shown, FIRST_EPOCH + draw)))
        described = []
        for role in ("calibration", "third_party"):
            pairs = [look(ctx, at(samples(role), FIRST_EPOCH + draw), pair=pair) for pair in (0, 1)]
            outputs, confidence = output_features(pairs, keys)
            described.append((gradient_features(pairs, keys, draw, cfg).detach(), outputs.detach()))
            if role == "calibration":
                confidences += confidence.tolist()
        calibration, third = described
        for number, spread in enumerate(spreads):  # gradients, outputs
            spread.update(third[number])
            x, y = (spread.of(each[number], weigh_sketch=number == 0) for each in (calibration, third))
            phis[number].append(float(energy(x, y)))
            if draw == 0:
                p_values.append(permutation_test(x, y, 499, cfg.seed))
    assert found["confidence_threshold"] == pytest.approx(np.quantile(confidences, 0.2), rel=1e-9)
    assert np.quantile(confidences, 0.8) > found["confidence_threshold"] + 1e-6  # the other side is another number
    for number, name in enumerate(("gradient", "output")):
        assert found[f"calibration_p_{name}"] == pytest.approx(p_values[number])
        expected = float(np.mean(phis[number])) if p_values[number] <= 0.01 else 0.0
        assert found[f"phi_star_{name}"] == pytest.approx(expected, rel=1e-9), name
    assert found["phi_star_output"] > 0  # they do differ: the target is no zero by default


TARGETS = {"gradient": 0.0, "output": 50.0}  # on in every step; on in the first step alone


@pytest.mark.parametrize(("confidence", "ascent"), [("hinge", 0.0), ("entropy", 0.0), ("hinge", 0.6)])
def test_steps_by_hand(confidence, ascent):
    """Four steps with a memory of two: the projection, and with it the memory of gradients, begins anew in the last."""
    cfg = settings(confidence_loss=confidence, climb_weight=ascent)
    ctx, method = context(cfg), ThirdParty(cfg)
    threshold = 0.04  # in the midst of them
    method.load_state_dict(
        method.state_dict()
        | {f"switch_{name}.target": torch.tensor([value], dtype=torch.float64) for name, value in TARGETS.items()}
        | {"threshold": torch.tensor([threshold], dtype=torch.float64)}
    )
    hand = context(cfg)
    spreads, switches = (Spread(), Spread()), [Running(TARGETS["gradient"]), Running(TARGETS["output"])]
    held: tuple[list, list] = ([], [])
    for step in range(MEMORY + 2):
        ctx.step = hand.step = step
        batches = {role: at(batch(role), step) for role in ("retain", "forget", "third_party")}
        with in_float64():
            out = method.loss(ctx, batches)
        value, expected = by_hand(hand, batches, step, spreads, switches, held, confidence, threshold, ascent)
        assert float(out.loss.detach()) == pytest.approx(float(value), rel=1e-9), step
        found, right = gradients(out.loss, ctx), gradients(expected, hand)
        assert right.norm() > 1e-4 and (found - right).norm() < CLOSE * right.norm(), step
        assert float(out.metrics["output_term_on"]) == (step == 0) and float(out.metrics["gradient_term_on"]) == 1
        for one in (ctx, hand):  # the encoder moves on between the steps
            generator = torch.Generator().manual_seed(step)
            with torch.no_grad():
                for weight in one.model.parameters():
                    weight.add_(0.02 * weight.std(unbiased=False) * torch.randn(weight.shape, generator=generator))


def by_hand(hand, batches, step, spreads, switches, held, confidence, threshold, ascent) -> tuple[Tensor, Tensor]:
    """(the loss, a scalar with its gradient) of one step."""
    retain, forget, third = batches["retain"], batches["forget"], batches["third_party"]
    seen = look(hand, merged(retain, forget) if ascent else retain, "train")
    rows = contrastive_rows(unit(seen.output))
    task = contrastive_rows(unit(seen.output[:, :12])).mean()
    if ascent:
        task = task - ascent * rows[12:].mean()
    keys = keys_of(Seen(seen.output[:, :12], seen.hidden, seen.embedding))
    pairs = {role: [look(hand, batches[role], pair=pair) for pair in (0, 1)] for role in ("forget", "third_party")}
    described = {role: gradient_features(found, keys, step // (MEMORY + 1), hand.cfg) for role, found in pairs.items()}
    outputs = {role: output_features(found, keys)[0] for role, found in pairs.items()}
    if step % (MEMORY + 1) == 0:  # a new projection: older sketches say nothing
        held[0].clear()
    total, value = 0.9 * task, 0.9 * task.detach()
    for number, (features, weight) in enumerate(((described, 1.3), (outputs, 0.7))):
        mine, theirs = features["forget"], features["third_party"].detach()
        spread, switch, memory = spreads[number], switches[number], held[number]
        spread.update(theirs)
        phi = energy(spread.of(mine, number == 0), spread.of(theirs, number == 0)).detach()
        x = spread.of(torch.cat([mine, *(old for old, _ in memory)]), number == 0)
        y = spread.of(torch.cat([theirs, *(old for _, old in memory)]), number == 0)
        pull = energy(x, y) * (len(x) / len(mine))  # its gradient: the mean is over this step's samples
        memory.insert(0, (mine.detach(), theirs))
        del memory[MEMORY:]
        total = total + weight * switch.on() * pull
        value = value + weight * switch.on() * phi
        switch.values.append(float(phi))
    c = output_features(pairs["third_party"], keys)[1]
    if confidence == "hinge":
        lowered = torch.stack([torch.clamp(each - threshold, min=0) for each in c]).mean()
        assert (c > threshold).any()
    else:
        lowered = torch.stack([uncertainty(seen.output, keys) for seen in pairs["third_party"]]).mean()
    turned = []
    for pair, now in enumerate(pairs["third_party"]):
        before = original(hand, third, pair)
        turned += [1 - torch.cosine_similarity(now.output, before.output, dim=-1)]
        turned += [1 - torch.cosine_similarity(now.embedding, before.embedding, dim=-1)]
    rest = 0.4 * lowered + 0.5 * torch.stack(turned).mean()
    assert len(forget.ids) == 6
    return value + rest.detach(), total + rest


def contrastive_rows(u: Tensor) -> Tensor:
    """NT-Xent of every image, [n], of its views [2, n, D]: partner against all others, mean over both views."""
    everyone, n = u.flatten(0, 1), u.shape[1]
    likeness = torch.exp(everyone @ everyone.T / TAU)
    others = (likeness - likeness.diag().diag()).sum(1)
    partner = torch.cat([torch.arange(n, 2 * n), torch.arange(n)])
    return -(likeness[torch.arange(2 * n), partner] / others).log().view(2, n).mean(0)


def original(hand: Context, shown: Batch, pair: int) -> Seen:
    with torch.no_grad():
        return look(hand, shown, pair=pair, network=hand.original)


def uncertainty(output: Tensor, keys: Tensor) -> Tensor:
    """1 - H / ln K of the softmax over partner and keys, mean over views and images."""
    u, found = unit(output), []
    for v in (0, 1):
        for i in range(output.shape[1]):
            p = torch.softmax(torch.cat([(u[v, i] @ u[1 - v, i])[None], keys @ u[v, i]]) / TAU, dim=0)
            found.append(1 + (p * p.log()).sum() / np.log(len(p)))
    return torch.stack(found).mean()


def test_a_step_after_a_start_uses_its_targets():
    """The loss compares with what `start` measured: control that the test above sets the state that `start` sets."""
    method, ctx, _ = started("third_party", "simclr", **WEIGHTS)
    with in_float64():
        figures = method.calibrate(ctx, samples)
    state = method.state_dict()
    assert float(state["threshold"]) == pytest.approx(figures["confidence_threshold"])
    for name in ("gradient", "output"):
        assert float(state[f"switch_{name}.target"]) == pytest.approx(figures[f"phi_star_{name}"])
