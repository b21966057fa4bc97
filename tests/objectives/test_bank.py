"""The bank formulas against loops over scalars, and their behaviour at the edges."""

from __future__ import annotations

import math

import pytest
import torch

from distunlearn.objectives.memory_bank import (
    Bank,
    bank_delta,
    bank_density,
    bank_infonce,
    confidence,
    normalise,
    pair_logits,
    through_normalisation,
)

N, D, K, TAU = 5, 7, 11, 0.3
TIGHT = {"rtol": 0.0, "atol": 1e-12}


def number(x: torch.Tensor) -> float:
    """A scalar tensor's value; float() of one with a graph warns."""
    return x.detach().item()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def bank() -> Bank:
    keys = torch.nn.functional.normalize(draw(K, D, seed=1), dim=-1)
    valid = torch.ones(K, dtype=torch.bool)
    valid[[3, 8]] = False
    return Bank(keys, torch.arange(K) % 6, TAU, valid)  # ids 0..5: most queries meet their own image


QUERY_IDS = torch.tensor([0, 1, 2, 40, 41])


def oracle_side(u: list[float], partner: list[float], bank: Bank, own: int) -> list[float]:
    """exp-similarities of one query, positive first, by plain loops."""
    out = [math.exp(sum(x * y for x, y in zip(u, partner, strict=True)) / TAU)]
    for k in range(bank.keys.shape[0]):
        if bool(bank.valid[k]) and int(bank.ids[k]) != own:
            out.append(math.exp(sum(x * y for x, y in zip(u, bank.keys[k].tolist(), strict=True)) / TAU))
    return out


def test_loss_and_confidence_equal_scalar_loops(bank):
    u_a, u_b = normalise(draw(N, D)), normalise(draw(N, D, seed=2))
    loss = bank_infonce(u_a, u_b, bank, QUERY_IDS)
    c = confidence(u_a, u_b, bank, QUERY_IDS)
    for i in range(N):
        a = oracle_side(u_a[i].tolist(), u_b[i].tolist(), bank, int(QUERY_IDS[i]))
        b = oracle_side(u_b[i].tolist(), u_a[i].tolist(), bank, int(QUERY_IDS[i]))
        assert number(loss[i]) == pytest.approx(0.5 * (math.log(sum(a)) + math.log(sum(b))) - math.log(a[0]), abs=1e-12)
        assert number(c[i]) == pytest.approx(0.5 * (a[0] / sum(a) + b[0] / sum(b)), abs=1e-12)


def test_density_equals_scalar_loops(bank):
    u = normalise(draw(N, D))
    density = bank_density(u, bank, QUERY_IDS)
    for i in range(N):
        terms = oracle_side(u[i].tolist(), u[i].tolist(), bank, int(QUERY_IDS[i]))[1:]
        assert number(density[i]) == pytest.approx(TAU * math.log(sum(terms) / len(terms)), abs=1e-12)


def test_the_own_image_never_counts_as_a_negative(bank):
    u_a, u_b = normalise(draw(N, D)), normalise(draw(N, D, seed=2))
    moved = bank.keys.clone()
    moved[bank.ids == 0] = normalise(draw(2, D, seed=3))
    other = Bank(moved, bank.ids, TAU, bank.valid)
    before, after = (bank_infonce(u_a, u_b, q, QUERY_IDS) for q in (bank, other))
    assert number(before[0]) == number(after[0])  # query 0 is image 0
    assert bool((before[1:] != after[1:]).all())  # the others do see it


def test_delta_equals_autograd_and_so_does_its_derivative(bank):
    z = draw(N, D).requires_grad_()
    u_b = normalise(draw(N, D, seed=2))
    (expected,) = torch.autograd.grad(bank_infonce(normalise(z), u_b, bank, QUERY_IDS).sum(), z, create_graph=True)
    delta = bank_delta(z, u_b, bank, QUERY_IDS)
    torch.testing.assert_close(delta, expected, **TIGHT)
    weight = draw(N, D, seed=4)
    (second,) = torch.autograd.grad((delta * weight).sum(), z)
    (second_expected,) = torch.autograd.grad((expected * weight).sum(), z)
    torch.testing.assert_close(second, second_expected, **TIGHT)


def test_delta_without_the_projection_would_fail(bank):
    """Negative control: forgetting the normalisation's Jacobian is seen."""
    z = draw(N, D).requires_grad_()
    u_b = normalise(draw(N, D, seed=2))
    (expected,) = torch.autograd.grad(bank_infonce(normalise(z), u_b, bank).sum(), z)
    u = normalise(z).detach().requires_grad_()
    (on_sphere,) = torch.autograd.grad(bank_infonce(u, u_b, bank).sum(), u)
    assert not torch.allclose(on_sphere, expected, rtol=1e-2)
    torch.testing.assert_close(through_normalisation(z, on_sphere), expected, **TIGHT)


def test_normalise_agrees_with_torch_and_is_finite_at_zero():
    z = draw(N, D)
    torch.testing.assert_close(normalise(z), torch.nn.functional.normalize(z, dim=-1), **TIGHT)
    for dtype in (torch.float32, torch.float64):
        zero = torch.zeros(1, D, dtype=dtype, requires_grad=True)
        u = normalise(zero)
        (first,) = torch.autograd.grad(u.sum(), zero, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), zero)
        assert number(u.abs().max()) == 0.0
        assert bool(torch.isfinite(first).all()) and bool(torch.isfinite(second).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_outputs_stay_finite(bank, dtype):
    small = Bank(bank.keys.to(dtype), bank.ids, TAU, bank.valid)
    z = torch.zeros(N, D, dtype=dtype, requires_grad=True)
    for partner in (torch.zeros(N, D, dtype=dtype), normalise(draw(N, D).to(dtype))):
        delta = bank_delta(z, partner, small, QUERY_IDS)
        (grad,) = torch.autograd.grad(delta.sum(), z)
        loss = bank_infonce(normalise(z), partner, small, QUERY_IDS)
        assert all(bool(torch.isfinite(t).all()) for t in (delta, grad, loss))


def fully_masked(kind: str) -> tuple[Bank, torch.Tensor]:
    keys = normalise(draw(K, D, seed=1))
    if kind == "invalid":
        return Bank(keys, torch.arange(K), TAU, torch.zeros(K, dtype=torch.bool)), torch.arange(100, 100 + N)
    if kind == "own":
        return Bank(keys, torch.full((K,), 9), TAU), torch.full((N,), 9)
    return Bank(keys[:0], torch.zeros(0, dtype=torch.int64), TAU), torch.arange(N)


@pytest.mark.parametrize("kind", ["invalid", "own", "no rows"])
def test_a_fully_masked_bank_gives_zero_loss_and_finite_gradients(kind):
    bank, ids = fully_masked(kind)
    z = draw(N, D).requires_grad_()
    u_b = normalise(draw(N, D, seed=2)).requires_grad_()
    u_a = normalise(z)
    loss, c = bank_infonce(u_a, u_b, bank, ids), confidence(u_a, u_b, bank, ids)
    delta, density = bank_delta(z, u_b, bank, ids), bank_density(u_a, bank, ids)
    assert number(loss.abs().max()) == 0.0 and number((c - 1).abs().max()) == 0.0
    assert number(delta.abs().max()) == 0.0 and number(density.abs().max()) == 0.0
    for value in (loss, c, delta):
        for grad in torch.autograd.grad(value.sum(), (z, u_b), retain_graph=True):
            assert number(grad.abs().max()) == 0.0
    (grad,) = torch.autograd.grad((density + (u_a * u_b).sum(-1)).sum(), z)
    assert bool(torch.isfinite(grad).all())


def test_one_fully_masked_query_leaves_the_others_alone():
    keys = normalise(draw(K, D, seed=1))
    bank = Bank(keys, torch.zeros(K, dtype=torch.int64), TAU)
    ids = torch.tensor([0, 1, 2, 3, 4])
    z = draw(N, D).requires_grad_()
    density = bank_density(normalise(z), bank, ids)
    (grad,) = torch.autograd.grad(density.sum(), z)
    assert number(density[0]) == 0.0 and number(grad[0].abs().max()) == 0.0
    torch.testing.assert_close(density[1:], bank_density(normalise(z), bank, None)[1:], **TIGHT)
    assert bool((grad[1:].abs().sum(-1) > 0).all())


def test_no_gradient_reaches_the_bank():
    live = draw(K, D).requires_grad_()
    with pytest.raises(AssertionError, match="detached"):
        Bank(live, torch.arange(K), TAU)


def test_branches_may_lead_the_shape(bank):
    z, partner = draw(2, N, D), normalise(draw(2, N, D, seed=2))
    both = bank_delta(z, partner, bank, QUERY_IDS)
    for v in range(2):
        torch.testing.assert_close(both[v], bank_delta(z[v], partner[v], bank, QUERY_IDS), **TIGHT)
    assert pair_logits(normalise(z), partner, bank, QUERY_IDS).shape == (2, N, 1 + K)


def test_a_tiny_loss_keeps_its_digits_in_float32():
    """A pair learned to 1e-6: the naive log-sum-exp minus s0 would be a multiple of 5e-7."""
    u = torch.zeros(1, D, dtype=torch.float64)
    u[0, 0] = 1
    far = Bank(-u.clone(), torch.tensor([7]), 0.14)
    exact = number(bank_infonce(u, u, far)[0])
    z = u * 3 + 0.01 * draw(1, D)
    assert 1e-7 < exact < 1e-6
    narrow = Bank(far.keys.float(), far.ids, far.temperature)
    assert number(bank_infonce(u.float(), u.float(), narrow)[0]) == pytest.approx(exact, abs=1.3e-7)
    delta = bank_delta(z, u, far)
    error = (bank_delta(z.float(), u.float(), narrow).double() - delta).norm()
    assert number(delta.norm()) < 1e-6 and number(error / delta.norm()) < 1e-5


def test_bfloat16_outputs_and_autocast_are_computed_in_float32(bank):
    z = draw(N, D).to(torch.bfloat16)
    u_b = normalise(draw(N, D, seed=2)).float()
    narrow = Bank(bank.keys.float(), bank.ids, TAU, bank.valid)
    plain = bank_delta(z.float(), u_b, narrow, QUERY_IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = bank_delta(z, u_b, narrow, QUERY_IDS)
        loss = bank_infonce(normalise(z), u_b, narrow, QUERY_IDS)
    assert cast.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(cast, plain, rtol=0.0, atol=0.0)
