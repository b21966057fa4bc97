"""Run recipes over seeds, pool the gaps to the retrained encoder, and write a dated document.

    python benchmarks/forgetting_seeds.py digits --seeds 0 1 2 --runs runs/seeds --document benchmarks/results/NAME.md

Each run is the command line's own `distunlearn run`; finished runs are kept, interrupted ones go on. Pooled interval:
the mean over seeds of the gap, with the mean over seeds of each run's paired bootstrap draws (independent across seeds:
other images play the roles) behind it, recomputed from the raw scores in audit/. With `--controls` every seed is
also run with methods that must fail: `none` and `random_init`, on the same original and retrained encoders.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from distunlearn.audit.figures.utility import UTILITIES
from distunlearn.audit.summary import load_scores
from distunlearn.config.load import load_config
from distunlearn.verify.figures import JUDGED
from distunlearn.verify.gates import equivalence, no_loss
from distunlearn.verify.statistics import Comparison, Part, auc, auc_bootstrap, draw_images, percentile_interval

LOW_IS_MEMBER = ("gradient_norm_network", "gradient_norm_head")
VERDICTS = {0: "pass", 6: "fail", 7: "inconclusive"}


@dataclass(frozen=True)
class Run:
    """One finished run: where it lies, its exit code and its summary."""

    recipe: str
    seed: int
    method: str
    folder: Path
    code: int
    summary: dict

    def command(self) -> str:
        extra = "" if self.method == "third_party" else f" --set method.name={self.method}"
        return f"distunlearn run {self.recipe} --set seed={self.seed}{extra}"


def run(recipe: str, seed: int, runs: Path, settings: list[str], method: str | None = None) -> Run:
    """One `distunlearn run`, or what it left behind when it finished before."""
    base = runs / f"{recipe}-seed{seed}"
    folder = base if method is None else runs / f"{recipe}-seed{seed}-{method}"
    chosen = [f"seed={seed}", *settings]
    if method is not None:
        chosen += [f"method.name={method}", f"runtime.reuse={base}"]
    arguments = [part for value in chosen for part in ("--set", value)]
    command = [sys.executable, "-m", "distunlearn", "run", recipe, "--out", str(folder), *arguments]
    code = subprocess.run(command, check=False).returncode
    if code not in VERDICTS:
        raise SystemExit(f"{' '.join(command)} ended with exit code {code}")
    summary = json.loads((folder / "audit/summary.json").read_text())
    return Run(recipe, seed, method or "third_party", folder, code, summary)


def comparison(samples: dict[str, dict], attack: str) -> Comparison:
    """The attack's scores of forget against holdout, from the raw scores of one encoder."""
    forget = [row for row in samples.values() if row["role"] == "forget"]
    holdout = [row for row in samples.values() if row["role"] == "holdout"]
    if attack != "encodermi_vector":
        sign = -1 if attack in LOW_IS_MEMBER else 1
        return Comparison.of(*(np.array([sign * row[attack] for row in rows]) for rows in (forget, holdout)))
    parts = []
    for fold in (0, 1):
        name = f"encodermi_vector_fold{fold}"
        rows = np.array([i for i, row in enumerate(holdout) if name in row])
        positives = np.array([row[name] for row in forget])
        parts.append(Part(positives, np.array([holdout[i][name] for i in rows]), rows))
    return Comparison(tuple(parts))


def pooled(runs: list[Run]) -> list[dict]:
    """One row per attack and utility: mean over seeds, pooled interval, verdict by the gates of the config."""
    cfg = load_config(None, runs[0].folder / "run.yaml", [])
    gates, draws = cfg.audit.gates, cfg.audit.bootstrap
    scores = [
        {name: load_scores(r.folder / "audit", name) for name in ("original", "unlearned", "retrained")} for r in runs
    ]
    sizes = [
        [sum(row["role"] == role for row in s["original"].values()) for role in ("forget", "holdout")] for s in scores
    ]
    drawn = [draw_images(*size, draws, r.seed) for size, r in zip(sizes, runs, strict=True)]
    rows = []
    for attack in JUDGED:
        margin = gates.view_agreement if attack == "view_agreement" else gates.attack
        values, sampled, levels = [], [], []
        for found, weights in zip(scores, drawn, strict=True):
            compared = {name: comparison(samples, attack) for name, samples in found.items()}
            levels.append([auc(compared[name]) for name in ("original", "unlearned", "retrained")])
            values.append(levels[-1][1] - levels[-1][2])
            sampled.append(
                auc_bootstrap(compared["unlearned"], weights) - auc_bootstrap(compared["retrained"], weights)
            )
        low, high = percentile_interval(np.mean(sampled, axis=0), gates.confidence)
        powered = all(r.summary["attacks"][attack]["power"]["beats_chance"] for r in runs)
        gate = equivalence(
            float(np.mean(values)), low, high, margin, powered=powered, images=min(min(size) for size in sizes)
        )
        rows.append({"name": attack, "levels": np.mean(levels, axis=0), "gate": gate, "margin": f"±{margin:g}"})
    for name in UTILITIES:
        rows.append(_pooled_utility(name, scores, drawn, gates))
    return rows


def _pooled_utility(name: str, scores: list[dict], drawn: list, gates) -> dict:
    column = f"{name}_correct"
    values, sampled, levels = [], [], []
    for found, weights in zip(scores, drawn, strict=True):
        right = {
            encoder: np.array([row[column] for row in samples.values() if row["role"] == "holdout"])
            for encoder, samples in found.items()
        }
        levels.append([right[encoder].mean() for encoder in ("original", "unlearned", "retrained")])
        delta = right["unlearned"] - right["original"]
        values.append(delta.mean())
        sampled.append(weights.negatives @ delta / weights.negatives.sum(1))
    low, high = percentile_interval(np.mean(sampled, axis=0), gates.confidence)
    allowed = gates.utility_points / 100
    gate = no_loss(float(np.mean(values)), low, high, allowed, images=len(delta))
    return {"name": name, "levels": np.mean(levels, axis=0), "gate": gate, "margin": f"above −{allowed:g}"}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def run_rows(runs: list[Run]) -> list[list[str]]:
    """Per run: verdict, view agreement before / after / retrained, its gap, utility, cost, coverage."""
    rows = []
    for r in runs:
        agreement, s = r.summary["attacks"]["view_agreement"], r.summary
        gap = agreement["gap"]
        worst = min(s["gates"][name]["low"] for name in UTILITIES)
        share = s["cost"]["unlearn_images"] / s["cost"]["retrain_images"]
        covered = s["coverage"]
        rows.append(
            [
                f"{r.recipe}, seed {r.seed}",
                r.method,
                f"{VERDICTS[r.code]} ({r.code})",
                " / ".join(f"{agreement[name]['auc']:.3f}" for name in ("original", "unlearned", "retrained")),
                f"{gap['auc']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]",
                " / ".join(f"{100 * s['utility']['knn'][name]:.1f}" for name in ("original", "unlearned", "retrained")),
                f"{100 * worst:+.1f}",
                f"{100 * share:.1f} %",
                f"{s['cost']['unlearn_seconds']:.0f} / {s['cost']['retrain_seconds']:.0f}",
                f"{covered['consumed_min']} to {covered['consumed_max']}, {covered['used_as_retain']}",
            ]
        )
    return rows


RUN_HEADER = [
    "run", "method", "verdict (exit code)", "view agreement AUC: original / unlearned / retrained",
    "gap to retrained, 90 % interval", "kNN %: original / unlearned / retrained",
    "lower end of the worse utility change, points", "images, share of retraining", "seconds: unlearn / retrain",
    "times consumed, used as retain",
]  # fmt: skip


def attack_rows(runs: list[Run]) -> list[list[str]]:
    """Per run and attack: AUC of the three encoders, gap, verdict."""
    rows = []
    for r in runs:
        for attack, found in r.summary["attacks"].items():
            gap = found["gap"]
            rows.append(
                [f"{r.recipe}, seed {r.seed}", r.method, attack]
                + [f"{found[name]['auc']:.3f}" for name in ("original", "unlearned", "retrained")]
                + [f"{gap['auc']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]", gap["verdict"], gap["reason"] or ""]
            )
    return rows


def document(title: str, runs: list[Run], controls: list[Run], command: str) -> str:
    env = json.loads((runs[0].folder / "env.json").read_text())
    versions = ", ".join(f"{name} {value}" for name, value in env["packages"].items() if value)
    parts = [
        f"# {title}",
        f"Date: {date.today()}. Python {env['python']}, distunlearn {env['distunlearn']}, {versions}. "
        f"Hardware: {env['cpu']['model']}, {env['cpu']['cores']} cores, {env['memory_gib']} GiB, no GPU "
        f"({platform.machine()}). GPUs: not measured.",
        f"Command: `{command}`",
        "## Runs",
        table(RUN_HEADER, run_rows([*runs, *controls])),
    ]
    for recipe in dict.fromkeys(r.recipe for r in runs):
        chosen = [r for r in runs if r.recipe == recipe]
        if len(chosen) < 2:
            continue
        seeds = ", ".join(str(r.seed) for r in chosen)
        rows = [
            [row["name"], " / ".join(f"{v:.3f}" for v in row["levels"]),
             f"{row['gate'].value:+.4f} [{row['gate'].low:+.4f}, {row['gate'].high:+.4f}]", row["margin"],
             row["gate"].verdict, row["gate"].reason or ""]
            for row in pooled(chosen)
        ]  # fmt: skip
        parts += [
            f"## {recipe}, pooled over seeds {seeds}",
            "Attacks: AUC(unlearned) − AUC(retrained). Utility: accuracy(unlearned) − accuracy(original). "
            "90 % intervals from paired bootstrap draws, averaged over the seeds.",
            table(
                [
                    "figure",
                    "mean: original / unlearned / retrained",
                    "difference",
                    "margin",
                    "verdict",
                    "why not a pass",
                ],
                rows,
            ),
        ]
    columns = ["run", "method", "attack", "original", "unlearned", "retrained"]
    header = [*columns, "gap, 90 % interval", "verdict", "why not a pass"]
    parts += ["## All attacks", table(header, attack_rows([*runs, *controls])), "## Raw summaries"]
    for r in [*runs, *controls]:
        raw = json.dumps(r.summary)
        parts.append(f"<details><summary>{r.command()}</summary>\n\n```json\n{raw}\n```\n\n</details>")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--controls", action="store_true", help="also run methods that must fail")
    parser.add_argument("--title", default="Forgetting against retraining, over seeds")
    parser.add_argument("--document", type=Path)
    chosen = parser.parse_args()
    runs = [run(recipe, seed, chosen.runs, chosen.settings) for recipe in chosen.recipes for seed in chosen.seeds]
    controls = []
    if chosen.controls:
        controls = [
            run(recipe, seed, chosen.runs, chosen.settings, method)
            for recipe in chosen.recipes for seed in chosen.seeds for method in ("none", "random_init")
        ]  # fmt: skip
    settings = [part for value in chosen.settings for part in ("--set", value)]
    seeds = ["--seeds", *map(str, chosen.seeds), *settings, *(["--controls"] if chosen.controls else [])]
    command = shlex.join(["python", "benchmarks/forgetting_seeds.py", *chosen.recipes, *seeds])
    text = document(chosen.title, runs, controls, command)
    if chosen.document:
        chosen.document.write_text(text, encoding="utf-8")
    print(text.split("## Raw summaries")[0])
    wrong = [r for r in controls if r.code != 6]
    if wrong:
        raise SystemExit(f"{len(wrong)} controls did not fail their gates: {', '.join(str(r.folder) for r in wrong)}")


if __name__ == "__main__":
    main()
