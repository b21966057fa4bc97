"""The base of all methods: what a method owns, with defaults, and what a run must have for it.

A method composes an objective, a constraint and a schedule; it never knows which backend runs it.
Its `loss` returns a *local* scalar whose gradient, averaged over ranks, is the gradient of the
global loss, which is what DDP, FSDP2 and ZeRO average.
"""

# Shapes: n = images of this rank, V = branches, C x S x S = image, D = output dim.

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Literal, TypeVar

from torch import Tensor

from distunlearn.config.registry import METHOD, find
from distunlearn.config.schema import MethodConfig, RunConfig
from distunlearn.data.schedule import Batch
from distunlearn.errors import ConfigError
from distunlearn.methods.search_space import Space
from distunlearn.objectives.base import objective_class
from distunlearn.objectives.forward import Context

NEEDS = {
    "retain": "images to retain",
    "forget": "images to forget",
    "third_party": "third-party images",
    "calibration": "calibration images",
    "teacher": "a second, frozen copy of the original encoder in every process",
    "original_gradients": "gradients of the original encoder over the whole forget set, once",
    "views": "an objective that compares views",
}
FEEDERS = ("retain", "forget", "third_party")

Settings = TypeVar("Settings", bound=MethodConfig)


@dataclass
class StepOutput:
    """Result of one step: `loss` is a scalar to minimise, `consumed` the ids that entered it, by role.

    metrics: figures to log; a tensor of one element is read after the backward, when nothing waits for it.
    """

    loss: Tensor
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict)
    consumed: dict[str, list[str]] = field(default_factory=dict)


class Method(ABC, Generic[Settings]):
    """A way to train or to forget, with all that is its own.

    Only `loss` must be written; everything else has the default of a method without calibration and without state
    besides the weights. With gradient accumulation `loss` is called for every micro-batch of a step, each with its
    part of the batches.

    Attributes of the class:
        name: as in `method.name`.
        Config: settings, a frozen dataclass derived from `MethodConfig` whose `name` has the method's name as default.
        summary: what it does, in a few words, for `distunlearn list methods`.
        report: the same as a plain sentence for readers of the report.
        guarantee: of the forgetting.
        begins: whether the weights start as the original encoder's or from scratch.
        steps: the section of the settings that counts the steps; "none": nothing is trained.
        needs: of `NEEDS`; the roles among them are the images of a step.
        forgets: every forget id must be consumed at least once (else the run has no coverage).
        space: what a search draws from, by key of the settings.
        moves: how far the scores of images go from those under the original encoder, as finished runs had it: "little",
            "unevenly", "evenly", "much" (also where nothing is known), "far" or "wholly". By it `plan` predicts widths.
    """

    name: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]
    summary: ClassVar[str]
    report: ClassVar[str]
    guarantee: ClassVar[Literal["exact", "empirical", "none"]] = "empirical"
    begins: ClassVar[Literal["original", "scratch"]] = "original"
    steps: ClassVar[Literal["unlearn", "pretrain", "none"]] = "unlearn"
    needs: ClassVar[tuple[str, ...]] = ("retain", "forget")
    forgets: ClassVar[bool] = True
    space: ClassVar[Space] = {}
    moves: ClassVar[str] = "much"

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg

    @property
    def settings(self) -> Settings:
        """The method's own section of the settings."""
        return self.cfg.method  # type: ignore[return-value]

    @classmethod
    def needs_for(cls, cfg: RunConfig) -> tuple[str, ...]:
        """What it needs with these settings."""
        return cls.needs

    @classmethod
    def dosed(cls, cfg: RunConfig) -> bool:
        """Whether its change of the original encoder's weights is scaled once it has ended (`method.dose`)."""
        return cls.begins == "original" and cls.steps != "none" and cfg.method.dose != 1

    @classmethod
    def problems(cls, cfg: RunConfig) -> Iterator[str]:
        """Reasons why it cannot run with these settings, one sentence each, naming the keys."""
        return iter(())

    # -- what a run is made of -----------------------------------------------------------------------------------

    def batch_sizes(self) -> Mapping[str, int]:
        """Global images per step, by feeder name ("retain", "forget", "third_party", "members")."""
        return {role: getattr(self.cfg.unlearn, f"{role}_batch") for role in FEEDERS if role in self.needs}

    def view_pairs(self, feeder: str) -> int:
        """Pairs of views of each image that its batches bring along; what `embed` asks beyond them is cut late."""
        return 1

    def forget_steps(self) -> int:
        """How many steps from the start consume forget images."""
        return self.cfg.unlearn.steps

    def step_kind(self, step: int) -> Hashable:
        """Steps of one kind pass equally many images through an encoder: a plan runs one of each."""
        return step < self.forget_steps()

    # -- the run itself ------------------------------------------------------------------------------------------

    def calibrate(self, ctx: Context, sample: Callable[[str], Batch]) -> dict[str, float]:
        """Before the first step; `sample(role)` gives all images of a role. Returns figures to log."""
        return {}

    @abstractmethod
    def loss(self, ctx: Context, batches: Mapping[str, Batch]) -> StepOutput:
        """Loss of one micro-batch, which is the whole step without gradient accumulation."""

    @property
    def adjusts(self) -> bool:
        """Whether there is anything to do in `adjust`."""
        return type(self).adjust is not Method.adjust

    def adjust(self, ctx: Context, name: str, weight: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
        """The weight as it shall be, called for every trained weight after every optimizer step.

        weight: whole or in parts, as the backend holds it. `part(tensor)` cuts, out of a whole tensor of the weight's
            shape, what belongs to it. Works element by element and communicates nothing.
        """
        return weight

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs besides weights, momentum encoder and queue."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`."""


def method_class(cfg: RunConfig) -> type[Method]:
    """The method that the settings name."""
    return find(METHOD, cfg.method.name)


def missing(cfg: RunConfig, counts: Mapping[str, int]) -> list[str]:
    """What the configured method needs and this run does not have, in words. counts: images by role."""
    method = method_class(cfg)
    needs = method.needs_for(cfg)
    lacking = [need for need in needs if need in counts and not counts[need]]
    if "views" in needs and not objective_class(cfg).compares_views:
        lacking.append("views")
    if method.begins != "original":
        lacking += [need for need in ("teacher", "original_gradients") if need in needs]
    return [NEEDS[need] for need in lacking]


def refuse_missing(cfg: RunConfig, counts: Mapping[str, int]) -> None:
    """Raises ConfigError where `missing` finds something, before anything is trained for the method."""
    lacking = missing(cfg, counts)
    if lacking:
        raise ConfigError(
            f"method.name={cfg.method.name} needs {' and '.join(lacking)}, which this run (objective.name="
            f"{cfg.objective.name}) does not have; choose another method or objective (distunlearn list methods), or "
            "data that have them."
        )
    if cfg.method.dose == "auto" and method_class(cfg).dosed(cfg) and not counts.get("watch"):
        raise ConfigError(
            "method.dose=auto needs watch images, by which the dose is chosen, and this run has none; set data.watch, "
            "such as data.watch=250, or method.dose to a number."
        )
