"""sure: a classifier learns to tell forget from third-party images by their embeddings, and the encoder to prevent it.

    D = 1/2 mean_{forget} -log s(c(h(x))) + 1/2 mean_{third party} -log(1 - s(c(h(x))))
    classifier c minimises D; encoder minimises L_task(retain) - forget_weight * D

by gradient reversal: one backward, in which the gradient of D changes its sign on the way into the encoder. h is the
embedding as a unit vector, s the logistic function, c a perceptron with one hidden layer of `critic_width`, trained by
Adam at `critic_lr` on the embeddings of all processes, so that every process holds the same classifier.

Our reading of SURE (ICLR 2025: domain-adversarial training on representations between forget and unseen data, of which
no code was at hand); the reversal and the loss are those of Ganin et al., "Domain-Adversarial Training of Neural
Networks", JMLR 2016, eq. 9 and section 4.2. Guarantee: empirical.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from distunlearn.config.schema import MethodConfig, NonNegativeFloat, PositiveFloat, PositiveInt, RunConfig
from distunlearn.data.schedule import Batch, concat_batches
from distunlearn.distributed.collectives import all_gather_uneven, all_reduce_mean
from distunlearn.methods.base import Method, StepOutput
from distunlearn.methods.embeddings import directions
from distunlearn.methods.search_space import Log
from distunlearn.methods.training import enqueue, task_loss
from distunlearn.objectives.forward import Context, image_mean


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
        kept = (like.device.type, like.dtype) == ("cpu", torch.float32)
        self.net = net if kept else net.to(like.device, like.dtype)
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
        weights: dict[str, Tensor] = {}
        memory: dict[int, dict[str, Tensor]] = {}
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


@dataclass(frozen=True, kw_only=True)
class SureConfig(MethodConfig):
    """Weight and classifier."""

    name: str = "sure"
    forget_weight: NonNegativeFloat = 1.0  # of the reversed gradient of the classifier's loss
    critic_width: PositiveInt = 64  # hidden units of the domain classifier
    critic_lr: PositiveFloat = 1e-3  # its learning rate


class Sure(Method[SureConfig]):
    """See the module's text. State: the classifier and its optimizer."""

    name = "sure"
    Config = SureConfig
    moves = "little"
    summary = "a classifier cannot tell forget from third-party embeddings"
    report = (
        "an opponent tries to tell the forgotten images from images never seen, and the encoder learns to prevent it"
    )
    needs = ("retain", "forget", "third_party")
    space = {
        "unlearn.lr": Log(5e-5, 5e-3),
        "method.forget_weight": Log(0.1, 10.0),
        "method.critic_lr": Log(1e-4, 1e-2),
    }

    def __init__(self, cfg: RunConfig) -> None:
        super().__init__(cfg)
        self.critic = Critic(self.settings.critic_width, self.settings.critic_lr, cfg.seed)

    def loss(self, ctx: Context, batches: Mapping[str, Batch]) -> StepOutput:
        retain, forget, third = batches["retain"], batches["forget"], batches["third_party"]
        task, retained = task_loss(ctx, retain)
        h = directions(ctx, concat_batches(forget, third))
        scores = self.critic.scores(reverse(h, self.settings.forget_weight))
        known, strange = scores[:, : len(forget)], scores[:, len(forget) :]
        domain = image_mean(domain_losses(known, True), forget.sizes) / 2
        domain = domain + image_mean(domain_losses(strange, False), third.sizes) / 2
        rows = h.transpose(0, 1)
        parts = ((rows[: len(forget)], forget.sizes), (rows[len(forget) :], third.sizes))
        told = self.critic.learn(*(all_gather_uneven(*part) for part in parts))
        enqueue(ctx, retained)
        metrics: dict[str, float | Tensor] = {
            "task_loss": task.detach(),
            "domain_loss": all_reduce_mean(domain.detach()),
            "domain_accuracy": told,
        }
        consumed = {"retain": retain.ids, "forget": forget.ids, "third_party": third.ids}
        return StepOutput(task + domain, metrics, consumed)

    def state_dict(self) -> dict[str, Tensor]:
        return self.critic.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.critic.load_state_dict(state)
