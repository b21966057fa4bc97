"""Tables of what `forgetting_dose.py` measured: the visible criterion against the gap to the retrained encoder.

    python benchmarks/forgetting_dose_report.py benchmarks/results/forgetting-dose

Gap: mean over five signals of |AUC(forget, holdout) - that of the retrained encoder|, in points; the fifth, the norm of
the embedding, is in no choice. Criterion: mean over four signals of |AUC(forget, watch) - aim|, in points. Everything
follows from the cells; nothing is trained.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

USED = 4  # signals of the choice
NAMES = {"1/2": "half", "aim_f": "retained", "between": "between"}


@dataclass(frozen=True, eq=False)
class Cell:
    """One method on one encoder. doses [A]; gap, knn [A]; watch [A + 1, S]; lost [A, 2]: upper bounds of the choice."""

    group: str
    kind: str
    method: str
    doses: np.ndarray
    gap: np.ndarray
    knn: np.ndarray
    watch: np.ndarray
    aims: np.ndarray
    lost: np.ndarray
    lost_mean: np.ndarray
    interval: dict[str, tuple[float, float]]
    level: np.ndarray
    signals: dict[str, np.ndarray]  # forget, watch: [A, n, S] of the images that are kept

    def criterion(self, aim: str) -> np.ndarray:
        """[A], points. aim: half, retained, between these (all is right there), or retrained (nobody has it)."""
        if aim == "between":
            low, high = np.minimum(self.aims, 0.5), np.maximum(self.aims, 0.5)
            seen = self.watch[:-1, :USED]
            return 100 * (np.maximum(low - seen, 0) + np.maximum(seen - high, 0)).mean(1)
        target = {"half": 0.5, "retained": self.aims, "retrained": self.watch[-1, :USED]}[aim]
        return 100 * np.abs(self.watch[:-1, :USED] - target).mean(1)

    def best(self) -> int:
        return int(self.gap.argmin())

    def at(self, dose: float) -> int:
        return int(np.abs(self.doses - dose).argmin())

    def chosen(self, aim: str, share: float = np.inf, points: float = np.inf, most: float = 1.6) -> int:
        allowed = (self.lost[:, 0] <= share) & (self.lost[:, 1] <= points) & (self.doses <= most) | (self.doses == 0)
        return int(np.where(allowed, self.criterion(aim), np.inf).argmin())


def read(folder: Path) -> list[Cell]:
    cells = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as found:
            figures = json.loads(str(found["figures"]))
            signals = {role: found[role][:-1, :, :USED].astype(np.float64) for role in ("forget", "watch")}
        group, chosen, holdout = figures["group"], figures["chosen"], np.array(figures["holdout"])
        knn = np.array(figures["knn"])
        kind = f"{group['dataset']} {'alike' if group['alike'] else 'fair'} {group['encoder']}"
        cells.append(
            Cell(
                group["name"], kind, figures["method"], np.array(figures["doses"]),
                100 * np.abs(holdout[:-1] - holdout[-1]).mean(1), knn[:-1] - knn[0], np.array(figures["watch"]),
                np.array(chosen["retained"]["aims"]), np.array(chosen["half"]["lost_upper"]),
                np.array(chosen["half"]["lost"]),
                {aim: (c["low"], c["high"]) for aim, c in chosen.items()}, np.array(figures["level"]), signals,
            )
        )  # fmt: skip
    return cells


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)])


def curves(cells: list[Cell]) -> str:
    """Gap and criterion at every dose, by cell."""
    rows = []
    for cell in cells:
        for name, values in (("gap", cell.gap), ("criterion", cell.criterion("half")), ("kNN", cell.knn)):
            rows.append([cell.group, cell.method, name, *(f"{value:.1f}" for value in values)])
    return table(["group", "method", "", *(f"{dose:g}" for dose in cells[0].doses)], rows)


def ranking(cells: list[Cell]) -> str:
    """Rank correlation of criterion and gap: over the doses of a cell (mean), and over all cells of a kind."""
    rows = []
    for kind, some in by(cells, lambda cell: cell.kind):
        row = [kind, str(len(some))]
        for aim in ("half", "retained", "retrained"):
            within = [spearmanr(c.criterion(aim), c.gap).statistic for c in some]
            pooled = spearmanr(np.concatenate([c.criterion(aim) for c in some]), np.concatenate([c.gap for c in some]))
            row.append(f"{np.mean(within):.2f} / {pooled.statistic:.2f}")
        error = [100 * np.abs(aims - c.watch[-1, :USED]).mean() for c in some for aims in (np.full(USED, 0.5), c.aims)]
        rows.append([*row, f"{np.mean(error[::2]):.1f}", f"{np.mean(error[1::2]):.1f}"])
    return table(["kind", "cells", "aim 1/2", "aim_f", "aim of the retrained", "error of 1/2", "error of aim_f"], rows)


RULES: tuple[tuple[str, Callable[[Cell], int]], ...] = (
    ("nothing done", lambda c: 0),
    ("whole dose", lambda c: c.at(1)),
    ("best on the line", Cell.best),
    ("aim of the retrained", lambda c: c.chosen("retrained")),
    *((f"{aim}{'' if share == np.inf else f', share {share:g}'}{'' if knn == np.inf else f', kNN {knn:g}'}"
       f"{'' if most > 1 else ', at most 1'}",
       lambda c, aim=aim, share=share, knn=knn, most=most: c.chosen(NAMES[aim], share, knn, most))
      for aim in ("1/2", "aim_f", "between")
      for share, knn, most in ((np.inf, np.inf, 1.6), (0.2, np.inf, 1.6), (np.inf, 2, 1.6), (0.5, 2, 1.6),
                               (0.5, 2, 1))),
)  # fmt: skip


def rules(cells: list[Cell]) -> str:
    """What each rule leaves, in the mean: gap, kNN change; how often within one step of the best, and harm."""
    rows = []
    for name, rule in RULES:
        at = [rule(c) for c in cells]
        gap = np.array([c.gap[a] for c, a in zip(cells, at, strict=True)])
        knn = np.mean([c.knn[a] for c, a in zip(cells, at, strict=True)])
        near = np.mean([abs(a - c.best()) <= 1 for c, a in zip(cells, at, strict=True)])
        whole, nothing = (gap - [c.gap[c.at(dose)] for c in cells] for dose in (1, 0))
        level = np.mean([np.abs(c.level[a]).max() for c, a in zip(cells, at, strict=True)])
        rows.append([name, f"{np.mean([c.doses[a] for c, a in zip(cells, at, strict=True)]):.2f}", f"{gap.mean():.1f}",
                     f"{gap.max():.1f}", f"{knn:+.1f}", f"{near:.0%}", f"{(whole > 1).mean():.0%}, {whole.max():+.1f}",
                     f"{(nothing > 1).mean():.0%}, {nothing.max():+.1f}", f"{level:.2f}"])  # fmt: skip
    return table(["rule", "dose", "gap", "worst gap", "kNN", "within one step of the best",
                  "1 point worse than the whole dose, at most by", "1 point worse than nothing, at most by",
                  "level, farthest signal"], rows)  # fmt: skip


def watch_sizes(cells: list[Cell], draws: int = 40) -> str:
    """What the number of watch images does to the choice by aim_f, kNN 2: parts of those that are kept, drawn anew."""
    generator, rows = np.random.default_rng(0), []
    for size in (15, 30, 60, 120):
        gaps, spreads = [], []
        for cell in cells:
            allowed = (cell.lost[:, 1] <= 2) & (cell.doses <= 1.6) | (cell.doses == 0)
            forget, watch = cell.signals["forget"], cell.signals["watch"]
            at = []
            for _ in range(draws):
                some = watch[:, generator.choice(watch.shape[1], min(size, watch.shape[1]), replace=False)]
                off = np.abs(_aucs(forget, some) - cell.aims).mean(1)
                at.append(int(np.where(allowed, off, np.inf).argmin()))
            gaps.append(cell.gap[at])
            spreads.append(cell.doses[at].std())
        all_gaps = np.array(gaps)
        harm = (all_gaps > np.array([cell.gap[0] for cell in cells])[:, None] + 1).mean()
        rows.append([str(size), f"{all_gaps.mean():.1f}", f"{np.mean(spreads):.2f}", f"{harm:.0%}"])
    return table(["watch images", "gap", "spread of the dose", "1 point worse than nothing"], rows)


def _aucs(forget: np.ndarray, watch: np.ndarray) -> np.ndarray:
    """[A, S], ties counted half."""
    order = np.sort(watch, axis=1)
    found = np.empty((forget.shape[0], forget.shape[2]))
    for a, s in np.ndindex(*found.shape):
        below, upto = (np.searchsorted(order[a, :, s], forget[a, :, s], side) for side in ("left", "right"))
        found[a, s] = (below + upto).mean() / 2 / watch.shape[1]
    return found


def by(cells: list[Cell], key: Callable[[Cell], str]) -> list[tuple[str, list[Cell]]]:
    names = dict.fromkeys(key(cell) for cell in cells)
    return [(name, [cell for cell in cells if key(cell) == name]) for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    cells = read(parser.parse_args().results)
    print("## Rank correlation, in a cell / over all of a kind\n", ranking(cells), sep="\n")
    for name, some in [("all cells", cells), *by(cells, lambda c: c.kind), *by(cells, lambda c: c.method)]:
        print(f"\n## Rules, {name} ({len(some)})\n", rules(some), sep="\n")
    print("\n## How many watch images\n", watch_sizes(cells), sep="\n")
    print("\n## Curves\n", curves(cells), sep="\n")


if __name__ == "__main__":
    main()
