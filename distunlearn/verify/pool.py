"""One verdict over several runs that differ in their seed or in their retrained encoder.

A figure is its mean over the runs. Its interval is from the images alone: draw b of the pool is the mean over the runs
of draw b of each, whose images are drawn as for the run by itself. Runs that judge the same images share one draw;
others draw each by its own seed. So the interval holds for these runs and other images of their kind. A few runs say
little about the chance in training, which `runs` shows as it is: the difference of every run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from .figures import AGAINST_ORIGINAL, ENCODERS, FIGURE_CONFIDENCE, UTILITIES, Raw, Rules, drawn
from .gates import Gate, equivalence, no_loss, overall
from .statistics import Draws, auc, auc_bootstrap, percentile_interval


def judge_pool(raws: Sequence[Raw], rules: Sequence[Rules], *, shared: bool, unchanged: bool = False) -> dict[str, Any]:
    """`attacks`, `utility` and `gates` as in `audit/summary.json`, before `plain`, with the difference of every run.

    Args:
        raws, rules: of each run; all with a retrained encoder, and alike but for `Rules.seed`.
        shared: the runs judge the same images in the same order.
        unchanged: the unlearned encoder of a run is its original one, which is never a pass.
    """
    found = [drawn(raw, rules[0] if shared else own) for raw, own in zip(raws, rules, strict=True)]
    draws, units = [each for each, _, _ in found], [sides for _, sides, _ in found]
    names = [name for name in rules[0].gates if all(name in raw.comparisons for raw in raws)]
    attacks = {name: _attack(name, raws, draws, min(map(min, units)), rules[0]) for name in names}
    utility, gates = {}, {name: attacks[name]["gap"] if name in attacks else _missing() for name in rules[0].gates}
    for name in UTILITIES:
        utility[name], gates[name] = _utility(name, raws, draws, min(h for _, h in units), rules[0])
    verdict = overall(gate["verdict"] for gate in gates.values())
    if unchanged and verdict == "pass":
        verdict = "inconclusive"
    return {"attacks": attacks, "utility": utility, "gates": {"verdict": verdict, **gates}}


def _missing() -> dict[str, Any]:
    return _told(Gate(math.nan, math.nan, math.nan, "not_evaluated", "not every run has scores of it"), "auc", math.nan)


def _attack(name: str, raws: Sequence[Raw], draws: Sequence[Draws], units: int, rules: Rules) -> dict[str, Any]:
    values = {e: np.array([auc(raw.comparisons[name][e]) for raw in raws]) for e in ENCODERS}
    both = [(raw.comparisons[name], own) for raw, own in zip(raws, draws, strict=True)]
    sampled = {e: np.stack([auc_bootstrap(found[e], own) for found, own in both]) for e in ENCODERS}
    at = "retrained" if name in AGAINST_ORIGINAL else "original"
    own = [percentile_interval(row, FIGURE_CONFIDENCE) for row in sampled[at]]
    powered = all(low > 0.5 or high < 0.5 for low, high in own)
    gaps = values["unlearned"] - values["retrained"]
    ends = percentile_interval((sampled["unlearned"] - sampled["retrained"]).mean(0), rules.confidence)
    margin = rules.margin(name)
    gate = equivalence(float(gaps.mean()), *ends, margin, powered=powered, images=units)
    result: dict[str, Any] = {}
    for encoder in ENCODERS:
        low, high = percentile_interval(sampled[encoder].mean(0), FIGURE_CONFIDENCE)
        result[encoder] = {"auc": float(values[encoder].mean()), "auc_low": low, "auc_high": high}
    level = result[at]
    power = {"auc": level["auc"], "low": level["auc_low"], "high": level["auc_high"], "beats_chance": powered}
    return result | {"gap": _told(gate, "auc", margin), "power": power, "runs": gaps.tolist()}


def _utility(
    name: str, raws: Sequence[Raw], draws: Sequence[Draws], units: int, rules: Rules
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Mean accuracies with the change of every run, and the gate on that change; NaN where a run has no labels."""
    levels, changes, sampled, images = [], [], [], units
    for raw, own in zip(raws, draws, strict=True):
        tested = np.isfinite(raw.correct["original"][name])
        right = {encoder: raw.correct[encoder][name][tested] for encoder in ENCODERS}
        delta, weights = right["unlearned"] - right["original"], own.negatives[:, tested].astype(np.float64)
        levels.append([_mean(right[encoder]) for encoder in ENCODERS])
        changes.append(_mean(delta))
        images = min(images, len(delta))
        with np.errstate(invalid="ignore"):
            sampled.append(weights @ delta / weights.sum(1))
    allowed = rules.utility_points / 100
    ends = percentile_interval(np.mean(sampled, axis=0), rules.confidence)
    gate = no_loss(float(np.mean(changes)), *ends, allowed, images=images)
    means = dict(zip(ENCODERS, np.mean(levels, axis=0).tolist(), strict=True))
    return means | {"runs": changes}, _told(gate, "change", allowed)


def _told(gate: Gate, key: str, margin: float) -> dict[str, Any]:
    found = asdict(gate)
    return {key: found.pop("value"), **found, "margin": margin}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
