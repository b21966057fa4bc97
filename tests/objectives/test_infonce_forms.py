"""Plain, tiled and ring form on one process: loops as oracle, equal gradients, bounded memory, the old code's bits."""

from __future__ import annotations

import math

import pytest
import torch
from parts import OBJECTIVES, objective_settings
from torch.utils._python_dispatch import TorchDispatchMode

from distunlearn.objectives import Bank, Branches, Objective, make_objective
from distunlearn.objectives.infonce import choose_form, infonce
from distunlearn.objectives.memory_bank import normalise
from distunlearn.objectives.simclr import nt_xent
from distunlearn.objectives.tiled_softmax import DEFAULT_BUDGET, Columns, SoftmaxMean, TiledInfoNCE

N, K, D, TAU = 7, 11, 5, 0.3
TIGHT = {"rtol": 0.0, "atol": 1e-12}
FORMS = [("tiled", 8), ("tiled", 150), ("tiled", 1 << 20), ("ring", 8), ("ring", 1 << 20)]  # form, bytes of a tile


def draw(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def all_masks() -> Columns:
    valid = torch.ones(K, dtype=torch.bool)
    valid[[1, 9]] = False  # 9 is a partner: it counts all the same
    return Columns(
        positive=torch.tensor([2, 9, 0, 4, 5, 10, 3]),
        own=torch.tensor([0, 1, 2, 3, 4, 6, 7]),
        query_ids=torch.tensor([0, 1, 2, 3, 0, 1, 9]),
        key_ids=torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]),
        valid=valid,
    )


MASKS = {
    "none": lambda: Columns(all_masks().positive),
    "own": lambda: Columns(all_masks().positive, own=all_masks().own),
    "roles": lambda: Columns(all_masks().positive, valid=all_masks().valid),
    "ids": lambda: Columns(all_masks().positive, query_ids=all_masks().query_ids, key_ids=all_masks().key_ids),
    "all": all_masks,
}


def oracle(queries, keys, c: Columns, tau) -> torch.Tensor:
    """The definition, one pair at a time."""
    losses = []
    for i, query in enumerate(queries):
        p, terms = int(c.positive[i]), []
        for k, key in enumerate(keys):
            same = c.key_ids is not None and c.key_ids[k] == c.query_ids[i]
            gone = same or (c.valid is not None and not c.valid[k])
            if c.own is not None and k == int(c.own[i]):
                continue
            if k == p or not gone:
                terms.append(((query * key).sum() / tau).exp())
        losses.append(sum(terms).log() - (query * keys[p]).sum() / tau)
    return torch.stack(losses)


def outcome(function) -> list[torch.Tensor]:
    """Loss and its gradients with respect to queries, keys and temperature, every row weighing otherwise."""
    queries, keys = draw(N, D).requires_grad_(), draw(K, D, seed=1).requires_grad_()
    tau = torch.tensor(TAU, dtype=torch.float64, requires_grad=True)
    loss = function(queries, keys, tau)
    return [loss.detach(), *torch.autograd.grad((loss * draw(N, seed=2)).sum(), (queries, keys, tau))]


@pytest.mark.parametrize(("form", "tile"), [("plain", 1), *FORMS])
@pytest.mark.parametrize("masks", MASKS)
def test_every_form_is_the_definition(masks, form, tile):
    columns = MASKS[masks]()
    expected = outcome(lambda q, k, tau: oracle(q, k, columns, tau))
    found = outcome(lambda q, k, tau: infonce(q, k, columns, tau, [K], budget=tile, form=form))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **TIGHT)


@pytest.mark.parametrize("masks", ["own", "roles", "ids"])
def test_the_masks_are_seen(masks):
    """Negative control: without its mask every form would be off."""
    expected = outcome(lambda q, k, tau: oracle(q, k, MASKS[masks](), tau))
    found = outcome(lambda q, k, tau: infonce(q, k, MASKS["none"](), tau, [K], form="tiled"))
    assert all((mine - theirs).abs().max() > 1e-3 for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("form", ["plain", "tiled", "ring"])
def test_leading_dimensions_are_losses_of_their_own(form):
    queries, keys = draw(2, N, D), draw(2, K, D, seed=1)
    both = infonce(queries, keys, all_masks(), TAU, [K], form=form)
    for v in range(2):
        torch.testing.assert_close(both[v], infonce(queries[v], keys[v], all_masks(), TAU, [K]), **TIGHT)


@pytest.mark.parametrize("form", ["plain", "tiled", "ring"])
def test_a_rank_without_queries_takes_part(form):
    queries, keys = draw(0, D).requires_grad_(), draw(K, D, seed=1).requires_grad_()
    none = torch.zeros(0, dtype=torch.int64)
    loss = infonce(queries, keys, Columns(none, own=none), TAU, [K], form=form)
    assert loss.shape == (0,)
    assert all(grad.abs().sum() == 0 for grad in torch.autograd.grad(loss.sum(), (queries, keys)))


def test_derivatives():
    args = draw(3, 2).requires_grad_(), draw(4, 2, seed=1).requires_grad_()
    columns = Columns(torch.tensor([1, 0, 3]), own=torch.tensor([0, 1, 2]))
    assert torch.autograd.gradcheck(lambda q, k: TiledInfoNCE.apply(q, k, columns, None, 32), args)
    assert torch.autograd.gradcheck(lambda q: SoftmaxMean.apply(q, args[1].detach(), Columns(None), 32), args[:1])


@pytest.mark.parametrize("form", ["tiled", "ring"])
def test_a_second_derivative_is_refused(form):
    queries = draw(N, D).requires_grad_()
    (first,) = torch.autograd.grad(
        infonce(queries, draw(K, D), all_masks(), TAU, [K], form=form).sum(), queries, create_graph=True
    )
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), queries)


@pytest.mark.parametrize("form", ["plain", "tiled"])
def test_similarities_far_apart_neither_overflow_nor_vanish(form):
    queries, keys = normalise(draw(N, D, dtype=torch.float32)), normalise(draw(K, D, seed=1, dtype=torch.float32))
    queries.requires_grad_()
    loss = infonce(queries, keys, all_masks(), 1e-3, [K], form=form, budget=32)
    (grad,) = torch.autograd.grad(loss.sum(), queries)
    assert bool(torch.isfinite(loss).all() & torch.isfinite(grad).all())
    assert float(loss.detach().max()) > 500  # exp of it is not a float32


def test_autocast_does_not_reach_the_similarities():
    queries, keys = draw(N, D, dtype=torch.float32).requires_grad_(), draw(K, D, seed=1, dtype=torch.float32)
    plain = infonce(queries, keys, all_masks(), TAU, [K], form="tiled")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = infonce(queries, keys, all_masks(), TAU, [K], form="tiled")
        (grad,) = torch.autograd.grad(cast.sum(), queries)
    assert torch.equal(cast, plain) and torch.equal(grad, torch.autograd.grad(plain.sum(), queries)[0])


# -- memory and choice of the form -------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("form", ["plain", "tiled", "ring"])
def test_no_tensor_of_the_tiled_forms_is_larger_than_its_inputs_or_a_tile(form):
    output = draw(2, 200, D).requires_grad_()
    tile = 64 * 64
    with Largest() as largest:
        nt_xent(output, TAU, tile * 8, form).backward()
    similarities, inputs = 400 * 400, 400 * D
    assert largest.elements == similarities if form == "plain" else largest.elements <= max(inputs, tile)


@pytest.mark.parametrize("form", ["plain", "tiled"])
def test_id_and_role_masks_are_made_tile_by_tile(form):
    count, tile = 300, 32 * 32
    ids = torch.arange(count) // 2
    columns = Columns(torch.arange(count), query_ids=ids, key_ids=ids, valid=ids % 3 > 0)
    queries = draw(count, 2).requires_grad_()
    with Largest() as largest:
        infonce(queries, draw(count, 2, seed=1), columns, TAU, [count], budget=tile * 8, form=form).sum().backward()
    assert largest.elements == count**2 if form == "plain" else largest.elements <= tile


def test_the_budget_chooses_the_form():
    queries = draw(10, 4)  # 8 bytes a number
    similarities, gathered = 10 * 30 * 8, 30 * 4 * 8
    assert choose_form(queries, [10, 10, 10], similarities) == "plain"
    assert choose_form(queries, [10, 10, 10], similarities - 1) == "tiled"
    assert choose_form(queries, [10, 10, 10], gathered) == "tiled"
    assert choose_form(queries, [10, 10, 10], gathered - 1) == "ring"
    assert choose_form(queries, [30], 1) == "tiled"  # one process has no ring
    assert choose_form(queries[:0], [0, 20, 10], gathered - 1) == "ring"  # all ranks agree, also one without queries
    assert choose_form(draw(2, 10, 4), [30], 2 * similarities - 1) == "tiled"  # views count
    assert choose_form(draw(2 * 2048, 64), [2 * 2048], DEFAULT_BUDGET) == "plain"


def test_the_setting_reaches_the_objective():
    assert make_objective(objective_settings()).budget == DEFAULT_BUDGET
    for name in (name for name, kind in OBJECTIVES.items() if kind.uses_bank):
        assert make_objective(objective_settings(name=name, similarity_mib=0.5)).budget == 1 << 19
    assert make_objective(objective_settings(similarity_mib=1e-9)).budget == 1


# -- the objectives ----------------------------------------------------------------------------------------------


def old_nt_xent(output: torch.Tensor, temperature: float) -> torch.Tensor:
    """The plain loss as it was before it had other forms."""
    u = normalise(output).transpose(0, 1)
    everyone = u.contiguous().flatten(0, 1)
    mine = u.flatten(0, 1)
    own = torch.arange(mine.shape[0])
    logits = mine @ everyone.T / temperature
    logits = logits.scatter(1, own.unsqueeze(1), -torch.inf)
    positive = logits.gather(1, (own ^ 1).unsqueeze(1)).squeeze(1)
    return (logits.logsumexp(1) - positive).sum() * (1 / u.shape[0]) / 2


def old_mocov3(z: torch.Tensor, key: torch.Tensor, temperature: float) -> torch.Tensor:
    everyone = key.transpose(0, 1).contiguous().transpose(0, 1)
    own = torch.arange(z.shape[1])
    logits = normalise(z) @ everyone.transpose(1, 2) / temperature
    losses = logits.logsumexp(2) - logits.gather(2, own.expand(2, -1).unsqueeze(2)).squeeze(2)
    return 2 * temperature * losses.sum() * (1 / z.shape[1])


@pytest.mark.parametrize("name", ["simclr", "mocov3"])
@pytest.mark.parametrize("count", [3, 128])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_the_plain_form_is_the_formula_step_by_step(name, count, dtype, close):
    """By another kernel than log-sum-exp less the partner: the last digits differ, nothing else."""
    output = draw(2, count, 64, dtype=dtype).requires_grad_()
    target = draw(2, count, 64, seed=1, dtype=dtype)
    b = Branches(output, output.detach(), target=target, ids=torch.arange(count))
    now = make_objective(objective_settings(name, temperature=0.2)).task_loss(b)
    then = old_nt_xent(output, 0.2) if name == "simclr" else old_mocov3(output, normalise(target), 0.2)
    assert abs(float((now / then).detach()) - 1) <= close
    found, expected = (torch.autograd.grad(loss, output)[0] for loss in (now, then))
    assert float((found - expected).norm() / expected.norm()) <= close


def within(name: str, temperature: float, budget: int = DEFAULT_BUDGET) -> Objective:
    """The objective with so many bytes for its similarities."""
    return make_objective(objective_settings(name, temperature=temperature, similarity_mib=budget / 2**20))


def branches_and_bank(name: str) -> tuple[Branches, Bank]:
    objective = OBJECTIVES[name]
    shape = (objective.branches, N, D)
    b = Branches(
        output=(2 * draw(*shape)).requires_grad_(),
        hidden=draw(objective.branches, N, 4, seed=1),
        target=draw(*shape, seed=2) if objective.needs_momentum else None,
        labels=torch.arange(N) % D,
        ids=torch.tensor([0, 1, 2, 3, 7, 8, 50]),
    )
    valid = torch.ones(K, dtype=torch.bool)
    valid[4] = False
    ids = torch.tensor([100, 101, 7, 0, 1, 103, 104, 1, 0, 7, 105])
    return b, Bank(normalise(draw(K, D, seed=5)), ids, TAU, valid)


@pytest.mark.parametrize("budget", [1, 300])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if OBJECTIVES[name].uses_bank])
@pytest.mark.parametrize("what", ["task_loss", "per_sample_loss", "per_sample_delta", "confidence", "output_features"])
def test_objectives_within_a_small_budget(name, what, budget):
    """Values and gradients, of the closed-form gradient too; by dispatch, no matrix of similarities is made."""
    b, bank = branches_and_bank(name)
    wide, small = within(name, TAU), within(name, TAU, budget)
    expected = getattr(wide, what)(b, bank)
    weight = draw(*expected.shape, seed=9)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), b.output)
    with Largest() as largest:
        found = getattr(small, what)(b, bank)
        (found_grad,) = torch.autograd.grad((found * weight).sum(), b.output)
    torch.testing.assert_close(found, expected, **TIGHT)
    torch.testing.assert_close(found_grad, expected_grad, rtol=0.0, atol=1e-11)
    assert expected_grad.abs().max() > 1e-3
    assert largest.elements <= max(b.output.numel(), bank.keys.numel())


@pytest.mark.parametrize("kind", ["invalid", "own", "one query"])
def test_a_masked_bank_in_tiles_gives_zero_loss_and_finite_gradients(kind):
    b, _ = branches_and_bank("simclr")
    keys = normalise(draw(K, D, seed=5))
    if kind == "invalid":
        bank = Bank(keys, torch.arange(K) + 500, TAU, torch.zeros(K, dtype=torch.bool))
    else:
        bank = Bank(keys, torch.zeros(K, dtype=torch.int64), TAU)
        b = b._replace(ids=torch.zeros(N, dtype=torch.int64) if kind == "own" else torch.arange(N))
    wide, small = within("simclr", TAU), within("simclr", TAU, 1)
    for what in ("per_sample_loss", "per_sample_delta", "confidence", "output_features"):
        expected, found = (getattr(objective, what)(b, bank) for objective in (wide, small))
        torch.testing.assert_close(found, expected, **TIGHT)
        grads = [torch.autograd.grad(value.sum(), b.output, allow_unused=True)[0] for value in (found, expected)]
        assert bool(torch.isfinite(grads[0]).all())
        torch.testing.assert_close(*grads, **TIGHT)
    assert small.per_sample_loss(b, bank)[0] == 0


def test_a_tiny_loss_keeps_its_digits_in_tiles():
    u = torch.zeros(1, D)
    u[0, 0] = 1
    exact = math.log1p(math.exp(-2 / 0.14))
    b = Branches(u.expand(2, 1, D), u.expand(2, 1, D), ids=torch.tensor([0]))
    loss = within("simclr", 0.14, 1).per_sample_loss(b, Bank(-u, torch.tensor([7]), 0.14))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("form", ["plain", "tiled", "ring"])
def test_two_towers_are_the_cross_entropy_of_both_directions(form):
    """Two directions at once, with a temperature that has a graph, against two cross-entropies."""
    image, text = draw(N, D).requires_grad_(), draw(N, D, seed=1).requires_grad_()
    tau = torch.tensor(TAU, dtype=torch.float64, requires_grad=True)
    logits = torch.nn.functional.normalize(image) @ torch.nn.functional.normalize(text).T / tau
    cross_entropy = torch.nn.functional.cross_entropy
    expected = (cross_entropy(logits, torch.arange(N)) + cross_entropy(logits.T, torch.arange(N))) / 2
    u, v = (torch.nn.functional.normalize(z) for z in (image, text))
    losses = infonce(
        torch.stack([u, v]), torch.stack([v, u]), Columns(torch.arange(N)), tau, [N], form=form, budget=100
    )
    found = losses.mean()
    torch.testing.assert_close(found, expected, **TIGHT)
    pairs = zip(*(torch.autograd.grad(loss, (image, text, tau)) for loss in (found, expected)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, **TIGHT)
