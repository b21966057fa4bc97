"""Controls that forget nothing and train nothing: the audit must fail the one, the utility gate the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distunlearn.config.schema import MethodConfig
from distunlearn.data.schedule import Batch
from distunlearn.methods.base import Method, StepOutput
from distunlearn.objectives.forward import Context


@dataclass(frozen=True, kw_only=True)
class NothingConfig(MethodConfig):
    """No settings of its own."""

    name: str = "none"


@dataclass(frozen=True, kw_only=True)
class RandomInitConfig(MethodConfig):
    """No settings of its own."""

    name: str = "random_init"


class Nothing(Method[NothingConfig]):
    """The original encoder as it is."""

    name = "none"
    Config = NothingConfig
    moves = "little"
    summary = "change nothing: the audit must fail it"
    report = "none: the encoder was left as it was (a control that must not pass)"
    guarantee = "none"
    steps = "none"
    needs = ()
    forgets = False

    def loss(self, ctx: Context, batches: Mapping[str, Batch]) -> StepOutput:
        raise AssertionError(f"{self.name} trains nothing")


class RandomInit(Nothing):
    """Fresh weights in place of the encoder."""

    name = "random_init"
    Config = RandomInitConfig  # type: ignore[assignment]
    moves = "wholly"
    summary = "random weights: the utility gate must fail it"
    report = "random weights in place of the encoder (a control that must not pass)"
    begins = "scratch"
