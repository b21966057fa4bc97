"""Bank InfoNCE: a loss, a confidence and a gradient that belong to one sample alone.

In-batch contrastive losses couple the samples of a batch, so "the gradient of a sample" would change
with its batch-mates. Against a stop-gradient bank Q of retain keys it does not. Formulas (ours,
after InfoNCE, van den Oord et al. 2018, eq. 4, in the two-view form of NT-Xent), u = z / |z|:

    s0 = u_a . u_b / tau                                     the positive pair
    l  = 1/2 [ LSE(s0, u_a.Q / tau) + LSE(s0, u_b.Q / tau) ] - s0
    p^a = softmax([s0, u_a.Q / tau]),  c = 1/2 (p^a_0 + p^b_0)      confidence

    dl/du_a = 1/(2 tau) [ (p^a_0 - 1) u_b + sum_k p^a_k q_k + (p^b_0 - 1) u_b ]
    dl/dz_a = 1/|z_a| (I - u_a u_a^T) dl/du_a

Shapes: n = images, D = output dim, K = bank rows; leading dimensions (branches V) are free.
A bank row is masked (similarity -inf) if it is not valid or is the query's own image, by id.
With every row masked the positive is alone: l = 0, c = 1 and the gradient is 0.

Where the similarities [..., n, K] would take more than `budget` bytes, they are computed tile by tile (`tiles`). With
L^a = LSE(u_a.Q / tau) and r^a = softmax(u_a.Q / tau).Q over the bank alone, and 1 - p^a_0 = sigmoid(L^a - s0):

    l = 1/2 [ softplus(L^a - s0) + softplus(L^b - s0) ],    sum_k p^a_k q_k = sigmoid(L^a - s0) r^a

The same values to rounding. The tiled l can be differentiated once, bank_delta once as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from distunlearn.distributed.collectives import all_gather_uneven, gather_ids
from distunlearn.objectives.tiled_softmax import DEFAULT_BUDGET, Columns, SoftmaxMean, tile_size

# |z| is taken as sqrt(|z|^2 + EPS^2): smooth, so that an output of exactly zero has finite derivatives of
# all orders, and invisible at double precision as soon as |z| > 1.
EPS = 1e-8

# softplus(x) is taken as x above this: the difference, e^-x, is below the last digit of float64.
SOFTPLUS_LINEAR = 50.0


@dataclass(frozen=True, eq=False)
class Bank:
    """Negatives of the per-sample loss.

    keys: [K, D] normalised, without gradient. ids: int64 [K] id hashes.
    temperature: tau > 0. valid: bool [K]; rows that are False are ignored; None: all count.
    """

    keys: Tensor
    ids: Tensor
    temperature: float
    valid: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.keys.dim() == 2 and not self.keys.requires_grad, "bank keys are [K, D] and detached"
        assert self.ids.shape == self.keys.shape[:1] and self.ids.dtype == torch.int64, "one int64 id per bank key"
        assert self.valid is None or self.valid.shape == self.ids.shape, "one validity flag per bank key"
        assert self.temperature > 0, "the temperature is positive"

    @classmethod
    def gather(cls, keys: Tensor, ids: Tensor, temperature: float, sizes: Sequence[int] | None = None) -> Bank:
        """The bank made of all ranks' keys [m, D] and ids [m] (m may differ by rank), in rank order.

        sizes: m of every rank, if it is known.
        """
        return cls(all_gather_uneven(keys, sizes), gather_ids(ids, sizes), temperature)

    def masked(self, query_ids: Tensor | None) -> Tensor | None:
        """bool [n, K] (or [K] without query ids), True where a row must not count; None if all count."""
        masked = None if self.valid is None else ~self.valid
        if query_ids is None:
            return masked
        own = query_ids.unsqueeze(-1) == self.ids
        return own if masked is None else own | masked


def full_precision(x: Tensor) -> torch.autocast:
    """Context without autocast: similarities over a small tau are no place for bfloat16 products."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def widen(z: Tensor) -> Tensor:
    """Half precision as float32: squares of small numbers and small differences of large sums need its digits."""
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


def _length(z: Tensor) -> Tensor:
    return (z.square().sum(-1, keepdim=True) + EPS * EPS).sqrt()


def normalise(z: Tensor) -> Tensor:
    """u = z / |z| over the last dimension, at least in float32; 0 stays 0 with finite derivatives."""
    z = widen(z)
    return z / _length(z)


def through_normalisation(z: Tensor, grad_u: Tensor) -> Tensor:
    """Gradient with respect to z of a function whose gradient at u = normalise(z) is grad_u. [..., D]."""
    z = widen(z)
    length = _length(z)
    u = z / length
    return (grad_u - u * (u * grad_u).sum(-1, keepdim=True)) / length


def pair_logits(u: Tensor, partner: Tensor, bank: Bank, query_ids: Tensor | None = None) -> Tensor:
    """[s0, u.Q / tau]: similarity to the partner first, then to the bank; masked rows are -inf.

    u, partner: [..., n, D] normalised. query_ids: int64 [n]. Returns [..., n, 1 + K].
    """
    with full_precision(u):
        positive = (u * partner).sum(-1, keepdim=True)
        negatives = u @ bank.keys.to(u.dtype).T
        masked = bank.masked(query_ids)
        if masked is not None:
            negatives = negatives.masked_fill(masked, -torch.inf)
        return torch.cat([positive, negatives], dim=-1) / bank.temperature


def query_infonce(
    u: Tensor, partner: Tensor, bank: Bank, query_ids: Tensor | None = None, budget: int = DEFAULT_BUDGET
) -> Tensor:
    """LSE(s0, u.Q / tau) - s0 of the query side alone, [..., n] >= 0. u, partner: [..., n, D] normalised."""
    if _exceeds(u, bank, budget):
        return softplus(_margin(u, partner, bank, query_ids, budget)[0], threshold=SOFTPLUS_LINEAR)
    logits = pair_logits(u, partner, bank, query_ids)
    # s0 is subtracted before the exponentials: a well-learned pair has l near 0, which LSE(...) - s0 would round away.
    return (logits - logits[..., :1]).logsumexp(-1)


def bank_infonce(
    u_a: Tensor, u_b: Tensor, bank: Bank, query_ids: Tensor | None = None, budget: int = DEFAULT_BUDGET
) -> Tensor:
    """l of the module's formula, symmetric in a and b. u_a, u_b: [..., n, D] normalised. Returns [..., n] >= 0."""
    if _exceeds(u_a, bank, budget):
        sides = ((u_a, u_b), (u_b, u_a))
        return sum(query_infonce(u, partner, bank, query_ids, budget) for u, partner in sides) / 2  # type: ignore[return-value]
    logits_a = pair_logits(u_a, u_b, bank, query_ids)
    logits_b = pair_logits(u_b, u_a, bank, query_ids)
    positive = logits_a[..., :1]  # one number for both sides, subtracted before the exponentials as above
    return ((logits_a - positive).logsumexp(-1) + (logits_b - positive).logsumexp(-1)) / 2


def confidence(
    u_a: Tensor, u_b: Tensor, bank: Bank, query_ids: Tensor | None = None, budget: int = DEFAULT_BUDGET
) -> Tensor:
    """Probability in (0, 1] of finding the partner among the bank, averaged over both directions. [..., n]."""
    if _exceeds(u_a, bank, budget):
        sides = ((u_a, u_b), (u_b, u_a))
        return sum((-_margin(u, partner, bank, query_ids, budget)[0]).sigmoid() for u, partner in sides) / 2  # type: ignore[return-value]
    p_a = pair_logits(u_a, u_b, bank, query_ids).softmax(-1)
    p_b = pair_logits(u_b, u_a, bank, query_ids).softmax(-1)
    return (p_a[..., 0] + p_b[..., 0]) / 2


def bank_delta(
    z_a: Tensor, u_b: Tensor, bank: Bank, query_ids: Tensor | None = None, budget: int = DEFAULT_BUDGET
) -> Tensor:
    """Closed form of dl/dz_a, u_b held: exact, and differentiable in z_a and (if it has a graph) u_b.

    z_a: [..., n, D] raw outputs. u_b: [..., n, D] normalised partners. Returns [..., n, D].
    l is symmetric, so dl/dz_b is bank_delta(z_b, u_a, ...).
    """
    u_a = normalise(z_a)
    if _exceeds(u_a, bank, budget):
        margin_a, mean_a = _margin(u_a, u_b, bank, query_ids, budget)
        margin_b, _ = _margin(u_b, u_a, bank, query_ids, budget)
        missed_a, missed_b = (margin.sigmoid().unsqueeze(-1) for margin in (margin_a, margin_b))
        grad_u = (missed_a * mean_a - (missed_a + missed_b) * u_b) / (2 * bank.temperature)
        return through_normalisation(z_a, grad_u)
    p_a = pair_logits(u_a, u_b, bank, query_ids).softmax(-1)[..., 1:]
    p_b = pair_logits(u_b, u_a, bank, query_ids).softmax(-1)[..., 1:]
    # 1 - p_0 as the sum of the other probabilities: exact to the last digit even where p_0 rounds to 1.
    missed = p_a.sum(-1, keepdim=True) + p_b.sum(-1, keepdim=True)
    with full_precision(u_a):
        grad_u = (p_a @ bank.keys.to(u_a.dtype) - missed * u_b) / (2 * bank.temperature)
    return through_normalisation(z_a, grad_u)


def bank_density(u: Tensor, bank: Bank, query_ids: Tensor | None = None, budget: int = DEFAULT_BUDGET) -> Tensor:
    """How close a sample is to its nearest bank keys: tau * log mean_k exp(u.q_k / tau), masked rows left out.

    A soft maximum of cosines in [-1, 1] that does not grow with the size of the bank; 0 where all rows are
    masked. u: [..., n, D] normalised. Returns [..., n].
    """
    if bank.keys.shape[0] == 0:
        return u.new_zeros(u.shape[:-1])
    if _exceeds(u, bank, budget):
        lse, _ = _softmax_mean(u, bank, query_ids, budget)
        count = _num_counted(u, bank, query_ids)
        return (bank.temperature * (lse - count.clamp_min(1).to(u.dtype).log())).masked_fill(count == 0, 0.0)
    with full_precision(u):
        logits = u @ bank.keys.to(u.dtype).T / bank.temperature
    masked = bank.masked(query_ids)
    masked = torch.zeros_like(logits, dtype=torch.bool) if masked is None else masked.expand_as(logits)
    empty = masked.all(-1)
    # An all -inf row has no finite log-sum-exp gradient: such rows are computed unmasked and then set to 0.
    kept = logits.masked_fill(masked & ~empty.unsqueeze(-1), -torch.inf)
    count = (~masked).sum(-1).clamp_min(1).to(u.dtype)
    return (bank.temperature * (kept.logsumexp(-1) - count.log())).masked_fill(empty, 0.0)


def _exceeds(u: Tensor, bank: Bank, budget: int) -> bool:
    """Whether the similarities of queries u [..., n, D] to the bank would take more than `budget` bytes."""
    return u.shape[:-1].numel() * (1 + bank.keys.shape[0]) * u.element_size() > budget


def _softmax_mean(u: Tensor, bank: Bank, query_ids: Tensor | None, budget: int) -> tuple[Tensor, Tensor]:
    """L [..., n] (-inf where all rows are masked) and r [..., n, D] (0 there) of the module's text, in tiles."""
    flat = (u / bank.temperature).flatten(0, -2)
    ids = None if query_ids is None else query_ids.expand(u.shape[:-1]).flatten()
    columns = Columns(None, query_ids=ids, key_ids=None if ids is None else bank.ids, valid=bank.valid)
    with full_precision(u):
        lse, mean = SoftmaxMean.apply(flat, bank.keys.to(u.dtype), columns, tile_size(flat.device, budget))
    return lse.view(u.shape[:-1]), mean.view(u.shape)


def _margin(u: Tensor, partner: Tensor, bank: Bank, query_ids: Tensor | None, budget: int) -> tuple[Tensor, Tensor]:
    """L - s0 and r."""
    lse, mean = _softmax_mean(u, bank, query_ids, budget)
    return lse - (u * partner).sum(-1) / bank.temperature, mean


def _num_counted(u: Tensor, bank: Bank, query_ids: Tensor | None) -> Tensor:
    """Bank rows that count for each query, [..., n], without an [n, K] mask."""
    ids = bank.ids if bank.valid is None else bank.ids[bank.valid]
    if query_ids is None:
        return torch.full(u.shape[:-1], ids.shape[0], device=u.device)
    ordered = ids.sort().values
    own = torch.searchsorted(ordered, query_ids, right=True) - torch.searchsorted(ordered, query_ids)
    return (ids.shape[0] - own).expand(u.shape[:-1])
