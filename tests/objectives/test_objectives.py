"""Each objective against an independent brute-force oracle in float64, and its closed-form gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from parts import OBJECTIVES, objective_settings

from distunlearn.errors import ConfigError, DataError
from distunlearn.objectives import Bank, Branches, make_objective
from distunlearn.objectives.base import Objective

N, D, HD, K, TAU = 6, 5, 4, 9, 0.25
TIGHT = {"rtol": 0.0, "atol": 1e-12}
NAMES = list(OBJECTIVES)


def objective_of(name: str) -> Objective:
    return make_objective(objective_settings(name=name, temperature=TAU))


def number(x: torch.Tensor) -> float:
    """A scalar tensor's value; float() of one with a graph warns."""
    return x.detach().item()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_bank() -> Bank:
    valid = torch.ones(K, dtype=torch.bool)
    valid[4] = False
    keys = draw(K, D, seed=5)
    keys = keys / keys.pow(2).sum(1, keepdim=True).sqrt()
    return Bank(keys, torch.tensor([100, 101, 102, 0, 1, 103, 104, 1, 105]), TAU, valid)


def make_branches(name: str, num: int = N, seed: int = 0) -> Branches:
    objective = OBJECTIVES[name]
    shape = (objective.branches, num, D)
    return Branches(
        output=(2 * draw(*shape, seed=seed)).requires_grad_(),
        hidden=draw(objective.branches, num, HD, seed=seed + 1),
        target=draw(*shape, seed=seed + 2) if objective.needs_momentum else None,
        labels=torch.arange(num) % D if objective.uses_labels else None,
        ids=torch.arange(num),
    )


# --- oracles: written from the papers with loops over samples and keys, sharing no code with the package ---


def cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x * y).sum() / (x.pow(2).sum().sqrt() * y.pow(2).sum().sqrt())


def minus_log_share(first: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
    return -torch.log(first.exp() / (first.exp() + sum(o.exp() for o in others)))


def negatives(x: torch.Tensor, bank: Bank, own: int) -> list[torch.Tensor]:
    counted = [k for k in range(K) if bool(bank.valid[k]) and int(bank.ids[k]) != own]
    return [cosine(x, bank.keys[k]) / TAU for k in counted]


def cross_entropy(logits: torch.Tensor, label: int) -> torch.Tensor:
    return -(logits[label] - logits.exp().sum().log())


def oracle_pair_loss(x: torch.Tensor, y: torch.Tensor, bank: Bank, own: int) -> torch.Tensor:
    s0 = cosine(x, y) / TAU
    return (minus_log_share(s0, negatives(x, bank, own)) + minus_log_share(s0, negatives(y, bank, own))) / 2


def oracle_sample_loss(name: str, z: torch.Tensor, b: Branches, i: int, bank: Bank) -> torch.Tensor:
    """l_i as a function of this sample's raw outputs z [V, D] alone."""
    if name == "supervised":
        return (cross_entropy(z[0], int(b.labels[i])) + cross_entropy(z[1], int(b.labels[i]))) / 2
    own = int(b.ids[i])
    if name == "simclr":
        return oracle_pair_loss(z[0], z[1], bank, own)
    losses = [oracle_pair_loss(z[v], b.target[v, i], bank, own) for v in range(z.shape[0])]
    return sum(losses) / len(losses)


def oracle_confidence(name: str, b: Branches, i: int, bank: Bank) -> float:
    z, own = b.output.detach()[:, i], int(b.ids[i])
    if name == "supervised":
        return sum(number(max(row.exp() / row.exp().sum())) for row in z) / 2
    partners = z.flip(0) if name == "simclr" else b.target[:, i]

    def share(x: torch.Tensor, y: torch.Tensor) -> float:
        return math.exp(-number(minus_log_share(cosine(x, y) / TAU, negatives(x, bank, own))))

    values = [(share(x, y) + share(y, x)) / 2 for x, y in zip(z, partners, strict=True)]
    return sum(values) / len(values)


def oracle_utility(name: str, b: Branches, bank: Bank) -> torch.Tensor:
    z, num = b.output, b.num_samples
    total = torch.zeros((), dtype=torch.float64)
    if name == "simclr":
        flat = [z[v, i] for i in range(num) for v in range(2)]
        for i, x in enumerate(flat):
            partner = i + 1 if i % 2 == 0 else i - 1
            others = [cosine(x, y) / TAU for k, y in enumerate(flat) if k not in (i, partner)]
            total = total + minus_log_share(cosine(x, flat[partner]) / TAU, others)
        return total / (2 * num)
    for i in range(num):
        if name == "moco":
            s0 = cosine(z[0, i], b.target[0, i]) / TAU
            total = total + minus_log_share(s0, negatives(z[0, i], bank, int(b.ids[i])))
        elif name == "mocov3":
            for v in range(2):
                s = [cosine(z[v, i], b.target[v, j]) / TAU for j in range(num)]
                total = total + 2 * TAU * minus_log_share(s[i], s[:i] + s[i + 1 :])
        elif name == "byol":
            for v in range(2):
                p, t = z[v, i] / z[v, i].norm(), b.target[v, i] / b.target[v, i].norm()
                total = total + (p - t).pow(2).sum()
        else:
            total = total + oracle_sample_loss(name, z[:, i], b, i, bank)
    return total / num


# --- values ---


@pytest.mark.parametrize("name", NAMES)
def test_utility_equals_the_brute_force_oracle(name):
    objective, b, bank = objective_of(name), make_branches(name), make_bank()
    loss, expected = objective.task_loss(b, bank), oracle_utility(name, b, bank)
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected, **TIGHT)
    (grad,) = torch.autograd.grad(loss, b.output)
    (grad_expected,) = torch.autograd.grad(expected, b.output)
    torch.testing.assert_close(grad, grad_expected, **TIGHT)
    assert number(grad.abs().max()) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_per_sample_loss_and_confidence_equal_the_oracle(name):
    objective, b, bank = objective_of(name), make_branches(name), make_bank()
    loss, c = objective.per_sample_loss(b, bank), objective.confidence(b, bank)
    assert loss.shape == c.shape == (N,)
    for i in range(N):
        assert number(loss[i]) == pytest.approx(number(oracle_sample_loss(name, b.output[:, i], b, i, bank)), abs=1e-12)
        assert number(c[i]) == pytest.approx(oracle_confidence(name, b, i, bank), abs=1e-12)
    assert bool((c > 0).all()) and bool((c <= 1).all())


@pytest.mark.parametrize("name", NAMES)
def test_confidence_is_the_softmax_of_the_logits(name):
    """Query side only for momentum objectives, hence the comparison with SimCLR and supervised in full."""
    objective, b, bank = objective_of(name), make_branches(name), make_bank()
    p = objective.logits(b, bank).softmax(-1)
    assert p.shape == (objective.branches, N, D if name == "supervised" else 1 + K)
    assert bool(torch.isfinite(p).all())
    if name in ("simclr", "supervised"):
        share = p[..., 0] if name == "simclr" else p.amax(-1)
        torch.testing.assert_close(share.mean(0), objective.confidence(b, bank), **TIGHT)


# --- the closed form ---


@pytest.mark.parametrize("name", NAMES)
def test_delta_equals_torch_func_and_autograd_on_the_oracle(name):
    objective, b, bank = objective_of(name), make_branches(name), make_bank()
    delta = objective.per_sample_delta(b, bank)
    assert delta.shape == b.output.shape
    for i in range(N):
        z = b.output.detach()[:, i].clone()
        by_func = torch.func.grad(lambda z, i=i: oracle_sample_loss(name, z, b, i, bank))(z)
        z.requires_grad_()
        (by_autograd,) = torch.autograd.grad(oracle_sample_loss(name, z, b, i, bank), z)
        torch.testing.assert_close(delta[:, i].detach(), by_func, **TIGHT)
        torch.testing.assert_close(delta[:, i].detach(), by_autograd, **TIGHT)
    assert number(delta.abs().min(dim=2).values.max()) > 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_delta_is_differentiable_with_the_exact_second_derivative(name):
    """Against double backward of the oracle: the coupling of SimCLR's two branches included."""
    objective, b, bank, weight = objective_of(name), make_branches(name), make_bank(), draw(2, N, D, seed=9)
    weight = weight[: b.output.shape[0]]
    (second,) = torch.autograd.grad((objective.per_sample_delta(b, bank) * weight).sum(), b.output)
    total = sum(oracle_sample_loss(name, b.output[:, i], b, i, bank) for i in range(N))
    (first,) = torch.autograd.grad(total, b.output, create_graph=True)
    (expected,) = torch.autograd.grad((first * weight).sum(), b.output)
    torch.testing.assert_close(second, expected, **TIGHT)


@pytest.mark.parametrize("name", NAMES)
def test_delta_gives_the_head_gradient_of_each_sample(name):
    """delta h^T, summed over branches, is the gradient of the last linear layer W h + b for one sample."""
    objective, bank = objective_of(name), make_bank()
    hidden = draw(objective.branches, N, HD, seed=1)
    weight, bias = draw(D, HD, seed=6), draw(D, seed=7)
    b = make_branches(name)._replace(hidden=hidden, output=hidden @ weight.T + bias)
    delta = objective.per_sample_delta(b, bank)

    def loss(weight: torch.Tensor, bias: torch.Tensor, i: int) -> torch.Tensor:
        return oracle_sample_loss(name, hidden[:, i] @ weight.T + bias, b, i, bank)

    for i in range(N):
        grad_weight, grad_bias = torch.func.grad(loss, argnums=(0, 1))(weight, bias, i)
        torch.testing.assert_close(torch.einsum("vd,vh->dh", delta[:, i], hidden[:, i]), grad_weight, **TIGHT)
        torch.testing.assert_close(delta[:, i].sum(0), grad_bias, **TIGHT)


# --- properties ---


@pytest.mark.parametrize("name", NAMES)
def test_per_sample_quantities_do_not_depend_on_batch_mates(name):
    objective, b, bank = objective_of(name), make_branches(name), make_bank()
    mates = make_branches(name, seed=50)
    mixed = Branches(
        *(
            None if mine is None else torch.cat([mine[..., :2, :], other[..., 2:, :]], -2) if mine.dim() == 3 else mine
            for mine, other in zip(b, mates, strict=True)
        )
    )
    for function in ("per_sample_loss", "confidence", "output_features"):
        torch.testing.assert_close(
            getattr(objective, function)(b, bank)[:2], getattr(objective, function)(mixed, bank)[:2], **TIGHT
        )
    torch.testing.assert_close(
        objective.per_sample_delta(b, bank)[:, :2], objective.per_sample_delta(mixed, bank)[:, :2], **TIGHT
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", [slice(1, 4), torch.tensor([5, 0, 2]), torch.tensor([True, False] * 3)])
def test_a_part_of_the_branches_is_that_part_of_the_results(name, which):
    objective, b, bank = objective_of(name), make_branches(name), make_bank()
    part = b.part(which)
    assert part.num_samples == 3
    torch.testing.assert_close(objective.per_sample_loss(part, bank), objective.per_sample_loss(b, bank)[which])
    torch.testing.assert_close(
        objective.per_sample_delta(part, bank), objective.per_sample_delta(b, bank)[:, which], **TIGHT
    )


@pytest.mark.parametrize("name", [name for name in NAMES if OBJECTIVES[name].needs_momentum])
def test_no_gradient_reaches_the_momentum_target(name):
    objective, b, bank = objective_of(name), make_branches(name), make_bank()
    b = b._replace(target=b.target.requires_grad_())
    losses = objective.task_loss(b, bank) + objective.per_sample_loss(b, bank).sum()
    losses = losses + objective.per_sample_delta(b, bank).sum() + objective.output_features(b, bank).sum()
    assert torch.autograd.grad(losses, b.target, allow_unused=True) == (None,)


@pytest.mark.parametrize("name", NAMES)
def test_output_features_are_finite_differentiable_and_ordered(name):
    objective, b, bank = objective_of(name), make_branches(name), make_bank()
    features = objective.output_features(b, bank)
    assert features.shape == (N, 2)
    (grad,) = torch.autograd.grad(features.pow(2).sum(), b.output)
    assert bool(torch.isfinite(grad).all()) and number(grad.abs().max()) > 0
    z = b.output.detach()
    if name == "supervised":
        p = z.exp() / z.exp().sum(-1, keepdim=True)
        top = p.amax(-1)
        torch.testing.assert_close(features[:, 0].detach(), (p[0] * p[1]).sum(-1), **TIGHT)
        torch.testing.assert_close(features[:, 1].detach(), (top / (1 - top)).log().mean(0), rtol=0.0, atol=1e-10)
        return
    partners = z.flip(0) if name == "simclr" else b.target
    for i in range(N):
        agreement = [number(cosine(x, y)) for x, y in zip(z[:, i], partners[:, i], strict=True)]
        assert number(features[i, 0]) == pytest.approx(sum(agreement) / len(agreement), abs=1e-12)
        soft = [torch.stack(negatives(x, bank, i)).exp().mean().log() * TAU for x in z[:, i]]
        assert number(features[i, 1]) == pytest.approx(number(sum(soft)) / len(soft), abs=1e-12)
    assert bool((features.abs() <= 1).all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_outputs_and_an_empty_bank_stay_finite(name, dtype):
    objective, b = objective_of(name), make_branches(name)
    bank = Bank(torch.zeros(3, D, dtype=dtype), torch.zeros(3, dtype=torch.int64), TAU, torch.zeros(3).bool())
    output = torch.zeros_like(b.output, dtype=dtype).requires_grad_()
    b = b._replace(output=output, target=None if b.target is None else b.target.to(dtype))
    values = [
        objective.task_loss(b, bank),
        objective.per_sample_loss(b, bank),
        objective.per_sample_delta(b, bank),
        objective.confidence(b, bank),
        objective.output_features(b, bank),
    ]
    for value in values:
        assert bool(torch.isfinite(value).all())
        if value.requires_grad:
            (grad,) = torch.autograd.grad(value.sum(), output, allow_unused=True)
            assert grad is None or bool(torch.isfinite(grad).all())
    if objective.uses_bank:
        assert number(values[1].abs().max()) == 0.0


@pytest.mark.parametrize("name", [name for name in NAMES if OBJECTIVES[name].uses_bank])
def test_bank_keys_are_normalised_detached_and_in_image_order(name):
    objective, b = objective_of(name), make_branches(name)
    keys, ids = objective.bank_keys(b)
    num_branches = objective.branches
    assert keys.shape == (N * num_branches, D) and not keys.requires_grad
    assert ids.tolist() == [i for i in range(N) for _ in range(num_branches)]
    source = b.output.detach() if name == "simclr" else b.target
    torch.testing.assert_close(keys[num_branches], source[0, 1] / source[0, 1].norm(), **TIGHT)
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(len(keys), dtype=torch.float64), **TIGHT)
    loss = objective.per_sample_loss(b, Bank.gather(keys, ids, TAU))
    assert bool((loss > 0).all())


def test_supervised_has_no_bank():
    objective = objective_of("supervised")
    b = make_branches("supervised")
    assert objective.bank_keys(b) is None
    torch.testing.assert_close(objective.per_sample_loss(b, None), objective.per_sample_loss(b, make_bank()))


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, -1, 0, 0, 0]), torch.full((N,), D)])
def test_supervised_refuses_missing_and_impossible_labels(labels):
    b = make_branches("supervised")._replace(labels=labels)
    for function in ("task_loss", "per_sample_loss", "per_sample_delta"):
        with pytest.raises(DataError, match=r"expected; use labelled data"):
            getattr(objective_of("supervised"), function)(b, None)


def test_moco_without_own_keys_in_the_queue_is_the_papers_loss_and_masks_them_otherwise():
    objective, b, bank = objective_of("moco"), make_branches("moco"), make_bank()
    unmasked = Bank(bank.keys, bank.ids, TAU)
    foreign = b._replace(ids=b.ids + 1000)
    u = b.output[0] / b.output[0].norm(dim=1, keepdim=True)
    k = b.target[0] / b.target[0].norm(dim=1, keepdim=True)
    logits = torch.cat([(u * k).sum(1, keepdim=True), u @ bank.keys.T], 1) / TAU
    paper = torch.nn.functional.cross_entropy(logits, torch.zeros(N, dtype=torch.int64))
    torch.testing.assert_close(objective.task_loss(foreign, unmasked), paper, **TIGHT)
    assert number(objective.task_loss(b, unmasked)) < number(paper) - 1e-4


def test_every_objective_declares_what_it_needs():
    for name, kind in OBJECTIVES.items():
        objective = objective_of(name)
        assert objective.name == name == kind.name and (not kind.uses_bank or objective.temperature == TAU)
        assert objective.views == 2 and objective.branches in (1, 2)
        assert objective.uses_bank or not objective.uses_queue
    assert [n for n in NAMES if OBJECTIVES[n].uses_queue] == ["moco"]


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean mocov3"):
        make_objective(replace(objective_settings(), name="moco_v3"))
