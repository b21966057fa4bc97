"""The end of a run as text for a terminal: the verdict, a line a gate, and what to open and do next."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distunlearn.report import evidence, facts
from distunlearn.report.brief import next_step
from distunlearn.report.data import checked_run
from distunlearn.report.render import REPORT

WIDTH = 120  # of a log; a terminal wraps what is longer


def ending(run_dir: str | Path) -> str:
    """Verdict, gates, path of the report and next step of an audited run; the same rows as on its page.

    Raises:
        DataError: the folder holds no run, or a file of it is damaged.
    """
    run = checked_run(run_dir)
    rows = evidence.gates(run)
    found = evidence.verdict(run, rows, facts.coverage(run)["state"])
    page = Path(run_dir) / REPORT
    return "\n".join(
        [
            f"Verdict: {found['word']}. {found['sentence']}",
            *found["notes"],
            "",
            *gate_lines(rows),
            f"Report: {page}"
            if page.exists()
            else f"Report: not written yet; `distunlearn report {run_dir}` writes it.",
            f"Next: {next_step(run, found['name'], str(run_dir))}",
        ]
    )


def gate_lines(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A table of the gates, a line each, and below it why those are no pass that are none. rows: `evidence.gates`."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("check", "difference", "interval", "allowed", "verdict"):
        table.add_column(column, no_wrap=True)
    every, text = [*rows["attacks"], *rows["utility"]], io.StringIO()
    for row in every:
        table.add_row(row["title"], row["shown"], row["interval"], row["allowed"], row["word"])
    Console(file=text, width=WIDTH, color_system=None).print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return [*lines, "", *(f"{row['title']}: {row['reason']}." for row in every if row["reason"])]
