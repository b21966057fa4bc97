"""Which parts a run may name: tables of the built-in ones, and the class and the settings of the one that is named.

A part is `package.module:Name` here and is imported when it is asked for, so that this module imports nothing of what
stands above it, and a settings file that names a method imports just that method. Parts from outside the package:
`common/plugins.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from distunlearn.common import plugins
from distunlearn.errors import ConfigError


class Kind(NamedTuple):
    """A kind of part.

    section, key: of the settings, `method` and `name` for `method.name`. base: the class of all such parts, which has
    an attribute `Config`. group: of entry points.
    """

    section: str
    key: str
    default: str
    table: Mapping[str, str]
    base: str
    group: str

    @property
    def setting(self) -> str:
        return f"{self.section}.{self.key}"


METHOD = Kind(
    "method", "name", "third_party",
    {
        "third_party": "distunlearn.methods.third_party:ThirdParty",
        "alignment_calibration": "distunlearn.methods.alignment_calibration:AlignmentCalibration",
        "neg_grad": "distunlearn.methods.neg_grad:NegGrad",
        "grad_ascent": "distunlearn.methods.grad_ascent:GradAscent",
        "scrub": "distunlearn.methods.scrub:Scrub",
        "salun": "distunlearn.methods.salun:SalUn",
        "sure": "distunlearn.methods.sure:Sure",
        "held_out_distillation": "distunlearn.methods.held_out_distillation:HeldOutDistillation",
        "random_target": "distunlearn.methods.random_target:RandomTarget",
        "l1_sparse": "distunlearn.methods.l1_sparse:L1Sparse",
        "finetune": "distunlearn.methods.training:Finetune",
        "retrain": "distunlearn.methods.training:Retrain",
        "none": "distunlearn.methods.controls:Nothing",
        "random_init": "distunlearn.methods.controls:RandomInit",
    },
    "distunlearn.methods.base:Method", "distunlearn.methods",
)  # fmt: skip
OBJECTIVE = Kind(
    "objective", "name", "simclr",
    {
        "simclr": "distunlearn.objectives.simclr:SimCLR",
        "moco": "distunlearn.objectives.moco:MoCo",
        "mocov3": "distunlearn.objectives.mocov3:MoCoV3",
        "byol": "distunlearn.objectives.byol:BYOL",
        "supervised": "distunlearn.objectives.supervised:Supervised",
    },
    "distunlearn.objectives.base:Objective", "distunlearn.objectives",
)  # fmt: skip
EVALUATOR = Kind(
    "constraint", "evaluator", "head",
    {
        "head": "distunlearn.constraints.evaluators.head:LastLayer",
        "sketch": "distunlearn.constraints.evaluators.sketch:Sketch",
        "sliced": "distunlearn.constraints.evaluators.sliced:Sliced",
        "ghost_norm": "distunlearn.constraints.evaluators.ghost_norm:GhostNorm",
        "input_gp": "distunlearn.constraints.evaluators.input_gp:InputGP",
        "double_backward": "distunlearn.constraints.evaluators.sketch:DoubleBackward",
    },
    "distunlearn.constraints.evaluators.base:Evaluator", "distunlearn.evaluators",
)  # fmt: skip
KINDS = (METHOD, OBJECTIVE, EVALUATOR)


class Attack(NamedTuple):
    """An attack of the audit: where it is, whether a gate may judge it, the encoder that it compares with.

    gates: "may" (always for those of `verify.figures.JUDGED`, else where `audit.gates.also` names it) or "never".
    """

    place: str
    gates: str = "may"
    reference: str | None = None


_ATTACKS = "distunlearn.audit.attacks"
ATTACKS = {
    "view_agreement": Attack(f"{_ATTACKS}.view_agreement:view_agreement"),
    "encodermi_vector": Attack(f"{_ATTACKS}.encodermi:encodermi_vector"),
    "bank_loss": Attack(f"{_ATTACKS}.bank_loss:bank_loss"),
    "gradient_norm_network": Attack(f"{_ATTACKS}.gradient_norm:gradient_norm_network"),
    "gradient_norm_head": Attack(f"{_ATTACKS}.gradient_norm:gradient_norm_head"),
    "encodermi_set": Attack(f"{_ATTACKS}.encodermi:encodermi_set"),
    "encodermi_threshold": Attack(f"{_ATTACKS}.encodermi:encodermi_threshold"),
    "embedding_norm": Attack(f"{_ATTACKS}.embedding_norm:embedding_norm"),
    "gradient_sketch": Attack(f"{_ATTACKS}.gradient_sketch:gradient_sketch"),
    "part_crop": Attack(f"{_ATTACKS}.part_crop:part_crop"),
    "rmia": Attack(f"{_ATTACKS}.rmia:rmia", reference="retrained"),
    "lira_alignment": Attack(f"{_ATTACKS}.lira:lira_alignment", reference="retrained"),
    "alignment_gap": Attack(f"{_ATTACKS}.alignment_gap:alignment_gap", "never", reference="original"),
}
ATTACK_GROUP = "distunlearn.attacks"  # of entry points
STRESS_TESTS = ("worst_case", "whole_class", "canaries", "sequential")


def own_attacks(chosen: Iterable[str]) -> dict[str, Any]:
    """Those of the named attacks that are not of this package, by the name that figures have: the function's.

    An attack is a function of `Signals` and a seed that returns `Attacked` (`audit/attacks/base.py`).

    Raises:
        ConfigError: one cannot be had, or has the name of a built-in one.
    """
    found = {}
    for name in chosen:
        if name in ATTACKS:
            continue
        label = name.rpartition(":")[2]
        if label in ATTACKS:
            raise ConfigError(f"audit.gates.also names {name}, but {label} is a built-in attack; rename the function.")
        found[label] = plugins.resolve(name, dict.fromkeys(ATTACKS, ""), None, ATTACK_GROUP, "audit.gates.also")
    return found


def find(kind: Kind, name: Any) -> Any:
    """The class of the part called `name`. Raises ConfigError with the nearest valid name."""
    return plugins.resolve(name, kind.table, kind.base, kind.group, kind.setting)


def names(kind: Kind) -> list[str]:
    """Every name that needs no path: built-in parts and those of entry points."""
    return plugins.names(kind.table, kind.group)


def settings_class(kind: Kind, name: Any) -> Any:
    """The settings class of the part called `name`. Raises ConfigError."""
    return find(kind, name).Config


def settings_of(kind: Kind, name: str | None = None, **values: Any) -> Any:
    """Settings of the part called `name` (None: the default one), with these values; the others have their defaults."""
    name = kind.default if name is None else name
    return settings_class(kind, name)(**{kind.key: name}, **values)


def fitting(kind: Kind, name: str, **values: Any) -> Any:
    """Settings of the part called `name`: of these values those that it has, for code that treats all parts alike."""
    known = {field.name for field in dataclasses.fields(settings_class(kind, name))}
    return settings_of(kind, name, **{key: value for key, value in values.items() if key in known})


def switched(kind: Kind, settings: Any, name: str, **values: Any) -> Any:
    """The settings of another part, which keep what was set in `settings` where the other part has it too."""
    return settings_of(kind, name, **{**kept(kind, settings, settings_class(kind, name)), **values})


def kept(kind: Kind, settings: Any, other: type) -> dict[str, Any]:
    """What differs from its default in `settings` and is a setting of the class `other` too; not the part's name."""
    known = {field.name for field in dataclasses.fields(other)} - {kind.key}
    defaults = type(settings)(**{kind.key: ""})
    found = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {key: value for key, value in found.items() if key in known and value != getattr(defaults, key)}


def owners(kind: Kind, key: str) -> list[str]:
    """Which parts have the setting `key`; those that cannot be imported are left out."""
    found = []
    for name in names(kind):
        try:
            fields = dataclasses.fields(settings_class(kind, name))
        except ConfigError:
            continue
        if key in {field.name for field in fields}:
            found.append(name)
    return found


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """A hint at the end of a sentence: the nearest of the known names, or all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
