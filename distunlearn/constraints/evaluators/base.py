"""The interface of the evaluators, and what those with signed copies share.

An evaluator reaches the per-sample gradients g_i and describes them by features (`Evaluator.features`). Who compares
them gives back Phi with its gradient in the features, and from that the evaluator makes the term whose gradient in the
weights is that of Phi (`Features.pull`). It runs the forwards of forgotten and third-party images itself, because how
often, and with what added to the activations, is what evaluators differ in. All passes use running statistics in batch
norms: with batch statistics a sample's loss would depend on its batch mates and on its own signed copies.

Shapes: n = samples, k = features, V = branches, N = forget and third-party samples of this rank, forget first.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from distunlearn.config.registry import EVALUATOR, find
from distunlearn.config.schema import ConstraintConfig, Pattern, PositiveFloat, PositiveInt, RunConfig
from distunlearn.constraints.gradients.shared_activations import shared_pattern
from distunlearn.data.schedule import Batch
from distunlearn.distributed.collectives import all_reduce_mean
from distunlearn.errors import ConfigError, NumericsError
from distunlearn.objectives.base import Branches
from distunlearn.objectives.forward import Context, view_pair
from distunlearn.objectives.memory_bank import Bank

CHECKED_CHANGE = 0.05  # a finite difference that changes by more than this with half the step is not to be trusted
CALIBRATION_CHUNK = 256  # images of one first pass over a whole role


class Constrained(NamedTuple):
    """What one step of an evaluator gives.

    phi: distance or penalty, a scalar without graph.
    term: scalar of the same value (0 while the term is off); its gradient, averaged over ranks, is that of Phi.
    forget, third: branches with graph, by pair of views, for all terms on outputs. Where an evaluator shows forgotten
        images only as signed copies, both copies are listed: their mean is the output, up to the square of the step.
    metrics: figures to log.
    places: tensors of the forgotten images through which the term's gradient reaches the encoder; without a gradient
        at any of them nothing would be forgotten.
    """

    phi: Tensor
    term: Tensor
    forget: list[Branches]
    third: list[Branches]
    metrics: Mapping[str, float | Tensor]
    places: list[Tensor]


class Features(NamedTuple):
    """What a step compares.

    forget: [n, k], with a graph. third: [m, k]. None both: this evaluator compares no distributions.
    pull: pull(phi, term), to be called once: phi is what the comparison found, without graph, and term a scalar of
        that value whose gradient in `forget`, averaged over ranks, is that of Phi. An evaluator that compares nothing
        has a penalty of its own and takes neither. Collective.
    """

    forget: Tensor | None
    third: Tensor | None
    pull: Callable[..., Constrained]


@dataclass(frozen=True, kw_only=True)
class SketchedConfig(ConstraintConfig):
    """Settings of evaluators that sketch gradients."""

    sketch_out: PositiveInt = 8  # rows of the Kronecker sketch (output side)
    sketch_in: PositiveInt = 8  # columns of the Kronecker sketch (input side)


@dataclass(frozen=True, kw_only=True)
class LayersConfig(ConstraintConfig):
    """Settings of evaluators that look at many layers."""

    layers: Pattern | None = None  # regular expression found in the names of the layers that are probed; null: all


@dataclass(frozen=True, kw_only=True)
class DifferencesConfig(ConstraintConfig):
    """Settings of evaluators that take finite differences."""

    rho: PositiveFloat | None = None  # step of finite differences; null: the evaluator's own for the precision
    check_every: PositiveInt = 100  # steps between comparisons of finite differences at rho and rho / 2


Settings = TypeVar("Settings", bound=ConstraintConfig)
Stepped = TypeVar("Stepped", bound=DifferencesConfig)


class Evaluator(ABC, Generic[Settings]):
    """One way to reach per-sample gradients; stateless but for warnings already given.

    Attributes of the class:
        name: as in `constraint.evaluator`.
        Config: settings, a frozen dataclass derived from `ConstraintConfig` whose `evaluator` has the evaluator's name
            as default.
        summary: what is compared, and how it is differentiated.
        steps: of finite differences, by precision, where it takes any.

    Args:
        settings: the section `constraint`.
        precision: of the run.
        lasting: whether the graph of a pass is good for another backward after the first one.
    """

    name: ClassVar[str]
    Config: ClassVar[type[ConstraintConfig]]
    summary: ClassVar[str]
    steps: ClassVar[Mapping[str, float]] = {}

    def __init__(self, settings: Settings, precision: str, lasting: bool = True) -> None:
        self.settings, self.precision, self.lasting = settings, precision, lasting

    @classmethod
    def problems(cls, cfg: RunConfig) -> Iterator[str]:
        """Reasons why it cannot be used with these settings, one sentence each, naming the keys."""
        return iter(())

    @abstractmethod
    def describe(
        self, ctx: Context, batch: Batch, bank: Bank | None, draw: int
    ) -> tuple[Tensor | None, list[Branches]]:
        """Features of every sample's gradient, [n, k] (None: this evaluator compares no distributions), and the
        branches they were made from; both may lack a graph. `draw` numbers the random projections.
        """

    @abstractmethod
    def features(self, ctx: Context, forget: Batch, third: Batch, bank: Bank | None) -> Features:
        """What the constraint of one step compares. Collective: all ranks call it together."""

    def shown_once(self, forget: int, third: int) -> bool:
        """Whether third-party images go through the encoder once a step, with so many images of both on a rank."""
        return min(forget, third) > 0 and self.lasting

    def step_kind(self, step: int) -> Hashable:
        """Steps of one kind pass equally many images through the encoder."""
        return 0


def evaluator_class(cfg: RunConfig) -> type[Evaluator]:
    """The evaluator that the settings name."""
    return find(EVALUATOR, cfg.constraint.evaluator)


def require_pull(ctx: Context, found: Constrained, on: bool) -> float:
    """Norm of the constraint's gradient where it enters the encoder, for this rank's forget images.

    on: whether the switch lets it through: of several micro-batches the first may have met the target.

    Raises:
        NumericsError: on any rank it is 0 where there are images, and it is on: the run would forget nothing and
            not notice. All ranks raise it, for each would wait for the others.
    """
    norm, vanishes = 0.0, False
    if found.places[0].numel():
        parts = torch.autograd.grad(found.term, found.places, retain_graph=True, allow_unused=True)
        norm = float(torch.stack([part.norm() for part in parts if part is not None]).norm())
        vanishes = on and norm == 0
    if float(all_reduce_mean(torch.tensor(float(vanishes), device=ctx.device))) > 0:
        raise NumericsError(
            "the gradient constraint has no gradient at the first step, expected one above 0; the encoder's "
            "per-sample gradients vanish: raise objective.temperature or use an encoder that is not collapsed."
        )
    return norm


def mean_loss(ctx: Context, pairs: list[Branches], bank: Bank | None) -> Tensor:
    """l_i averaged over the pairs of views, [n], at least float32."""
    return torch.stack([ctx.objective.per_sample_loss(b, bank) for b in pairs]).mean(0)


def views_by_pair(ctx: Context, batch: Batch) -> list[list[Tensor]]:
    """Both views of every image, by pair of views, as precise as the weights: made once for all passes of a step."""
    dtype = next(ctx.model.parameters()).dtype
    pairs = range(ctx.cfg.constraint.view_pairs)
    return [[view.to(dtype) for view in view_pair(ctx, batch, pair)] for pair in pairs]


def reuse_targets(shown: Branches, first: Branches, copies: Tensor) -> Branches:
    """`shown`, embedded without a momentum branch, with the targets that an earlier pass found for the same views."""
    if first.target is None:
        return shown
    return shown._replace(target=first.target[:, copies], target_embedding=first.target_embedding[:, copies])


def signed_copies(forget: int, total: int, device: torch.device) -> tuple[Tensor, tuple[float, ...]]:
    """Rows of a batch in the order forget (+), forget (-), third-party, and the sign of each (third-party: 0).

    The signs are plain numbers, so that nothing must ask the device which rows are moved.

    Both copies of a sample are rows of one forward, so that what they have in common cancels inside the products
    that make the weights' gradient, before any rounding of a reduction.
    """
    first, rest = torch.arange(forget, device=device), torch.arange(forget, total, device=device)
    signs = (1.0,) * forget + (-1.0,) * forget + (0.0,) * (total - forget)
    return torch.cat([first, first, rest]), signs


def without_graph(branches: Branches) -> Branches:
    """The same values, detached."""
    return tree_map_only(Tensor, torch.Tensor.detach, branches)


def joined(parts: Sequence[Branches]) -> Branches:
    """Branches of consecutive parts of a batch, as those of the whole."""
    by_branch = {"output", "hidden", "target", "embedding", "target_embedding"}
    merged = {
        name: None if values[0] is None else torch.cat(values, dim=1 if name in by_branch else 0)
        for name, values in zip(Branches._fields[:-2], zip(*(part[:-2] for part in parts), strict=True), strict=True)
    }
    return Branches(**merged)  # type: ignore[arg-type]


def unused_layer(name: str) -> ConfigError:
    """The error for a layer that the per-sample loss does not reach through the layer's own forward."""
    return ConfigError(
        f"the encoder's layer {name} takes no part in the per-sample loss as a layer of its own and cannot be probed; "
        "leave it out by constraint.layers, or set constraint.evaluator=head."
    )


def shared(ctx: Context, count: int, total: int) -> AbstractContextManager[None]:
    """Within it, both copies of each of the first `count` samples of `signed_copies` have one pattern of units."""
    return shared_pattern(ctx.model, count, total)


class StepCheck:
    """Compares finite differences at the step rho and at rho / 2, and says once when they disagree."""

    def __init__(self, evaluator: str, every: int, rho: float) -> None:
        self.evaluator, self.every, self.rho = evaluator, every, rho
        self._warned = False

    def due(self, step: int) -> bool:
        """True at the first step and at every `constraint.check_every`-th."""
        return step % self.every == 0

    def compare(self, ctx: Context, whole: Tensor, half: Tensor) -> dict[str, float]:
        """Relative change between the differences of this rank's samples, [n] each, over all ranks. Collective."""
        whole, half = whole.detach().double(), half.detach().double()
        squares = torch.stack([(whole - half).square().sum(), half.square().sum()])
        moved, size = all_reduce_mean(squares).sqrt().tolist()
        change = moved / size if size > 0 else 0.0
        if not change <= CHECKED_CHANGE and not self._warned:
            self._warned = True
            ctx.note(
                f"warning: the finite difference of constraint.evaluator={self.evaluator} changes by "
                f"{change if math.isfinite(change) else math.inf:.0%} when its step {self.rho:g} is halved, expected "
                f"at most {CHECKED_CHANGE:.0%}; set constraint.rho, or use constraint.evaluator=head."
            )
        return {"step_size_change": change}


class Differences(Evaluator[Stepped]):
    """An evaluator that takes finite differences: rho is `constraint.rho`, or its own step for the run's precision."""

    def __init__(self, settings: Stepped, precision: str, lasting: bool = True) -> None:
        super().__init__(settings, precision, lasting)
        self.rho = self.steps[precision] if settings.rho is None else settings.rho
        self.check = StepCheck(self.name, settings.check_every, self.rho)

    def step_kind(self, step: int) -> Hashable:
        return self.check.due(step)


def grad_wanted(fn: Any) -> Any:
    """Decorator: run with gradients on, wherever the caller is (calibration is not differentiated)."""
    return torch.enable_grad()(fn)
