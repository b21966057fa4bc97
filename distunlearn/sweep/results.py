"""What a sweep chooses by, and what it writes down: one JSON file a task, then results.json and results.md.

Selection rule. On the base of the validation seed the attacks are ranked once, by how far their AUC on the original
encoder is from 0.5, and the strongest are kept (4 unless told otherwise). The score of a run is its average gap,

    mean of |AUC(unlearned) - AUC(retrained)| over those attacks and |accuracy(unlearned) - accuracy(retrained)|
    over the utilities,

and of a method's trials the one with the smallest score is chosen; of equal ones the one that passed fewer images
through an encoder, then the earlier one. A trial that diverged, or has a figure that was not evaluated, has no score
and is never chosen, but it has used its share of the budget. What is reported is the same score on the report seeds,
whose images to forget no trial of the sweep was asked to forget.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distunlearn.verify.records import read_record
from distunlearn.verify.run import SUMMARY_FIELDS


def strongest(summary: Mapping[str, Any], count: int) -> list[str]:
    """The `count` attacks whose AUC on the original encoder is farthest from 0.5, strongest first."""
    power = {}
    for name, figures in summary["attacks"].items():
        found = figures.get("original", {}).get("auc")
        if _is_number(found):
            power[name] = abs(found - 0.5)
    return sorted(power, key=lambda name: (-power[name], name))[:count]


def gaps(summary: Mapping[str, Any], attacks: Sequence[str]) -> dict[str, float | None]:
    """|unlearned - retrained| of these attacks and of every utility; None: not evaluated."""
    found = {name: summary["attacks"].get(name, {}).get("gap", {}).get("auc") for name in attacks}
    found |= {name: figures.get("gap", {}).get("accuracy") for name, figures in summary["utility"].items()}
    return {name: abs(value) if _is_number(value) else None for name, value in found.items()}


def average_gap(found: Mapping[str, float | None]) -> float | None:
    """The mean of all gaps; None where one of them was not evaluated, or there are none."""
    values = list(found.values())
    return None if not values or any(v is None for v in values) else sum(v or 0.0 for v in values) / len(values)


def facts(run_dir: Path) -> dict[str, Any]:
    """What a task keeps of its run: all that scores, tables and costs are made of."""
    summary = read_record(run_dir / "audit" / "summary.json", SUMMARY_FIELDS)
    attacks = {
        name: {key: figures[key] for key in ("original", "unlearned", "retrained", "gap") if key in figures}
        for name, figures in summary["attacks"].items()
    }
    return {
        "attacks": attacks, "utility": summary["utility"], "cost": summary["cost"], "coverage": summary["coverage"],
        "verdict": summary["gates"]["verdict"],
    }  # fmt: skip


def choose(trials: Iterable[Mapping[str, Any]], attacks: Sequence[str]) -> Mapping[str, Any] | None:
    """The trial that the rule above chooses; None if none has a score. trials: result files of one method."""
    scored = []
    for trial in trials:
        score = average_gap(gaps(trial["figures"], attacks)) if trial["figures"] else None
        if score is not None:
            scored.append((score, trial["figures"]["cost"]["unlearn_images"], trial["index"], trial))
    return min(scored, key=lambda row: row[:3])[3] if scored else None


def page(results: Mapping[str, Any]) -> str:
    """results.md: a table of the methods, best first, under the rule and what was run."""
    seeds = ", ".join(map(str, results["seeds"]))
    lines = [
        f"# Sweep: {results['recipe']}, {results['trials']} trials a method, {results['search']} search",
        "",
        f"Chosen on seed {results['validation_seed']} and {results['validation_images']} images to forget, reported on "
        f"seed {seeds} and images",
        "that no trial was asked to forget. Average gap to the retrained encoder over "
        + ", ".join([*results["attacks"], *results["utilities"]])
        + ".",
        "The first trial of every method has the recipe's own settings.",
        "",
        "| method | average gap, reported | by seed | validation: chosen | validation: recipe's settings "
        "| failed trials | images, share of retraining | chosen settings |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = sorted(results["methods"].items(), key=lambda item: _or_last(item[1]["score"]))
    for name, found in order:
        settings = ", ".join(f"`{k}={v}`" for k, v in found["settings"].items()) or "the recipe's"
        by_seed = " / ".join(_shown(value) for value in found["scores"])
        lines.append(
            f"| {name} | {_shown(found['score'])} | {by_seed} | {_shown(found['validation'])} "
            f"| {_shown(found['default'])} | {found['failed']} of {found['tried']} | {_percent(found['share'])} "
            f"| {settings if found['tried'] > found['failed'] else 'none: no trial ended with a score'} |"
        )
    return "\n".join(lines) + "\n"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _or_last(value: float | None) -> float:
    return math.inf if value is None else value


def _shown(value: float | None) -> str:
    return "not evaluated" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "not evaluated" if value is None else f"{100 * value:.1f} %"
