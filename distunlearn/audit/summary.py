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

from distunlearn.audit.attacks import ATTACKS, Attacked
from distunlearn.audit.gates import Gate, equivalence, no_loss, overall
from distunlearn.audit.signals import Signals
from distunlearn.audit.statistics import (
    Draws,
    auc,
    auc_bootstrap,
    draw_images,
    ks_p_value,
    percentile_interval,
    tpr_at_fpr,
)
from distunlearn.audit.two_sample import describe, two_sample
from distunlearn.audit.utility import UTILITIES, correct_predictions
from distunlearn.config import RunConfig
from distunlearn.engine.checkpoint import write_json

__all__ = ["ENCODERS", "load_scores", "summarise", "write_audit"]

ENCODERS = ("original", "unlearned", "retrained")
FIGURE_CONFIDENCE = 0.95  # of the intervals of single figures; those of gaps are AuditConfig.gates.confidence
LOW_RATE = 0.01

Scores = dict[str, dict[str, dict[str, Any]]]


def summarise(
    signals: Mapping[str, Signals],
    cfg: RunConfig,
    *,
    cost: Mapping[str, float],
    coverage: Mapping[str, float],
) -> tuple[dict[str, Any], Scores]:
    """Attack, measure, compare and judge.

    Args:
        signals: by encoder: original, unlearned, retrained; of the same images in the same order.

    Returns:
        What `audit/summary.json` and, by encoder, `audit/scores-<encoder>.json` hold: plain JSON, None for "not
        evaluated", never NaN.
    """
    first = signals["original"]
    assert all(signals[name].ids == first.ids for name in ENCODERS), "one list of images for all encoders"
    draws = draw_images(len(first.of("forget")), len(first.of("holdout")), cfg.audit.bootstrap, cfg.seed)
    attacked = {
        attack: {name: ATTACKS[attack](signals[name], cfg.seed) for name in ENCODERS} for attack in ATTACKS
    }
    correct = {name: correct_predictions(signals[name], cfg.audit.neighbours) for name in ENCODERS}
    attacks = {name: _attack_figures(name, found, draws, cfg) for name, found in attacked.items()}
    utility, utility_gates = _utility_figures(correct, first, draws, cfg)
    gates = {name: figures["gap"] for name, figures in attacks.items()} | utility_gates
    verdict = overall(gate["verdict"] for gate in gates.values())
    described = {name: describe(signals[name]) for name in ENCODERS}
    summary = {
        "attacks": attacks,
        "utility": utility,
        "two_sample": {
            name: _compare(described[name], first, "forget", "third_party_audit", cfg) for name in ENCODERS
        },
        "controls": {
            "third_party_against_holdout": {
                name: _compare(described[name], first, "third_party_audit", "holdout", cfg) for name in ENCODERS
            },
            "power": {name: figures["power"] for name, figures in attacks.items()},
        },
        "cost": dict(cost),
        "coverage": dict(coverage),
        "images": {role: len(first.of(role)) for role in dict.fromkeys(first.roles.tolist())},
        "gates": {"verdict": verdict, **gates},
    }
    scores = {name: _score_file(name, signals[name], attacked, correct[name]) for name in ENCODERS}
    return _plain(summary), scores


def write_audit(folder: Path, summary: Mapping[str, Any], scores: Scores) -> None:
    """Raw scores first, the summary last, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in scores.items():
        write_json(folder / f"scores-{name}.json", content)
    write_json(folder / "summary.json", summary)


# -- attacks ---------------------------------------------------------------------------------------------------------


def _attack_figures(attack: str, found: Mapping[str, Attacked], draws: Draws, cfg: RunConfig) -> dict[str, Any]:
    sampled = {name: auc_bootstrap(found[name].comparison, draws) for name in ENCODERS}
    result: dict[str, Any] = {}
    for name in ENCODERS:
        comparison = found[name].comparison
        low, high = percentile_interval(sampled[name], FIGURE_CONFIDENCE)
        result[name] = {
            "auc": auc(comparison),
            "auc_low": low,
            "auc_high": high,
            "tpr_at_1pct_fpr": tpr_at_fpr(comparison, LOW_RATE),
            "ks_p": ks_p_value(comparison),
        }
    original = result["original"]
    powered = bool(original["auc_low"] > 0.5 or original["auc_high"] < 0.5)
    gates = cfg.audit.gates
    margin = gates.view_agreement if attack == "view_agreement" else gates.attack
    value = result["unlearned"]["auc"] - result["retrained"]["auc"]
    low, high = percentile_interval(sampled["unlearned"] - sampled["retrained"], gates.confidence)
    images = min(draws.positives.shape[1], draws.negatives.shape[1])
    gate = equivalence(value, low, high, margin, powered=powered, images=images)
    result["gap"] = _gap(gate, "auc", margin)
    power = {"auc": original["auc"], "low": original["auc_low"], "high": original["auc_high"]}
    result["power"] = power | {"beats_chance": powered}
    return result


def _gap(gate: Gate, key: str, margin: float) -> dict[str, Any]:
    found = asdict(gate)
    return {key: found.pop("value"), **found, "margin": margin}


# -- utility ---------------------------------------------------------------------------------------------------------


def _utility_figures(
    correct: Mapping[str, Mapping[str, np.ndarray]], signals: Signals, draws: Draws, cfg: RunConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Accuracies, their gaps to the retrained encoder, and the gates on their change from the original encoder."""
    gates = cfg.audit.gates
    holdout = signals.of("holdout")
    utility, judged = {}, {}
    for name in UTILITIES:
        rights = {encoder: correct[encoder][name][holdout] for encoder in ENCODERS}
        tested = np.isfinite(rights["original"])
        weights = draws.negatives[:, tested].astype(np.float64)
        rights = {encoder: right[tested] for encoder, right in rights.items()}
        figures: dict[str, Any] = {encoder: _mean(right) for encoder, right in rights.items()}
        change = _difference(rights["unlearned"], rights["original"], weights, gates.confidence)
        gap = _difference(rights["unlearned"], rights["retrained"], weights, gates.confidence)
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
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value


def load_scores(folder: Path, encoder: str) -> dict[str, dict[str, Any]]:
    """The raw scores of one encoder, by sample id, as `write_audit` saved them."""
    return json.loads((folder / f"scores-{encoder}.json").read_text(encoding="utf-8"))["samples"]
