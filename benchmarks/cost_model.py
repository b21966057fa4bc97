"""The cost model fitted to several runs of scaling.py together, which have more points and less noise than one.

    python benchmarks/cost_model.py RUN.json ... --document benchmarks/results/DATE-cost-model.md

Points of one name (encoder, backend, processes, batch) count once, with the median of the runs that have them. The
model is checked by leaving one such point out at a time, with all its runs; the errors of each run by itself stand
beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from scaling import measured, modelled
from scaling_report import errors_of, model_text
from throughput_stats import paragraphs, table

from distunlearn.plan.cost_model import Measured


def merged(runs: list[list[tuple[str, Measured]]]) -> list[tuple[str, Measured]]:
    """Every named point once, in the order in which the names appear."""
    found: dict[str, list[Measured]] = defaultdict(list)
    for points in runs:
        for name, point in points:
            found[name].append(point)
    medians = {name: statistics.median(p.seconds for p in points) for name, points in found.items()}
    return [(name, replace(points[0], seconds=medians[name])) for name, points in found.items()]


def document(paths: list[Path], results: list[dict[str, Any]]) -> str:
    runs = [measured(result) for result in results]
    rows = []
    for path, result, points in zip(paths, results, runs, strict=True):
        worst, middle = errors_of(modelled(points))
        own = result["machine"]
        rows.append([path.name, own["commit"], str(own["date"]), str(len(points)), f"{100 * worst:.1f} %",
                     f"{100 * middle:.1f} %"])  # fmt: skip
    parts = [
        "Runs of `scaling.py`, each fitted by itself:",
        table(["run", "commit", "date", "points", "worst error", "median error"], rows),
        "All of them together, points of one name counted once with the median of their runs:",
        *model_text(modelled(merged(runs)), "1 and 2 processes"),
    ]
    return paragraphs("The cost model over several runs", parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="JSON files of scaling.py")
    parser.add_argument("--document", type=Path, help="write the results here")
    args = parser.parse_args()
    text = document(args.runs, [json.loads(path.read_text(encoding="utf-8")) for path in args.runs])
    if args.document:
        args.document.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
