"""audit/summary.json: every figure of the audit, with intervals, gaps to the retrained encoder, and verdicts.

Attacks, gaps and utility are functions of the raw scores that `write_audit` saves beside the summary, so that
these figures can be computed again. Differences between encoders are paired: one draw of images serves all
encoders and attacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distunlearn.audit.attacks import Attacked, run_attacks
from distunlearn.audit.figures.earlier import earlier_figures
from distunlearn.audit.figures.level import level
from distunlearn.audit.figures.retained import retained_figures
from distunlearn.audit.figures.retrain_distance import average_gap, iam, tow
from distunlearn.audit.figures.similarity import similarities
from distunlearn.audit.figures.two_sample import describe, two_sample
from distunlearn.audit.figures.utility import correct_predictions
from distunlearn.audit.relearn import Relearned, relearning_figures
from distunlearn.audit.signals.collect import Signals
from distunlearn.common.files import write_json
from distunlearn.config.schema import RunConfig
from distunlearn.config.shape import plain as plain_settings
from distunlearn.verify.figures import Raw, Rules, judge, plain
from distunlearn.verify.scores import raw_scores
from distunlearn.verify.statistics import auc

Scores = dict[str, dict[str, dict[str, Any]]]
AXES = 8  # of the places of images


def summarise(
    signals: Mapping[str, Signals],
    cfg: RunConfig,
    *,
    cost: Mapping[str, float | None],
    coverage: Mapping[str, float],
    relearned: Mapping[str, Relearned] | None = None,
    pooled: Mapping[str, Any] | None = None,
    stress: Mapping[str, Any] | None = None,
    states: Mapping[str, str] | None = None,
    request_of: Mapping[str, int] | None = None,
    persons: np.ndarray | None = None,
    person_coverage: Sequence[Mapping[str, int]] | None = None,
) -> tuple[dict[str, Any], Scores]:
    """Attack, measure, compare and judge.

    Args:
        signals: by encoder: original, unlearned and (but for tier 0) retrained; of the same images in the same order.
        relearned: curves of the relearning attack by encoder; None: it was not run.
        pooled: figures of the shadow encoders (`pooled.pooled_figures`); None: there are none.
        stress: figures of the stress tests (`stress.audit_stress`); None: none was asked for.
        states: digests of the encoders' weights (`Trained.facts`), which the files then name.
        request_of: {id: request} of the images that earlier requests forgot; None: there are none.
        persons: int32 [n], number of the person on each image, -1 where unknown; None: nobody says, or not of one to
            forget. person_coverage: of `coverage_by_person`.

    Returns:
        What `audit/summary.json` and, by encoder, `audit/scores-<encoder>.json` hold: plain JSON, None for "not
        evaluated", never NaN.
    """
    first = signals["original"]
    persons = persons if persons is not None and (persons[first.of("forget")] >= 0).any() else None
    assert all(s.ids == first.ids for s in signals.values()), "one list of images for all encoders"
    found = run_attacks(signals, cfg.seed, cfg.audit.gates.also)
    correct = {name: correct_predictions(s, cfg.audit.neighbours) for name, s in signals.items()}
    states = dict(states or {})
    scores = {
        name: {"encoder": name, "state": states.get(name)} | _score_file(name, s, found, correct[name], persons)
        for name, s in signals.items()
    }
    raw = raw_scores(scores)
    unchanged = "original" in states and states["original"] == states["unlearned"]
    judged = judge(raw, Rules.of(plain_settings(cfg)), unchanged=unchanged)
    summary = {
        **{name: judged[name] for name in ("attacks", "further_attacks", "utility", "persons", "evidence")},
        **_told_apart(signals, judged["attacks"], cfg),
        "similarity": similarities(signals),
        **_completeness(signals, raw, judged["utility"], cfg),
        "level": level(signals),
        "relearning": relearning_figures(relearned, cfg) if relearned else None,
        "pooled": pooled,
        "retained": retained_figures(signals, cfg),
        "stress": stress,
        "earlier": earlier_figures(signals, request_of, cfg) if request_of else None,
        "tier": cfg.audit.tier, "cost": dict(cost), "coverage": dict(coverage),
        "person_coverage": None if person_coverage is None else [dict(row) for row in person_coverage],
        "images": {role: len(first.of(role)) for role in dict.fromkeys(first.roles.tolist())},
        "states": states, "gates": judged["gates"],
    }  # fmt: skip
    return plain(summary), scores


def _told_apart(
    signals: Mapping[str, Signals], attacks: Mapping[str, Mapping[str, Any]], cfg: RunConfig
) -> dict[str, dict[str, Any]]:
    """Two-sample tests by encoder, the second of them as a control beside the power of each attack."""
    first, described = signals["original"], {name: describe(s) for name, s in signals.items()}

    def compared(one: str, other: str) -> dict[str, Any]:
        return {name: _compare(found, first, one, other, cfg) for name, found in described.items()}

    return {
        "two_sample": compared("forget", "third_party_audit"),
        "controls": {
            "third_party_against_holdout": compared("third_party_audit", "holdout"),
            "power": {name: attack["power"] for name, attack in attacks.items()},
        },
    }


def _completeness(
    signals: Mapping[str, Signals],
    raw: Raw,
    utility: Mapping[str, Mapping[str, Any]],
    cfg: RunConfig,
) -> dict[str, Any]:
    """Single numbers against the retrained encoder; None without it."""
    if "retrained" not in signals:
        return dict.fromkeys(("tow", "iam", "average_gap"))
    chosen = [name for name in cfg.audit.average if name in raw.comparisons]
    agreement = {name: auc(comparison) for name, comparison in raw.comparisons["view_agreement"].items()}
    return {
        "tow": tow(signals, agreement),
        "iam": iam(signals),
        "average_gap": average_gap(raw.comparisons, utility, chosen),
    }


def write_audit(folder: Path, summary: Mapping[str, Any], scores: Scores) -> None:
    """Raw scores first, the summary last, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in scores.items():
        write_json(folder / f"scores-{name}.json", content)
    write_json(folder / "summary.json", summary)


# -- controls and raw scores -----------------------------------------------------------------------------------------


def _compare(features: np.ndarray, signals: Signals, first: str, second: str, cfg: RunConfig) -> dict[str, Any]:
    return two_sample(features[signals.of(first)], features[signals.of(second)], cfg.seed, cfg.audit.bootstrap)


def _score_file(
    encoder: str,
    signals: Signals,
    attacked: Mapping[str, Mapping[str, Attacked]],
    correct: Mapping[str, np.ndarray],
    persons: np.ndarray | None = None,
) -> dict[str, Any]:
    """`signs` and `samples`, see `verify.scores`; a score that an image does not have is left out."""
    columns: dict[str, np.ndarray] = {"confidence": signals.confidence}
    signs = {}
    for attack, found in attacked.items():
        columns[attack] = found[encoder].shown
        signs[attack], parts = _parts(attack, signals, found[encoder])
        columns |= parts
    columns |= {f"{name}_correct": right for name, right in correct.items()}
    columns |= _places(signals) if encoder == "original" else {}
    samples = {}
    for row, sample_id in enumerate(signals.ids):
        entry: dict[str, Any] = {"role": str(signals.roles[row]), "label": int(signals.labels[row])}
        if persons is not None and persons[row] >= 0:
            entry["person"] = int(persons[row])
        entry |= {name: float(column[row]) for name, column in columns.items() if np.isfinite(column[row])}
        samples[sample_id] = entry
    return {"signs": signs, "samples": samples}


def _places(signals: Signals) -> dict[str, np.ndarray]:
    """Where images to forget and held-out ones lie among them: the principal axes of their embeddings, in the standard
    deviation of the first one.
    """
    rows = np.concatenate([signals.of("forget"), signals.of("holdout")])
    embedding = signals.embedding[rows].astype(np.float64)
    embedding /= np.maximum(np.linalg.norm(embedding, axis=1, keepdims=True), 1e-12)
    left, sizes, _ = np.linalg.svd(embedding - embedding.mean(0), full_matrices=False)
    found = np.full((len(signals.ids), min(AXES, len(sizes))), np.nan)
    places = (left * sizes / max(sizes[0], 1e-12))[:, :AXES] * np.sqrt(len(rows))
    found[rows] = np.round(places * np.where((places**3).sum(0) < 0, -1, 1), 4)  # an axis has no sign of its own
    return {f"place_{axis}": column for axis, column in enumerate(found.T)}


def _parts(attack: str, signals: Signals, found: Attacked) -> tuple[int, dict[str, np.ndarray]]:
    """The sign of the shown scores if they are the compared ones, else 1 and the compared scores of every part."""
    forget, holdout = signals.of("forget"), signals.of("holdout")
    if len(found.comparison.parts) == 1:
        part = found.comparison.parts[0]
        compared = np.concatenate([part.positives, part.negatives])
        shown = found.shown[np.concatenate([forget, holdout[part.rows]])]
        for sign in (1, -1):
            if len(part.rows) == len(holdout) and np.array_equal(sign * shown, compared):
                return sign, {}
    columns = {}
    for number, part in enumerate(found.comparison.parts):
        column = np.full(len(signals.ids), np.nan)
        column[forget], column[holdout[part.rows]] = part.positives, part.negatives
        columns[f"{attack}_fold{number}"] = column
    return 1, columns
