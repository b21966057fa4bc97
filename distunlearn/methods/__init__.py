"""Ways to forget, one readable file each, in one literal table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distunlearn.config import RunConfig
from distunlearn.methods.base import Context, Method, StepOutput
from distunlearn.methods.contrastive import Contrastive, Finetune, Retrain
from distunlearn.methods.grad_ascent import GradAscent
from distunlearn.methods.third_party import ThirdParty

__all__ = ["METHODS", "Context", "Contrastive", "Method", "MethodEntry", "StepOutput"]


@dataclass(frozen=True)
class MethodEntry:
    """A row of the table: how to build the method and where its weights start.

    build: None where nothing is trained. start: "original" or "scratch". steps: "unlearn", "pretrain" or "none".
    guarantee: "exact", "empirical" or "none".
    """

    build: Callable[[RunConfig], Method] | None
    start: str
    steps: str
    guarantee: str
    summary: str


METHODS: dict[str, MethodEntry] = {
    "third_party": MethodEntry(
        ThirdParty, "original", "unlearn", "empirical", "gradients, outputs and confidence like those of strangers"
    ),
    "finetune": MethodEntry(
        lambda cfg: Finetune(), "original", "unlearn", "empirical", "a few more steps on the retain samples only"
    ),
    "grad_ascent": MethodEntry(GradAscent, "original", "unlearn", "empirical", "climb the loss of the forget samples"),
    "retrain": MethodEntry(
        lambda cfg: Retrain(), "scratch", "pretrain", "exact", "train again from scratch without the forget samples"
    ),
    "none": MethodEntry(None, "original", "none", "none", "change nothing: the audit must fail it"),
    "random_init": MethodEntry(None, "scratch", "none", "none", "random weights: the utility gate must fail it"),
}
