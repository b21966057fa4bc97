"""Ways to forget, one readable file each, in one literal table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from distunlearn.config.schema import RunConfig
from distunlearn.errors import ConfigError
from distunlearn.methods.alignment_calibration import AlignmentCalibration
from distunlearn.methods.base import Method, StepOutput
from distunlearn.methods.grad_ascent import GradAscent
from distunlearn.methods.held_out_distillation import HeldOutDistillation
from distunlearn.methods.l1_sparse import L1Sparse
from distunlearn.methods.neg_grad import NegGrad
from distunlearn.methods.random_target import RandomTarget
from distunlearn.methods.salun import SalUn
from distunlearn.methods.scrub import Scrub
from distunlearn.methods.search_space import Choice, Log, Space
from distunlearn.methods.sure import Sure
from distunlearn.methods.third_party import ThirdParty
from distunlearn.methods.training import Contrastive, Finetune, Retrain
from distunlearn.objectives.forward import Context

__all__ = [
    "METHODS",
    "NEEDS",
    "Context",
    "Contrastive",
    "Method",
    "MethodEntry",
    "StepOutput",
    "missing",
    "refuse_missing",
]

NEEDS = {
    "retain": "images to retain",
    "forget": "images to forget",
    "third_party": "third-party images",
    "calibration": "calibration images",
    "teacher": "a second, frozen copy of the original encoder in every process",
    "original_gradients": "gradients of the original encoder over the whole forget set, once",
    "views": "an objective that compares views",
}


@dataclass(frozen=True)
class MethodEntry:
    """A row of the table: how to build the method, where its weights start, what it needs and what may be tuned.

    build: None where nothing is trained. start: "original" or "scratch". steps: "unlearn", "pretrain" or "none".
    guarantee: "exact", "empirical" or "none". needs: of `NEEDS`. space: what a search draws from; empty: nothing.
    """

    build: Callable[[RunConfig], Method] | None
    start: str
    steps: str
    guarantee: str
    summary: str
    needs: tuple[str, ...] = ()
    space: Space = field(default_factory=dict)


RATE = {"unlearn.lr": Log(5e-5, 5e-3)}
STRENGTH = {**RATE, "method.forget_weight": Log(0.1, 10.0)}

METHODS: dict[str, MethodEntry] = {
    "third_party": MethodEntry(
        ThirdParty, "original", "unlearn", "empirical", "gradients, outputs and confidence like those of strangers",
        ("retain", "forget", "third_party", "calibration"),
        {
            **RATE, "method.gradient_weight": Log(0.1, 10.0), "method.output_weight": Log(0.5, 20.0),
            "method.confidence_weight": Log(0.01, 0.5),
        },
    ),
    "alignment_calibration": MethodEntry(
        AlignmentCalibration, "original", "unlearn", "empirical",
        "pull different forget images together, push views of the same one apart", ("retain", "forget", "views"),
        {**RATE, "method.alignment_weight": Log(0.1, 100.0), "method.calibration_weight": Log(0.1, 10.0)},
    ),
    "neg_grad": MethodEntry(
        NegGrad, "original", "unlearn", "empirical", "descend on the retain samples, climb on the forget samples",
        ("retain", "forget"), {**RATE, "method.ascent_weight": Log(0.01, 1.0)},
    ),
    "grad_ascent": MethodEntry(
        GradAscent, "original", "unlearn", "empirical", "climb the loss of the forget samples", ("retain", "forget"),
        {"unlearn.lr": Log(1e-6, 1e-3)},
    ),
    "scrub": MethodEntry(
        Scrub, "original", "unlearn", "empirical", "obey the original encoder on retain, disobey it on forget samples",
        ("retain", "forget", "teacher"),
        {**STRENGTH, "method.retain_weight": Log(0.1, 10.0), "method.max_share": Choice((0.25, 0.5, 0.75))},
    ),
    "salun": MethodEntry(
        SalUn, "original", "unlearn", "empirical", "random targets, learned by the weights that forget samples move",
        ("retain", "forget", "teacher", "original_gradients"),
        {**STRENGTH, "method.mask_share": Choice((0.1, 0.3, 0.5, 0.7))},
    ),
    "sure": MethodEntry(
        Sure, "original", "unlearn", "empirical", "a classifier cannot tell forget from third-party embeddings",
        ("retain", "forget", "third_party"), {**STRENGTH, "method.critic_lr": Log(1e-4, 1e-2)},
    ),
    "held_out_distillation": MethodEntry(
        HeldOutDistillation, "original", "unlearn", "empirical", "views of forget samples follow those of strangers",
        ("retain", "forget", "third_party", "teacher"), STRENGTH,
    ),
    "random_target": MethodEntry(
        RandomTarget, "original", "unlearn", "empirical", "pull forget samples to the places of other images",
        ("retain", "forget", "teacher"), STRENGTH,
    ),
    "l1_sparse": MethodEntry(
        L1Sparse, "original", "unlearn", "empirical", "fine-tuning on retain samples while weights shrink to zero",
        ("retain",), {**RATE, "method.l1_weight": Log(0.01, 3.0)},
    ),
    "finetune": MethodEntry(
        lambda cfg: Finetune(), "original", "unlearn", "empirical", "a few more steps on the retain samples only",
        ("retain",), RATE,
    ),
    "retrain": MethodEntry(
        lambda cfg: Retrain(), "scratch", "pretrain", "exact", "train again from scratch without the forget samples",
        ("retain",),
    ),
    "none": MethodEntry(None, "original", "none", "none", "change nothing: the audit must fail it"),
    "random_init": MethodEntry(None, "scratch", "none", "none", "random weights: the utility gate must fail it"),
}  # fmt: skip


def missing(cfg: RunConfig, counts: Mapping[str, int]) -> list[str]:
    """What the configured method needs and this run does not have, in words. counts: images by role."""
    entry = METHODS[cfg.method.name]
    lacking = [need for need in entry.needs if need in counts and not counts[need]]
    if "views" in entry.needs and cfg.objective.name == "supervised":
        lacking.append("views")
    if entry.start != "original":
        lacking += [need for need in ("teacher", "original_gradients") if need in entry.needs]
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
