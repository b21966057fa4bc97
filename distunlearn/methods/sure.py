"""sure: a classifier learns to tell forget from third-party images by their embeddings, and the encoder to prevent it.

    D = 1/2 mean_{forget} -log s(c(h(x))) + 1/2 mean_{third party} -log(1 - s(c(h(x))))
    classifier c minimises D; encoder minimises L_utility(retain) - forget_weight * D

by gradient reversal: one backward, in which the gradient of D changes its sign on the way into the encoder. h is the
embedding as a unit vector, s the logistic function, c a perceptron with one hidden layer of `critic_width`, trained by
Adam at `critic_lr` on the embeddings of all processes, so that every process holds the same classifier.

Our reading of SURE (ICLR 2025: domain-adversarial training on representations between forget and unseen data, of which
no code was at hand); the reversal and the loss are those of Ganin et al., "Domain-Adversarial Training of Neural
Networks", JMLR 2016, eq. 9 and section 4.2. Guarantee: empirical.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from distunlearn.config.schema import RunConfig
from distunlearn.data.schedule import Batch, concat_batches
from distunlearn.distributed.collectives import all_gather_uneven, all_reduce_mean
from distunlearn.methods.base import Stateless, StepOutput, unlearn_batches
from distunlearn.methods.embeddings import directions
from distunlearn.methods.training import enqueue, utility
from distunlearn.objectives.base import Objective
from distunlearn.objectives.forward import Context, image_mean

__all__ = ["Critic", "Sure", "domain_losses", "reverse"]


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * grad, None


def reverse(x: Tensor, weight: float) -> Tensor:
    """x itself, whose gradient is turned round and multiplied by `weight` (Ganin et al. 2016, eq. 17)."""
    return _Reverse.apply(x, weight)


def domain_losses(scores: Tensor, forget: bool) -> Tensor:
    """-log s(score) for forget images, -log(1 - s(score)) for strangers, averaged over the views: [V, n] -> [n]."""
    return softplus(-scores if forget else scores).mean(0)


class Critic:
    """The domain classifier with its optimizer: [..., E] -> scores [...], above 0 for "forget"."""

    def __init__(self, width: int, rate: float, seed: int) -> None:
        self.width, self.rate, self.seed = width, rate, seed
        self.net: nn.Sequential | None = None
        self.optimizer: torch.optim.Adam | None = None
        self._saved: dict[str, Tensor] = {}  # of a resumed run, until the first scores tell the device

    def _build(self, dim: int, like: Tensor) -> None:
        """Fresh weights, a function of the seed and E, or the saved ones, on `like`'s device and in its precision."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            net = nn.Sequential(nn.Linear(dim, self.width), nn.LeakyReLU(0.1), nn.Linear(self.width, 1))
        self.net = net.to(like.device, like.dtype)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=self.rate)
        if self._saved:
            self._restore()

    def scores(self, h: Tensor) -> Tensor:
        """With the weights of now, held constant: a later `learn` does not disturb the backward."""
        if self.net is None:
            self._build(h.shape[-1], h)
        constant = {name: weight.detach().clone() for name, weight in self.net.named_parameters()}
        return torch.func.functional_call(self.net, constant, h).squeeze(-1)

    def learn(self, forget: Tensor, strangers: Tensor) -> float:
        """One step of Adam on D over embeddings [n, V, E] of all ranks; returns the share told rightly before it."""
        assert self.net is not None and self.optimizer is not None, "scores come first"
        with torch.enable_grad():
            f, s = (self.net(h.detach().transpose(0, 1)).squeeze(-1) for h in (forget, strangers))
            (domain_losses(f, True).mean() / 2 + domain_losses(s, False).mean() / 2).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(((f > 0).double().mean() + (s <= 0).double().mean()) / 2)

    def state_dict(self) -> dict[str, Tensor]:
        if self.net is None:
            return dict(self._saved)
        state = {f"net.{name}": value.cpu().clone() for name, value in self.net.state_dict().items()}
        for row, entries in self.optimizer.state_dict()["state"].items():
            state |= {f"adam.{row}.{key}": value.cpu().clone() for key, value in entries.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.net, self.optimizer = None, None
        self._saved = {key: value.clone() for key, value in state.items()}

    def _restore(self) -> None:
        weights, memory = {}, {}
        for key, value in self._saved.items():
            kind, _, rest = key.partition(".")
            if kind == "net":
                weights[rest] = value
            else:
                row, _, entry = rest.partition(".")
                memory.setdefault(int(row), {})[entry] = value
        self.net.load_state_dict(weights)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": memory})
        self._saved = {}


class Sure(Stateless):
    """See the module's text. State: the classifier and its optimizer."""

    name = "sure"
    forgets = True

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        self.critic = Critic(cfg.method.critic_width, cfg.method.critic_lr, cfg.seed)

    def batch_sizes(self, cfg: RunConfig) -> Mapping[str, int]:
        return unlearn_batches(cfg, "retain", "forget", "third_party")

    def images_per_step(self, cfg: RunConfig, objective: Objective, step: int) -> int:
        sizes, momentum = cfg.unlearn, 2 if objective.needs_momentum else 1
        return objective.branches * (momentum * sizes.retain_batch + sizes.forget_batch + sizes.third_party_batch)

    def loss(self, ctx: Context, batches: Mapping[str, Batch]) -> StepOutput:
        retain, forget, third = batches["retain"], batches["forget"], batches["third_party"]
        task, retained = utility(ctx, retain)
        h = directions(ctx, concat_batches(forget, third))
        scores = self.critic.scores(reverse(h, self.cfg.method.forget_weight))
        known, strange = scores[:, : len(forget)], scores[:, len(forget) :]
        domain = image_mean(domain_losses(known, True)) / 2 + image_mean(domain_losses(strange, False)) / 2
        rows = h.transpose(0, 1)
        told = self.critic.learn(all_gather_uneven(rows[: len(forget)]), all_gather_uneven(rows[len(forget) :]))
        enqueue(ctx, retained)
        metrics = {
            "utility": float(task.detach()),
            "domain_loss": float(all_reduce_mean(domain.detach())),
            "domain_accuracy": told,
        }
        consumed = {"retain": retain.ids, "forget": forget.ids, "third_party": third.ids}
        return StepOutput(task + domain, metrics, consumed)

    def state_dict(self) -> dict[str, Tensor]:
        return self.critic.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.critic.load_state_dict(state)
