"""Closed-form head gradients against torch.func in float64, their sketch, and their derivatives."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from distunlearn.constraints.gradients.last_layer import (
    NORM_FLOOR,
    HeadGradients,
    gradient_features,
    head_gradients,
    sketch_matrices,
)

N, HD, D, K = 6, 7, 5, 9


def two_view_loss(z: torch.Tensor, bank: torch.Tensor, tau: float = 0.2) -> torch.Tensor:
    """Bank InfoNCE of one sample from its raw outputs [V, D], written anew from the formula; V is 1 or 2."""
    u = z / z.norm(dim=-1, keepdim=True)
    partner = u[1] if len(u) == 2 else bank[0]
    s0 = (u[0] * partner).sum() / tau
    loss = torch.logsumexp(torch.cat([s0[None], bank[1:] @ u[0] / tau]), 0) - s0
    if len(u) == 2:
        loss = (loss + torch.logsumexp(torch.cat([s0[None], bank[1:] @ u[1] / tau]), 0) - s0) / 2
    return loss


def problem(views: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(HD, D, dtype=torch.float64)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
    hidden = torch.randn(views, N, HD, generator=g, dtype=torch.float64)
    bank = torch.nn.functional.normalize(torch.randn(K, D, generator=g, dtype=torch.float64), dim=-1)
    return head, hidden, bank


def oracle(head, hidden, bank) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-sample gradients by vmap(grad): weight [n, D, Hd], bias [n, D]."""
    params = {k: v.detach() for k, v in head.named_parameters()}

    def loss(params, h):
        return two_view_loss(functional_call(head, params, (h,)), bank)

    gradients = vmap(grad(loss), in_dims=(None, 1))(params, hidden)
    return gradients["weight"], gradients["bias"]


def closed_form(head, hidden, bank) -> HeadGradients:
    """delta by autograd on the outputs alone, as an objective's closed form gives it."""
    z = head(hidden).detach()
    delta = vmap(grad(lambda one: two_view_loss(one, bank)), in_dims=1, out_dims=1)(z)
    return head_gradients(hidden, delta)


@pytest.mark.parametrize("views", [1, 2])
def test_norms_and_sketch_equal_torch_func_in_float64(views):
    head, hidden, bank = problem(views)
    weight, bias = oracle(head, hidden, bank)
    gradients = closed_form(head, hidden, bank)
    out, inn = sketch_matrices(0, 3, D, HD, 4, 3, dtype=torch.float64)
    expected = torch.einsum("od,ndh,ih->noi", out, weight, inn).flatten(1)
    close = {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close(gradients.squared_norm(), weight.square().sum((1, 2)), **close)
    torch.testing.assert_close(gradients.norm(), weight.flatten(1).norm(dim=1), **close)
    torch.testing.assert_close(gradients.log_norm(), weight.flatten(1).norm(dim=1).log(), **close)
    torch.testing.assert_close(gradients.sketch(out, inn), expected, **close)


def test_leaving_out_the_cross_term_of_the_views_is_noticed():
    """Negative control: |delta_a|^2 |h_a|^2 + |delta_b|^2 |h_b|^2 alone is not the norm."""
    head, hidden, bank = problem(2)
    weight, _ = oracle(head, hidden, bank)
    gradients = closed_form(head, hidden, bank)
    without = (gradients.delta.square().sum(-1) * gradients.hidden.square().sum(-1)).sum(0)
    assert ((without - weight.square().sum((1, 2))).abs() / without).max() > 1e-2


def test_no_matrix_per_sample_is_formed():
    """Every tensor that appears stays far below n * D * Hd numbers."""
    n, width, sizes = 64, 64, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t))
            return out

    with Watch():
        g = head_gradients(torch.ones(2, n, width), torch.ones(2, n, width))
        g.norm(), g.log_norm()
        g.sketch(torch.ones(8, width), torch.ones(8, width))
    assert 0 < max(sizes) <= 4 * n * width < n * width * width


def test_the_sketch_is_unbiased_for_the_squared_norm():
    """E |S|^2 = |G|^2 over draws, within four standard errors, and the spread is that of the theory for rank 1."""
    head, hidden, bank = problem(1)
    gradients = closed_form(head, hidden, bank)
    ratios = []
    for step in range(3000):
        out, inn = sketch_matrices(7, step, D, HD, 8, 8, dtype=torch.float64)
        ratios.append(gradients.sketch(out, inn).square().sum(1) / gradients.squared_norm())
    ratios = torch.stack(ratios)
    error = ratios.std(0) / len(ratios) ** 0.5
    assert ((ratios.mean(0) - 1).abs() < 4 * error).all()
    theory = ((1 + 2 / 8) * (1 + 2 / 8) - 1) ** 0.5
    assert ratios.std(0).mean().item() == pytest.approx(theory, rel=0.15)


def test_sketch_inner_products_are_unbiased_for_gradient_inner_products():
    head, hidden, bank = problem(2)
    weight, _ = oracle(head, hidden, bank)
    expected = (weight[0] * weight[1]).sum()
    gradients = closed_form(head, hidden, bank)
    products = []
    for step in range(3000):
        s = gradients.sketch(*sketch_matrices(1, step, D, HD, 8, 8, dtype=torch.float64))
        products.append((s[0] * s[1]).sum())
    products = torch.stack(products)
    assert abs(products.mean() - expected) < 4 * products.std() / len(products) ** 0.5


def test_sketch_matrices_are_a_function_of_seed_and_step_only():
    torch.manual_seed(0)
    first, before = sketch_matrices(0, 1, D, HD, 4, 3), torch.get_rng_state()
    again = sketch_matrices(0, 1, D, HD, 4, 3)
    assert first[0].shape == (4, D) and first[1].shape == (3, HD) and first[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    for other in (sketch_matrices(0, 2, D, HD, 4, 3), sketch_matrices(1, 1, D, HD, 4, 3)):
        assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


@pytest.mark.parametrize("views", [1, 2])
def test_derivatives_of_norm_log_norm_and_sketch(views):
    head, hidden, bank = problem(views)
    delta = closed_form(head, hidden, bank).delta.detach().requires_grad_()
    hidden = hidden.requires_grad_()
    out, inn = sketch_matrices(0, 0, D, HD, 2, 2, dtype=torch.float64)

    def features(h, d):
        g = head_gradients(h, d)
        return gradient_features(g, out, inn), g.norm()

    assert torch.autograd.gradcheck(features, (hidden, delta))


def test_derivative_with_respect_to_the_weight_equals_double_backward():
    """d |G_i|^2 / d W through delta(z(W)): one backward against the gradient of torch.func's gradient."""
    head, hidden, bank = problem(2)

    def by_torch_func(weight):
        def loss(w, h):
            return two_view_loss(h @ w.T + head.bias.detach(), bank)

        return vmap(grad(loss), in_dims=(None, 1))(weight, hidden).square().sum()

    expected = torch.func.grad(by_torch_func)(head.weight.detach())
    z = head(hidden)
    u = z / z.norm(dim=-1, keepdim=True)
    tau = 0.2
    s0 = (u[0] * u[1]).sum(-1, keepdim=True) / tau
    p = [torch.cat([s0, u[v] @ bank[1:].T / tau], dim=1).softmax(1) for v in range(2)]
    # delta of the two-view bank loss in closed form, differentiable in z
    shared = p[0][:, :1] + p[1][:, :1] - 2
    du = [(shared * u[1 - v] + p[v][:, 1:] @ bank[1:]) / (2 * tau) for v in range(2)]
    tangent = [du[v] - (du[v] * u[v]).sum(1, keepdim=True) * u[v] for v in range(2)]
    delta = torch.stack(tangent) / z.norm(dim=-1, keepdim=True)
    (got,) = torch.autograd.grad(head_gradients(hidden, delta).squared_norm().sum(), head.weight)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)


def test_a_zero_gradient_has_finite_features_and_derivatives():
    hidden = torch.randn(2, 3, HD, dtype=torch.float64, requires_grad=True)
    delta = torch.zeros(2, 3, D, dtype=torch.float64, requires_grad=True)
    g = head_gradients(hidden, delta)
    assert torch.equal(g.norm(), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(g.log_norm().exp(), torch.full((3,), NORM_FLOOR, dtype=torch.float64))
    (g.norm() + g.log_norm()).sum().backward()
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(delta.grad).all()


def test_opposite_views_that_cancel_never_give_a_negative_square():
    h, d = torch.randn(1, 50, HD), torch.randn(1, 50, D)
    g = head_gradients(h.repeat(2, 1, 1), torch.cat([d, -d]))
    assert (g.squared_norm() >= 0).all() and torch.isfinite(g.log_norm()).all()


def test_not_a_number_is_not_hidden():
    hidden, delta = torch.ones(1, 2, HD), torch.ones(1, 2, D)
    delta[0, 1, 0] = torch.nan
    g = head_gradients(hidden, delta)
    for value in (g.norm(), g.log_norm()):
        assert torch.isfinite(value[0]) and torch.isnan(value[1])


def test_half_precision_and_autocast_compute_in_float32():
    hidden, delta = torch.randn(2, 4, HD), torch.randn(2, 4, D)
    out, inn = sketch_matrices(0, 0, D, HD, 4, 4)
    expected = gradient_features(head_gradients(hidden, delta), out, inn)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gradient_features(head_gradients(hidden, delta), out, inn), expected)
    assert head_gradients(hidden.bfloat16(), delta.bfloat16()).norm().dtype == torch.float32


def test_features_are_log_norm_and_sketch():
    head, hidden, bank = problem(2)
    g = closed_form(head, hidden, bank)
    out, inn = sketch_matrices(0, 0, D, HD, 2, 3, dtype=torch.float64)
    features = gradient_features(g, out, inn)
    assert features.shape == (N, 7)
    torch.testing.assert_close(features[:, 0], g.norm().log())
    torch.testing.assert_close(features[:, 1:], g.sketch(out, inn))


def test_no_samples_give_no_features():
    g = head_gradients(torch.zeros(2, 0, HD), torch.zeros(2, 0, D))
    assert gradient_features(g, *sketch_matrices(0, 0, D, HD, 2, 2)).shape == (0, 5)
