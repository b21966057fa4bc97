"""audit/summary.json: every figure of the audit, with intervals, gaps to the retrained encoder, and verdicts.

Attacks, gaps and utility are functions of the raw scores that `write_audit` saves beside the summary, so that
these figures can be computed again. Differences between encoders are paired: one draw of images serves all
encoders and attacks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from distunlearn.audit.attacks import Attacked, judged, run_attacks
from distunlearn.audit.figures.gates import Gate, equivalence, no_loss, overall
from distunlearn.audit.figures.retained import retained_figures
from distunlearn.audit.figures.retrain_distance import average_gap, iam, tow
from distunlearn.audit.figures.similarity import similarities
from distunlearn.audit.figures.two_sample import describe, two_sample
from distunlearn.audit.figures.utility import UTILITIES, correct_predictions
from distunlearn.audit.relearn import Relearned, relearning_figures
from distunlearn.audit.signals.collect import Signals
from distunlearn.audit.statistics import (
    Comparison,
    Draws,
    auc,
    auc_bootstrap,
    draw_images,
    ks_p_value,
    percentile_interval,
    tpr_at_fpr,
)
from distunlearn.common.files import write_json
from distunlearn.config.registry import ATTACKS
from distunlearn.config.schema import RunConfig

__all__ = ["ENCODERS", "load_scores", "summarise", "write_audit"]

ENCODERS = ("original", "unlearned", "retrained")
FIGURE_CONFIDENCE = 0.95  # of the intervals of single figures; those of gaps are AuditConfig.gates.confidence
LOW_RATES = {"1pct": 0.01, "0p1pct": 0.001}
NO_RETRAINED = "there is no retrained encoder to compare with (audit.tier is 0)"

Scores = dict[str, dict[str, dict[str, Any]]]


def summarise(
    signals: Mapping[str, Signals],
    cfg: RunConfig,
    *,
    cost: Mapping[str, float | None],
    coverage: Mapping[str, float],
    relearned: Mapping[str, Relearned] | None = None,
    pooled: Mapping[str, Any] | None = None,
    stress: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Scores]:
    """Attack, measure, compare and judge.

    Args:
        signals: by encoder: original, unlearned and (but for tier 0) retrained; of the same images in the same order.
        relearned: curves of the relearning attack by encoder; None: it was not run.
        pooled: figures of the shadow encoders (`pooled.pooled_figures`); None: there are none.
        stress: figures of the stress tests (`stress.audit_stress`); None: none was asked for.

    Returns:
        What `audit/summary.json` and, by encoder, `audit/scores-<encoder>.json` hold: plain JSON, None for "not
        evaluated", never NaN.
    """
    first = signals["original"]
    assert all(s.ids == first.ids for s in signals.values()), "one list of images for all encoders"
    draws = draw_images(len(first.of("forget")), len(first.of("holdout")), cfg.audit.bootstrap, cfg.seed)
    found = run_attacks(signals, cfg.seed, cfg.audit.gates.also)
    correct = {name: correct_predictions(s, cfg.audit.neighbours) for name, s in signals.items()}
    also = {name.rpartition(":")[2] for name in cfg.audit.gates.also}
    chosen = [*judged(), *(name for name in found if name in also)]
    figures = {name: _attack_figures(name, attacked, draws, cfg) for name, attacked in found.items()}
    attacks = {name: figures[name] for name in chosen}
    utility, utility_gates = _utility_figures(correct, first, draws, cfg)
    gates = {name: attack["gap"] for name, attack in attacks.items()} | utility_gates
    verdict = overall(gate["verdict"] for gate in gates.values())
    described = {name: describe(s) for name, s in signals.items()}
    summary = {
        "attacks": attacks,
        "further_attacks": {name: _unjudged(attack) for name, attack in figures.items() if name not in chosen},
        "utility": utility,
        "two_sample": {name: _compare(described[name], first, "forget", "third_party_audit", cfg) for name in signals},
        "controls": {
            "third_party_against_holdout": {
                name: _compare(described[name], first, "third_party_audit", "holdout", cfg) for name in signals
            },
            "power": {name: attack["power"] for name, attack in attacks.items()},
        },
        "similarity": similarities(signals),
        **_completeness(signals, found, utility, cfg),
        "relearning": relearning_figures(relearned, cfg) if relearned else None,
        "pooled": pooled,
        "retained": retained_figures(signals, cfg),
        "stress": stress,
        "tier": cfg.audit.tier,
        "cost": dict(cost),
        "coverage": dict(coverage),
        "images": {role: len(first.of(role)) for role in dict.fromkeys(first.roles.tolist())},
        "gates": {"verdict": verdict, **gates},
    }
    scores = {name: _score_file(name, signals[name], found, correct[name]) for name in signals}
    return _plain(summary), scores


def _completeness(
    signals: Mapping[str, Signals],
    found: Mapping[str, Mapping[str, Attacked]],
    utility: Mapping[str, Mapping[str, Any]],
    cfg: RunConfig,
) -> dict[str, Any]:
    """Single numbers against the retrained encoder; None without it."""
    if "retrained" not in signals:
        return dict.fromkeys(("tow", "iam", "average_gap"))
    compared = {name: {e: a.comparison for e, a in attacked.items()} for name, attacked in found.items()}
    chosen = [name for name in cfg.audit.average if name in compared]
    agreement = {name: auc(comparison) for name, comparison in compared["view_agreement"].items()}
    return {
        "tow": tow(signals, agreement),
        "iam": iam(signals),
        "average_gap": average_gap(compared, utility, chosen),
    }


def write_audit(folder: Path, summary: Mapping[str, Any], scores: Scores) -> None:
    """Raw scores first, the summary last, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in scores.items():
        write_json(folder / f"scores-{name}.json", content)
    write_json(folder / "summary.json", summary)


# -- attacks ---------------------------------------------------------------------------------------------------------


def _attack_figures(attack: str, found: Mapping[str, Attacked], draws: Draws, cfg: RunConfig) -> dict[str, Any]:
    sampled = {name: auc_bootstrap(attacked.comparison, draws) for name, attacked in found.items()}
    result: dict[str, Any] = {
        name: _figures(found[name].comparison if name in found else None, sampled.get(name)) for name in ENCODERS
    }
    # Compared with the original itself an attack has nothing to find there; its power shows on the retrained encoder.
    at = "retrained" if attack in ATTACKS and ATTACKS[attack].reference == "original" else "original"
    low, high = result[at]["auc_low"], result[at]["auc_high"]
    powered = bool(low > 0.5 or high < 0.5)
    gates = cfg.audit.gates
    margin = gates.view_agreement if attack == "view_agreement" else gates.attack
    if "retrained" in found:
        value = result["unlearned"]["auc"] - result["retrained"]["auc"]
        ends = percentile_interval(sampled["unlearned"] - sampled["retrained"], gates.confidence)
        images = min(draws.positives.shape[1], draws.negatives.shape[1])
        gate = equivalence(value, *ends, margin, powered=powered, images=images)
    else:
        gate = Gate(math.nan, math.nan, math.nan, "inconclusive", NO_RETRAINED)
    result["gap"] = _gap(gate, "auc", margin)
    result["power"] = {"auc": result[at]["auc"], "low": low, "high": high, "beats_chance": powered}
    return result


def _figures(comparison: Comparison | None, sampled: np.ndarray | None) -> dict[str, Any]:
    """AUC with interval, rates from both sides (accusing high scores, and low ones), KS; NaN without a comparison."""
    if comparison is None or sampled is None:
        rates = {f"{side}tpr_at_{name}_fpr": None for name in LOW_RATES for side in ("", "low_")}
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


def _unjudged(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The same without verdict: of an attack that was not declared as a gate."""
    kept = ("auc", "low", "high")
    return {**figures, "gap": {key: value for key, value in figures["gap"].items() if key in kept}}


# -- utility ---------------------------------------------------------------------------------------------------------


def _utility_figures(
    correct: Mapping[str, Mapping[str, np.ndarray]], signals: Signals, draws: Draws, cfg: RunConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Accuracies, their gaps to the retrained encoder, and the gates on their change from the original encoder."""
    gates = cfg.audit.gates
    holdout = signals.of("holdout")
    utility, judged = {}, {}
    for name in UTILITIES:
        rights = {encoder: right[name][holdout] for encoder, right in correct.items()}
        tested = np.isfinite(rights["original"])
        weights = draws.negatives[:, tested].astype(np.float64)
        rights = {encoder: right[tested] for encoder, right in rights.items()}
        figures: dict[str, Any] = {e: _mean(rights[e]) if e in rights else math.nan for e in ENCODERS}
        change = _difference(rights["unlearned"], rights["original"], weights, gates.confidence)
        yardstick = rights.get("retrained", np.full(len(rights["unlearned"]), math.nan))
        gap = _difference(rights["unlearned"], yardstick, weights, gates.confidence)
        figures["gap"] = dict(zip(("accuracy", "low", "high"), gap, strict=True))
        utility[name] = figures
        allowed = gates.utility_points / 100
        judged[name] = _gap(no_loss(*change, allowed, images=int(tested.sum())), "change", allowed)
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


# -- controls and raw scores -----------------------------------------------------------------------------------------


def _compare(features: np.ndarray, signals: Signals, first: str, second: str, cfg: RunConfig) -> dict[str, Any]:
    return two_sample(features[signals.of(first)], features[signals.of(second)], cfg.seed, cfg.audit.bootstrap)


def _score_file(
    encoder: str,
    signals: Signals,
    attacked: Mapping[str, Mapping[str, Attacked]],
    correct: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """{"samples": {id: {"role", "label", scores ...}}}; a score that an image does not have is left out."""
    columns: dict[str, np.ndarray] = {"confidence": signals.confidence}
    for attack, found in attacked.items():
        columns[attack] = found[encoder].shown
        columns |= found[encoder].extra
    columns |= {f"{name}_correct": right for name, right in correct.items()}
    samples = {}
    for row, sample_id in enumerate(signals.ids):
        entry: dict[str, Any] = {"role": str(signals.roles[row]), "label": int(signals.labels[row])}
        entry |= {name: float(column[row]) for name, column in columns.items() if np.isfinite(column[row])}
        samples[sample_id] = entry
    return {"encoder": encoder, "samples": samples}


def _plain(value: Any) -> Any:
    """JSON without NaN: what is not finite was not evaluated."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value


def load_scores(folder: Path, encoder: str) -> dict[str, dict[str, Any]]:
    """The raw scores of one encoder, by sample id, as `write_audit` saved them."""
    return json.loads((folder / f"scores-{encoder}.json").read_text(encoding="utf-8"))["samples"]
