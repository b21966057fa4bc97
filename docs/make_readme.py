"""What README shows of measurements: its picture, what the quickstart prints, and its table of results.

    python docs/make_readme.py                      # README.md and docs/picture.svg anew, from the committed results
    python docs/make_readme.py --from runs/digits   # before that, results/quickstart.json from a finished quickstart

A test compares README.md and the picture with what this makes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUICKSTART = RESULTS / "quickstart.json"
PICTURE = ROOT / "docs" / "picture.svg"
ENCODERS = {"original": "before", "unlearned": "after", "retrained": "retrained without them"}
METHODS = ("third_party", "alignment_calibration", "neg_grad", "grad_ascent", "finetune", "none")
WIDTH, HEIGHT, PANEL, GAP = 760, 168, 240, 20  # pixels


def record(run: Path, exit_code: int) -> dict[str, Any]:
    """What README shows of a finished run; `run` is shown as runs/digits, wherever it lies."""
    from distunlearn import __version__
    from distunlearn.report.terminal import ending

    scores: dict[str, dict[str, list[float]]] = {}
    for encoder in ENCODERS:
        samples = json.loads((run / "audit" / f"scores-{encoder}.json").read_text(encoding="utf-8"))["samples"]
        scores[encoder] = {role: _agreements(samples, role) for role in ("forget", "holdout")}
    lines = [line.replace(str(run), "runs/digits") for line in ending(run).splitlines()]
    shown = [line for line in lines if not line.startswith("Next: ")]
    summary = json.loads((run / "audit" / "summary.json").read_text(encoding="utf-8"))
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": "launch/quickstart.sh",
        "version": __version__,
        "exit_code": exit_code,
        "verdict": summary["gates"]["verdict"],
        "printed": [part for line in shown for part in textwrap.wrap(line, 116) or [""]],
        "view_agreement": scores,
    }


def _agreements(samples: Mapping[str, Any], role: str) -> list[float]:
    return sorted(round(row["view_agreement"], 3) for row in samples.values() if row["role"] == role)


def picture(found: Mapping[str, Any]) -> str:
    """An SVG of three densities of view agreement; readable on white and on black."""
    scores = found["view_agreement"]
    every = np.concatenate([np.asarray(v) for roles in scores.values() for v in roles.values()])
    low, high = float(np.quantile(every, 0.02)), min(1.0, float(every.max()))
    grid = np.linspace(low, high, 61)
    curves = {e: {r: _density(np.asarray(v), grid) for r, v in roles.items()} for e, roles in scores.items()}
    top = max(float(c.max()) for roles in curves.values() for c in roles.values())
    parts = [HEAD.format(width=WIDTH, height=HEIGHT, auc=", ".join(
        f"{_auc(scores[e]):.2f} {word}" for e, word in ENCODERS.items()))]  # fmt: skip
    for index, (encoder, word) in enumerate(ENCODERS.items()):
        left = index * (PANEL + GAP)
        for role in ("holdout", "forget"):
            x = left + 1 + (PANEL - 2) * (grid - low) / (high - low)
            y = 130 - 96 * curves[encoder][role] / top
            points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
            parts.append(f'<polygon class="{role}" points="{left + 1},130 {points} {left + PANEL - 1},130"/>')
        parts.append(f'<path class="axis" d="M{left},130.5h{PANEL}"/>')
        parts.append(f'<text x="{left}" y="16"><tspan font-weight="600">{word}</tspan></text>')
        parts.append(f'<text x="{left + PANEL}" y="16" text-anchor="end">AUC {_auc(scores[encoder]):.2f}</text>')
    parts.append(LEGEND)
    return "\n".join(parts) + "\n"


HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -4 {width} {height}" width="{width}" height="{height}" role="img"
 font-family="system-ui,sans-serif" font-size="13">
<title>How alike an encoder finds two views of an image: images to forget and unseen images. AUC: {auc}.</title>
<style>text{{fill:#59636e}}.axis{{stroke:#818b98}}.forget{{fill:#d1570066;stroke:#d15700}}
.holdout{{fill:#2f81f740;stroke:#2f81f7}}@media(prefers-color-scheme:dark){{text{{fill:#b4bcc6}}}}</style>"""
LEGEND = """\
<rect class="forget" x="0" y="146" width="12" height="12"/><text x="18" y="157">images to forget</text>
<rect class="holdout" x="140" y="146" width="12" height="12"/><text x="158" y="157">images never seen</text>
<text x="760" y="157" text-anchor="end">how alike the encoder finds two views of an image →</text>
</svg>"""


def _density(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    width = 1.06 * float(values.std()) * values.size**-0.2
    return np.exp(-0.5 * ((grid[:, None] - values[None]) / width) ** 2).mean(axis=1) / width


def _auc(roles: Mapping[str, Sequence[float]]) -> float:
    a, b = np.asarray(roles["forget"])[:, None], np.asarray(roles["holdout"])[None]
    return float(((a > b) + 0.5 * (a == b)).mean())


def table() -> str:
    """The methods of the grid `small`: means over its runs, in points."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from forgetting_report import CHOSEN, rank_attacks, rows_of

    results = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((RESULTS / "forgetting-small").glob("*-*-*.json"))
    ]
    results = [result for result in results if "cell" in result]
    settings = rows_of(results, [name for name, _ in rank_attacks(results)[:CHOSEN]])
    lines = [
        "| method | average gap, ResNets | average gap, ViTs | kNN lost | images, % of retraining |",
        "|---|---|---|---|---|",
    ]
    for method in METHODS:
        rows = {name: methods[method] for name, methods in settings.items()}
        gaps = {kind: [g for name, row in rows.items() if name.endswith(kind) for g in row["gaps"].values()]
                for kind in ("resnet", "vit")}  # fmt: skip
        lost = 100 * np.mean([row["knn_original"] - row["knn"] for row in rows.values()])
        cost = 100 * np.mean([row["cost"] for row in rows.values()])
        lines.append(
            f"| `{method}` | {np.mean(gaps['resnet']):.2f} | {np.mean(gaps['vit']):.2f} | {lost:.1f} | {cost:.1f} |"
        )
    return "\n".join(lines)


def readme(text: str, found: Mapping[str, Any]) -> str:
    """README's text with its made parts, which stand between `<!-- made: NAME -->` and `<!-- end -->`."""
    from distunlearn.report.texts import NEXT

    advice = textwrap.wrap(f"Next: {NEXT[found['verdict']].format(folder='runs/digits')}", 116)
    made = {"prints": "\n".join(["```text", *found["printed"], *advice, "```"]), "table": table()}
    for name, part in made.items():
        whole = re.compile(f"(<!-- made: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        text, count = whole.subn(lambda m, part=part: m[1] + part + m[2], text)
        if count != 1:
            raise SystemExit(f"README.md has {count} places for {name}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--from", dest="run", type=Path, help="run directory of a finished quickstart")
    parser.add_argument("--exit-code", type=int, default=7, help="its exit code")
    args = parser.parse_args()
    if args.run:
        QUICKSTART.write_text(json.dumps(record(args.run, args.exit_code), separators=(",", ":")) + "\n")
    found = json.loads(QUICKSTART.read_text(encoding="utf-8"))
    PICTURE.write_text(picture(found), encoding="utf-8")
    path = ROOT / "README.md"
    path.write_text(readme(path.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
