"""The figures that decide, from raw scores alone: attacks, usefulness, gates, verdict.

Differences between encoders are paired: one draw of images serves all encoders and attacks. Which gates there are is
decided by the rules that were declared before the run, never by which figures are there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from .gates import MIN_IMAGES, Gate, equivalence, no_loss, overall
from .reference_groups import Groups, Placed, draw_groups, reference
from .statistics import (
    Comparison,
    Draws,
    Part,
    auc,
    auc_bootstrap,
    draw_images,
    draw_persons,
    ks_p_value,
    percentile_interval,
    tpr_at_fpr,
)

ENCODERS = ("original", "unlearned", "retrained")
REFERENCES = ("retrained", "retrained_2", "retrained_3", "retrained_4")  # with more than one their mean counts
UTILITIES = ("knn", "linear_probe")
JUDGED = ("view_agreement", "encodermi_vector", "bank_loss", "gradient_norm_network", "gradient_norm_head")
AGAINST_ORIGINAL = ("alignment_gap",)  # compared with the original itself, where they have nothing to find
FIGURE_CONFIDENCE = 0.95  # of the intervals of single figures; those of gaps are `Rules.confidence`
LOW_RATES = {"1pct": 0.01, "0p1pct": 0.001}
NO_RETRAINED = "there is no retrained encoder to compare with"
NO_GROUPS = "there is no retrained encoder, and too few images for reference groups"
NOT_FAIR = (
    "inside the margin, which is an indication and no pass: there is no retrained encoder, and the images are no fair "
    "sample"
)
NOT_ALIKE = "there is no retrained encoder, and held-out images form no groups as alike as those to forget"
NO_SCORES = "there are no scores of this attack"
UNCHANGED = "none"  # the method that leaves the encoder as it is


@dataclass(frozen=True)
class Rules:
    """How a run is judged; declared before it. gates: names of the attacks that are judged. method: `method.name`.

    tier: of the audit. At 0, without a retrained encoder, gates ask whether forgotten images look like held-out ones.
    references: how many encoders the operator brings in the place of one that the run trains again.
    """

    seed: int
    bootstrap: int
    confidence: float
    view_agreement: float
    attack: float
    utility_points: float
    gates: tuple[str, ...]
    method: str
    tier: int = 1
    references: int = 0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Rules:
        """From the settings of a run as plain data. KeyError, TypeError or ValueError: they are not whole."""
        audit, method = settings["audit"], settings["method"]
        gates = audit["gates"]
        also = (name.rpartition(":")[2] for name in gates.get("also", ()))
        return cls(
            seed=int(settings["seed"]),
            bootstrap=int(audit["bootstrap"]),
            confidence=float(gates["confidence"]),
            view_agreement=float(gates["view_agreement"]),
            attack=float(gates["attack"]),
            utility_points=float(gates["utility_points"]),
            gates=tuple(dict.fromkeys((*JUDGED, *also))),
            method=str(method["name"]),
            tier=int(audit["tier"]),
            references=len(audit["reference"]),
        )

    def margin(self, attack: str) -> float:
        """The allowed difference of AUC."""
        return self.view_agreement if attack == "view_agreement" else self.attack


@dataclass(frozen=True, eq=False)
class Raw:
    """What the figures are made of.

    comparisons: {attack: {encoder: Comparison}}. correct: {encoder: {utility: float64 [holdout]}}, 1, 0 or NaN where
    there is no label. forget, holdout: numbers of images. persons: who is on each, int64 [forget] and [holdout]; None:
    nobody says. placed: how the original encoder sees them; None: reference groups cannot be drawn.
    """

    comparisons: Mapping[str, Mapping[str, Comparison]]
    correct: Mapping[str, Mapping[str, np.ndarray]]
    forget: int
    holdout: int
    persons: tuple[np.ndarray, np.ndarray] | None = None
    placed: Placed | None = None


def judge(raw: Raw, rules: Rules, *, unchanged: bool = False) -> dict[str, Any]:
    """`attacks`, `further_attacks`, `utility`, `persons`, `evidence` and `gates` of `audit/summary.json`, before
    `plain`.

    Where persons are known and `MIN_IMAGES` of them or more are on either side, they are the units of every interval.

    unchanged: the unlearned encoder is the original one, which is never a pass.
    """
    draws, units, told = drawn(raw, rules)
    untrained = rules.tier == 0 and "retrained" not in raw.correct
    groups = draw_groups(raw.placed, rules.seed) if untrained and raw.placed is not None else None
    figures = {name: _attack(name, found, draws, min(units), rules, groups) for name, found in raw.comparisons.items()}
    attacks = {name: figures[name] for name in rules.gates if name in figures}
    utility, useful = _utility(raw, draws, units[1], rules)
    gates = {name: figures[name]["gap"] if name in figures else _no_scores(name, rules) for name in rules.gates}
    gates |= useful
    verdict = overall(gate["verdict"] for gate in gates.values())
    if unchanged and verdict == "pass":
        verdict = "inconclusive"
    return {
        "attacks": attacks,
        "further_attacks": {name: _unjudged(found) for name, found in figures.items() if name not in attacks},
        "utility": utility,
        "persons": told,
        "evidence": _evidence(groups, rules, untrained),
        "gates": {"verdict": verdict, **gates},
    }


def drawn(raw: Raw, rules: Rules) -> tuple[Draws, tuple[int, int], dict[str, Any] | None]:
    """The draws behind every interval, the numbers of units on either side, and `persons_told` where they are known."""
    draws, units = draw_images(raw.forget, raw.holdout, rules.bootstrap, rules.seed), (raw.forget, raw.holdout)
    if raw.persons is None:
        return draws, units, None
    counted = len(np.unique(raw.persons[0])), len(np.unique(raw.persons[1]))
    by_person = draw_persons(*raw.persons, rules.bootstrap, rules.seed)
    told = persons_told(raw, by_person, counted, rules)
    return (by_person, counted, told) if told["are_units"] else (draws, units, told)


def plain(value: Any) -> Any:
    """JSON without NaN: what is not finite was not evaluated."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


# -- attacks ---------------------------------------------------------------------------------------------------------


def _attack(
    attack: str, found: Mapping[str, Comparison], draws: Draws, units: int, rules: Rules, groups: Groups | None
) -> dict[str, Any]:
    sampled = {name: auc_bootstrap(comparison, draws) for name, comparison in found.items()}
    names = dict.fromkeys((*ENCODERS, *found))
    result: dict[str, Any] = {name: _figures(found.get(name), sampled.get(name)) for name in names}
    yardsticks = [name for name in REFERENCES if name in found]
    at = "retrained" if attack in AGAINST_ORIGINAL else "original"
    low, high = result[at]["auc_low"], result[at]["auc_high"]
    powered = bool(low > 0.5 or high < 0.5)
    margin = rules.margin(attack)
    if yardsticks and len(yardsticks) >= rules.references:
        value = result["unlearned"]["auc"] - float(np.mean([result[name]["auc"] for name in yardsticks]))
        between = sampled["unlearned"] - np.mean([sampled[name] for name in yardsticks], axis=0)
        ends = percentile_interval(between, rules.confidence)
        gate = equivalence(value, *ends, margin, powered=powered, images=units)
    elif rules.tier == 0 and attack not in AGAINST_ORIGINAL:
        ends = percentile_interval(sampled["unlearned"] - 0.5, rules.confidence)
        gate, result["reference"] = _to_chance(found["unlearned"], ends, groups, margin, powered=powered, images=units)
    else:
        gate = Gate(math.nan, math.nan, math.nan, "inconclusive", NO_RETRAINED)
    result["gap"] = _gap(gate, "auc", margin)
    result["power"] = {"auc": result[at]["auc"], "low": low, "high": high, "beats_chance": powered}
    return result


def _to_chance(
    found: Comparison, ends: tuple[float, float], groups: Groups | None, margin: float, *, powered: bool, images: int
) -> tuple[Gate, dict[str, float] | None]:
    """Do forgotten images look like held-out ones, as far as reference groups do? ends: interval of AUC - 0.5."""
    value = auc(found) - 0.5
    if groups is None:
        return Gate(value, *ends, "inconclusive", NO_GROUPS), None
    shown = reference(found, groups, len(found.parts[0].positives))
    gate = equivalence(
        value, *shown.widened(value, *ends), margin, powered=powered, images=images, than="held-out images like them"
    )
    if gate.verdict == "pass" and not groups.fair:
        gate = replace(gate, verdict="inconclusive", reason=NOT_FAIR)
    if not groups.alike:
        gate = replace(gate, verdict="inconclusive", reason=NOT_ALIKE)
    return gate, asdict(shown)


def _evidence(groups: Groups | None, rules: Rules, untrained: bool) -> dict[str, Any]:
    """What the gates compare with."""
    if not untrained:
        brought = {"kind": "brought_encoders", "encoders": rules.references}
        return brought if rules.references else {"kind": "retrained_encoder"}
    if groups is None:
        return {"kind": "none"}
    return {"kind": "reference_groups", "seed": rules.seed, **groups.told()}


def _figures(comparison: Comparison | None, sampled: np.ndarray | None) -> dict[str, Any]:
    """AUC with interval, rates from both sides (accusing high scores, and low ones), KS; NaN without a comparison."""
    if comparison is None or sampled is None:
        rates: dict[str, float | None] = {
            f"{side}tpr_at_{name}_fpr": None for name in LOW_RATES for side in ("", "low_")
        }
        return {"auc": math.nan, "auc_low": math.nan, "auc_high": math.nan, **rates, "ks_p": None}
    low, high = percentile_interval(sampled, FIGURE_CONFIDENCE)
    sides = {"": comparison, "low_": comparison.reversed()}
    rates = {
        f"{side}tpr_at_{name}_fpr": tpr_at_fpr(looked_at, rate)
        for name, rate in LOW_RATES.items() for side, looked_at in sides.items()
    }  # fmt: skip
    return {"auc": auc(comparison), "auc_low": low, "auc_high": high, **rates, "ks_p": ks_p_value(comparison)}


def _gap(gate: Gate, key: str, margin: float) -> dict[str, Any]:
    found = asdict(gate)
    return {key: found.pop("value"), **found, "margin": margin}


def _no_scores(attack: str, rules: Rules) -> dict[str, Any]:
    return _gap(Gate(math.nan, math.nan, math.nan, "not_evaluated", NO_SCORES), "auc", rules.margin(attack))


def _unjudged(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The same without verdict: of an attack that was not declared as a gate."""
    kept = ("auc", "low", "high")
    return {**figures, "gap": {key: value for key, value in figures["gap"].items() if key in kept}}


# -- persons ---------------------------------------------------------------------------------------------------------


def persons_told(raw: Raw, draws: Draws, counted: tuple[int, int], rules: Rules) -> dict[str, Any]:
    """Numbers of persons, whether they are the units of the gates, and every attack's gap to the retrained encoder by
    persons: with an interval over persons, and of each requested person alone, who is told by a number.
    """
    assert raw.persons is not None, "somebody says who is on which image"
    forget = raw.persons[0]
    attacks = {}
    for attack, found in raw.comparisons.items():
        if "retrained" not in found:
            continue
        own, others = found["unlearned"], [found[name] for name in REFERENCES if name in found]
        between = auc_bootstrap(own, draws) - np.mean([auc_bootstrap(other, draws) for other in others], axis=0)
        low, high = percentile_interval(between, rules.confidence)
        each = []
        for person in np.unique(forget).tolist():
            here = forget == person
            told = {"unlearned": auc(_of(own, here)), "retrained": _mean_auc([_of(other, here) for other in others])}
            each.append({"person": person, "images": int(here.sum()), **told})
        attacks[attack] = {"auc": auc(own) - _mean_auc(others), "low": low, "high": high, "each": each}
    return {"forget": counted[0], "holdout": counted[1], "are_units": min(counted) >= MIN_IMAGES, "attacks": attacks}


def _mean_auc(comparisons: Sequence[Comparison]) -> float:
    return float(np.mean([auc(comparison) for comparison in comparisons]))


def _of(comparison: Comparison, kept: np.ndarray) -> Comparison:
    """Some of the forgotten images against all held-out ones. kept: bool [forget]."""
    return Comparison(tuple(Part(part.positives[kept], part.negatives, part.rows) for part in comparison.parts))


# -- utility ---------------------------------------------------------------------------------------------------------


def _utility(raw: Raw, draws: Draws, units: int, rules: Rules) -> tuple[dict[str, Any], dict[str, Any]]:
    """Accuracies, their gaps to the retrained encoder, and the gates on their change from the original encoder."""
    utility, judged = {}, {}
    for name in UTILITIES:
        rights = {encoder: right[name] for encoder, right in raw.correct.items()}
        tested = np.isfinite(rights["original"])
        weights = draws.negatives[:, tested].astype(np.float64)
        rights = {encoder: right[tested] for encoder, right in rights.items()}
        figures: dict[str, Any] = {e: _mean(rights[e]) if e in rights else math.nan for e in ENCODERS}
        change = _difference(rights["unlearned"], rights["original"], weights, rules.confidence)
        yardsticks = [rights[name] for name in REFERENCES if name in rights]
        yardstick = np.mean(yardsticks, axis=0) if yardsticks else np.full(len(rights["unlearned"]), math.nan)
        gap = _difference(rights["unlearned"], yardstick, weights, rules.confidence)
        figures["gap"] = dict(zip(("accuracy", "low", "high"), gap, strict=True))
        utility[name] = figures
        allowed = rules.utility_points / 100
        judged[name] = _gap(no_loss(*change, allowed, images=min(units, int(tested.sum()))), "change", allowed)
    return utility, judged


def _difference(
    first: np.ndarray, second: np.ndarray, weights: np.ndarray, confidence: float
) -> tuple[float, float, float]:
    """Mean of first - second over images with its paired bootstrap interval; NaN without images."""
    if not len(first):
        return math.nan, math.nan, math.nan
    delta = first - second
    with np.errstate(invalid="ignore"):
        sampled = (weights @ delta) / weights.sum(1)
    return float(delta.mean()), *percentile_interval(sampled, confidence)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
