"""What a perfect match of distributions would leave: the gap of forgetting that sampling alone makes.

    python benchmarks/forgetting_floor.py runs/larger/*-none runs/small/*-none

A method that makes forgotten images look like third-party ones leaves an attack on them the AUC that it has on
third-party images. To the retrained encoder both are strangers, yet it gives the two finite sets different AUCs. So its
own scores (`audit/scores-retrained.json`) say what would be left:

    |AUC(forget against holdout) - AUC(third-party against holdout)|,

in points of 100, with the third-party images of the audit, which no method has seen, for all of them. By chance alone a
mean of sqrt(2 / pi) sqrt((1 / n_f + 1 / n_t) / 12) is to be expected for n_f and n_t images of one distribution (the
variance of Mann and Whitney's statistic, many holdout images). A method that does not match distributions, but takes
back what training added to each image, has no such floor.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sklearn.metrics import roc_auc_score

ATTACKS = {  # higher: member, for +1
    "bank_loss": 1, "embedding_norm": 1, "encodermi_set": 1, "encodermi_vector": 1, "gradient_norm_head": -1,
    "gradient_norm_network": -1, "gradient_sketch": 1, "view_agreement": 1,
}  # fmt: skip
Rows = Sequence[Mapping[str, Any]]


def area(rows: Rows, role: str, attack: str) -> float:
    """AUC of `attack` for images of a role against the holdout; the mean over both fits of an attack that is fitted."""
    columns = [name for name in (f"{attack}_fold0", f"{attack}_fold1") if any(name in row for row in rows)] or [attack]
    found = []
    for column in columns:
        scored = [row for row in rows if row["role"] in (role, "holdout") and column in row]
        truth = [row["role"] == role for row in scored]
        found.append(roc_auc_score(truth, [ATTACKS[attack] * row[column] for row in scored]))
    return statistics.mean(found)


def floor(rows: Rows, attacks: Sequence[str]) -> dict[str, float]:
    """By attack: AUC of forgotten images minus that of third-party images, both under the retrained encoder."""
    return {name: area(rows, "forget", name) - area(rows, "third_party_audit", name) for name in attacks}


def by_chance(forget: int, third: int) -> float:
    """The mean size of such a difference where both sets are drawn from one distribution."""
    return math.sqrt(2 / math.pi) * math.sqrt((1 / forget + 1 / third) / 12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories that have a retrained audit")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    args = parser.parse_args()
    header = ["run", "forgotten, third-party images", *args.attacks, "mean size", "by chance"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    sizes = []
    for run in args.runs:
        path = run / "audit" / "scores-retrained.json"
        if not path.is_file():
            parser.error(f"{path} is missing; expected a finished run with audit.tier=1")
        rows = list(json.loads(path.read_text(encoding="utf-8"))["samples"].values())
        found = floor(rows, args.attacks)
        counts = [sum(row["role"] == role for row in rows) for role in ("forget", "third_party_audit")]
        sizes.append([abs(value) for value in found.values()])
        cells = [f"{100 * value:+.1f}" for value in found.values()]
        mean = f"{100 * statistics.mean(sizes[-1]):.2f}"
        cells = [run.name, ", ".join(map(str, counts)), *cells, mean, f"{100 * by_chance(*counts):.2f}"]
        print(f"| {' | '.join(cells)} |")
    means = [f"{100 * statistics.mean(column):.2f}" for column in zip(*sizes, strict=True)]
    print(f"| mean size | | {' | '.join(means)} | {100 * statistics.mean(map(statistics.mean, sizes)):.2f} | |")


if __name__ == "__main__":
    main()
