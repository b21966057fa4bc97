"""Tables, pictures and the dated document of benchmarks/forgetting.py, from the cells' JSON files alone.

The average gap of a method on an encoder is the mean of |figure(unlearned) - figure(retrained)|, in points of 100, over
the AUCs of four attacks, kNN and the linear probe. The four attacks are those with the largest mean |AUC - 0.5| on the
original encoders of the validation groups, whose forget sets are others; they are chosen once for the whole grid.
Intervals are Student's t over seeds, paired by seed for differences (95 %): they hold the chance in training and in the
choice of images. With fewer than two seeds there are none.
"""

from __future__ import annotations

import json
import platform
import textwrap
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy import stats

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

__all__ = ["average_gap", "paired", "rank_attacks", "rows_of", "t_interval", "write_document"]

OURS = "third_party"
CHOSEN = 4
UTILITIES = ("knn", "linear_probe")
Result = Mapping[str, Any]


def attacks_of(result: Result) -> dict[str, Any]:
    """All attacks of a cell, judged and further ones."""
    return {**result["summary"]["attacks"], **(result["summary"]["further_attacks"] or {})}


def rank_attacks(results: Sequence[Result]) -> list[tuple[str, float]]:
    """(attack, mean |AUC - 0.5| on the original encoders of validation cells), the strongest first.

    Attacks that look at a second encoder do not take part: at tier 0 there is none.
    """
    found: dict[str, list[float]] = {}
    for result in results:
        if result["cell"]["validation"] and "summary" in result:
            for name, figures in attacks_of(result).items():
                if name not in ("rmia", "lira_alignment", "alignment_gap"):
                    found.setdefault(name, []).append(abs(figures["original"]["auc"] - 0.5))
    return sorted(((name, float(np.mean(v))) for name, v in found.items()), key=lambda pair: -pair[1])


def average_gap(result: Result, attacks: Sequence[str]) -> float:
    """In points; see the module's text. A utility without labels is left out."""
    found = attacks_of(result)
    gaps = [abs(found[name]["unlearned"]["auc"] - found[name]["retrained"]["auc"]) for name in attacks]
    for name in UTILITIES:
        utility = result["summary"]["utility"][name]
        if utility["unlearned"] is not None:
            gaps.append(abs(utility["unlearned"] - utility["retrained"]))
    return 100 * float(np.mean(gaps))


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean with its 95 % t-interval; NaN ends for fewer than two values."""
    mean = float(np.mean(values)) if len(values) else float("nan")
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    reach = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return mean, mean - reach, mean + reach


def paired(ours: Mapping[Any, float], other: Mapping[Any, float]) -> tuple[float, float, float]:
    """other - ours over the seeds (or runs) that both have: above 0 where ours has the smaller gap."""
    seeds = sorted(set(ours) & set(other))
    return t_interval([other[seed] - ours[seed] for seed in seeds])


def rows_of(results: Sequence[Result], attacks: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """{setting: {method: figures}} over seeds; methods that ended with an error have `failed` seeds."""
    grouped: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        cell = result["cell"]
        if not cell["validation"]:
            setting = f"{cell['dataset']}-{cell['objective']}-{cell['encoder']}"
            label = cell["method"] + (f" ({cell['variant']})" if cell.get("variant") else "")
            grouped.setdefault(setting, {}).setdefault(label, []).append(result)
    return {s: {m: _figures(found, attacks) for m, found in methods.items()} for s, methods in grouped.items()}


def _figures(results: Sequence[Result], attacks: Sequence[str]) -> dict[str, Any]:
    whole = [r for r in results if "summary" in r]

    def mean(*path: str) -> float:
        values = [_at(r["summary"], path) for r in whole]
        values = [v for v in values if v is not None]
        return float(np.mean(values)) if values else float("nan")

    costs = [r["summary"]["cost"] for r in whole]
    return {
        "gaps": {r["cell"]["seed"]: average_gap(r, attacks) for r in whole},
        "failed": len(results) - len(whole),
        "verdicts": [r["verdict"] or f"exit {r['exit_code']}" for r in results],
        "view_agreement": mean("attacks", "view_agreement", "unlearned", "auc"),
        "retrained_agreement": mean("attacks", "view_agreement", "retrained", "auc"),
        "knn": mean("utility", "knn", "unlearned"),
        "knn_original": mean("utility", "knn", "original"),
        "tow": mean("tow", "tow"),
        "iam": mean("iam", "unlearned"),
        "rmia_gap": mean("further_attacks", "rmia", "gap", "auc"),
        "relearn_gap": mean("relearning", "gap", "auc"),
        "cka": mean("similarity", "forget", "to_retrained", "unlearned"),
        "cost": float(np.mean([c["unlearn_images"] / c["retrain_images"] for c in costs])) if costs else float("nan"),
        "seconds": float(np.mean([c["unlearn_seconds"] / c["retrain_seconds"] for c in costs])) if costs else np.nan,
    }


def _at(tree: Any, path: Sequence[str]) -> float | None:
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def write_document(
    path: Path, grid: str, results: Sequence[Result], command: str, tuned: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """The document, and beside it `<name>-<setting>.png` for every setting with figures."""
    ranking = rank_attacks(results)
    attacks = [name for name, _ in ranking[:CHOSEN]]
    if not attacks:
        raise SystemExit("no validation cell has finished, so that the four attacks of the average gap are not chosen")
    settings = rows_of(results, attacks)
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [_head(grid, results, command, ranking, attacks)]
    for setting, methods in settings.items():
        picture = path.with_name(f"{path.stem}-{setting}.png")
        draw(picture, setting, methods)
        parts += [f"## {setting}", _table(methods), f"![forgetting, cost and utility]({picture.name})"]
    if len(settings) > 1:
        parts += ["## Over all settings", _overall(settings)]
    encoders = {setting.rpartition("-")[2] for setting in settings}
    for encoder in sorted(encoders) if len(encoders) > 1 else ():
        of_encoder = {setting: methods for setting, methods in settings.items() if setting.endswith(f"-{encoder}")}
        parts += [f"## Over all settings of {encoder}", _overall(of_encoder)]
    parts += ["## Who is ahead", _ahead(settings)]
    parts += ["## Settings of the methods", _chosen(tuned)] if tuned else []
    parts += ["## Raw figures", _raw(results)]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _head(grid: str, results: Sequence[Result], command: str, ranking: list, attacks: list[str]) -> str:
    env = next((r["environment"] for r in results if "environment" in r), {})
    packages = ", ".join(f"{name} {version}" for name, version in (env.get("packages") or {}).items() if version)
    cores = (env.get("cpu") or {}).get("cores")
    ranked = ", ".join(f"{name} {100 * power:.1f}" for name, power in ranking)
    hours = sum(r["processor_seconds"] for r in results) / 3600
    paragraphs = [
        f"Date: {date.today()}. Python {env.get('python')}, distunlearn {env.get('distunlearn')}, {packages}. "
        f"Hardware: {cores} cores of a {platform.machine()} CPU; {hours:.2f} hours of processor time. "
        "GPUs: not measured.",
        f"Command: `{command}`",
        "Average gap: mean over the AUCs of four attacks, kNN and linear probe of |unlearned - retrained|, in points. "
        "The four were ranked on the validation groups by power, |AUC - 0.5| on the original encoder in points: "
        f"{ranked}. Chosen: {', '.join(attacks)}. Intervals: 95 %, Student's t over seeds; differences paired by seed. "
        f"A method is *tied* with `{OURS}` where the interval of the difference contains 0.",
    ]  # fmt: skip
    wrapped = [textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) for text in paragraphs]
    return "\n\n".join([f"# Forgetting benchmark, grid {grid}", *wrapped])


HEADER = (
    "method", "average gap", "minus that of third_party", "view agreement AUC (retrained)", "RMIA gap",
    "relearning gap", "IAM", "ToW", "CKA to retrained", "kNN % (original)", "images, % of retraining",
    "seconds, % of retraining", "verdicts",
)  # fmt: skip


def _table(methods: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    ours = methods.get(OURS, {}).get("gaps", {})
    for name, row in sorted(methods.items(), key=lambda item: t_interval(list(item[1]["gaps"].values()))[0]):
        cells = [
            name,
            _shown(*t_interval(list(row["gaps"].values()))),
            "" if name == OURS else _shown(*paired(ours, row["gaps"]), sign=True),
            f"{row['view_agreement']:.3f} ({row['retrained_agreement']:.3f})",
            f"{row['rmia_gap']:+.3f}",
            f"{row['relearn_gap']:+.3f}",
            f"{row['iam']:.3f}",
            f"{row['tow']:.3f}",
            f"{row['cka']:.3f}",
            f"{100 * row['knn']:.1f} ({100 * row['knn_original']:.1f})",
            f"{100 * row['cost']:.1f}",
            f"{100 * row['seconds']:.1f}",
            ", ".join(row["verdicts"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(mean: float, low: float, high: float, sign: bool = False) -> str:
    form = "+.2f" if sign else ".2f"
    if not np.isfinite(mean):
        return "no result"
    return f"{mean:{form}}" + (f" [{low:{form}}, {high:{form}}]" if np.isfinite(low) else " (one seed)")


def _overall(settings: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Means over all runs of all settings; differences paired by setting and seed."""
    gaps: dict[str, dict[tuple[str, int], float]] = {}
    for setting, methods in settings.items():
        for name, row in methods.items():
            gaps.setdefault(name, {}).update({(setting, seed): gap for seed, gap in row["gaps"].items()})
    ours = gaps.get(OURS, {})
    lines = [f"| method | runs | average gap | minus that of {OURS} | kNN lost, points | images, % of retraining |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name, own in sorted(gaps.items(), key=lambda item: t_interval(list(item[1].values()))[0]):
        rows = [methods[name] for methods in settings.values() if methods.get(name, {}).get("gaps")]
        if not rows:
            lines.append(f"| {name} | 0 | no result | | | |")
            continue
        lost = float(np.mean([100 * (row["knn_original"] - row["knn"]) for row in rows]))
        cost = float(np.mean([100 * row["cost"] for row in rows]))
        minus = "" if name == OURS else _shown(*paired(ours, own), sign=True)
        mean = t_interval(list(own.values()))[0]
        lines.append(f"| {name} | {len(own)} | {mean:.2f} | {minus} | {lost:.1f} | {cost:.1f} |")
    note = (
        "Differences are paired by setting and seed; their interval treats all runs as independent, though settings of "
        "one data set and seed forget the same images."
    )
    return "\n".join(lines) + "\n\n" + textwrap.fill(note, 120)


def _chosen(tuned: Mapping[str, Mapping[str, Any]]) -> str:
    """What each search chose; a method that is not there has the grid's settings."""
    lines = ["| data set, or data set and encoder | method | settings |", "|---|---|---|"]
    for dataset, methods in tuned.items():
        for name, settings in methods.items():
            said = ", ".join(f"`{key}={value:.3g}`" if isinstance(value, float) else f"`{key}={value}`"
                             for key, value in settings.items())  # fmt: skip
            lines.append(f"| {dataset} | {name} | {said or 'those of the grid'} |")
    return "\n".join(lines)


def _ahead(settings: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Per setting: methods with a smaller, a tied and a larger gap than ours, by the paired interval."""
    lines = ["| setting | smaller gap than third_party | tied | larger gap |", "|---|---|---|---|"]
    for setting, methods in settings.items():
        ours, places = methods.get(OURS, {}).get("gaps", {}), {"smaller": [], "tied": [], "larger": []}
        for name, row in methods.items():
            mean, low, high = paired(ours, row["gaps"])
            if name == OURS or not np.isfinite(mean):
                continue
            decided = np.isfinite(low) and (low > 0 or high < 0)
            places["tied" if not decided else "larger" if mean > 0 else "smaller"].append(name)
        lines.append(f"| {setting} | " + " | ".join(", ".join(names) or "-" for names in places.values()) + " |")
    text = "\n".join(lines)
    if any(len(row["gaps"]) == 1 for methods in settings.values() for row in methods.values()):
        text += "\n\nWith one seed no difference is decided, and such a method counts as tied."
    return text


def draw(path: Path, setting: str, methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Cost across, average gap up, utility lost by colour; the best place is the lower left, in a light colour."""
    figure, axes = plt.subplots(figsize=(9, 4.5), constrained_layout=True)
    shown = {name: row for name, row in methods.items() if row["gaps"]}
    across = [max(100 * row["cost"], 0.1) for row in shown.values()]
    up = [t_interval(list(row["gaps"].values()))[0] for row in shown.values()]
    lost = [100 * (row["knn_original"] - row["knn"]) for row in shown.values()]
    dots = axes.scatter(across, up, c=lost, cmap="viridis_r", s=70, edgecolors="black", linewidths=0.5)
    order = sorted(range(len(up)), key=lambda at: -up[at])
    names, least, span = list(shown), min(up), (max(up) - min(up)) or 1.0
    places = np.linspace(1.0, 0.0, len(order)) if len(order) > 1 else [0.5]
    for at, place in zip(order, places, strict=True):  # names in a column of their own: methods lie close together
        axes.annotate(
            f"{names[at]}, {up[at]:.1f}", (across[at], up[at]), xytext=(1.04, place), textcoords="axes fraction",
            fontsize=8, va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "grey", "relpos": (0, 0.5)},
        )  # fmt: skip
    axes.set_ylim(least - 0.08 * span, least + 1.08 * span)
    axes.set_xlim(0.07, 1.5 * max([100, *across]))  # before the scale, which would look for limits of its own
    axes.set_xscale("log")
    axes.set_xlabel("images passed, % of retraining (none: drawn at 0.1)")
    axes.set_ylabel("average gap to retrained, points")
    axes.set_title(setting)
    figure.colorbar(dots, label="kNN accuracy lost, points", location="left", pad=0.02)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _raw(results: Sequence[Result]) -> str:
    """One line a cell; everything else is in the cells' JSON files."""
    lines = []
    for result in results:
        if "summary" not in result:
            lines.append(json.dumps({"cell": result["cell"], "exit_code": result["exit_code"]}))
            continue
        aucs = {n: [f[e]["auc"] for e in ("original", "unlearned", "retrained")] for n, f in attacks_of(result).items()}
        utility = {n: [result["summary"]["utility"][n][e] for e in ("original", "unlearned", "retrained")]
                   for n in UTILITIES}  # fmt: skip
        row = {"cell": result["cell"], "verdict": result["verdict"], "auc": aucs, "utility": utility}
        lines.append(json.dumps(row | {"cost": result["summary"]["cost"]}))
    return (
        "<details><summary>One line a cell: original, unlearned, retrained</summary>\n\n```json\n"
        + "\n".join(lines)
        + "\n```\n\n</details>"
    )
