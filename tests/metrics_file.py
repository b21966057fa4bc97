"""metrics.jsonl read back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from distunlearn.engine.metrics_log import METRICS

NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no such numbers: they are text


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run directory in the order they were written, without a torn last line.

    Of steps that a resumed attempt did again only the later rows: those of an attempt end where a later one begins.
    """
    kept: list[dict[str, Any]] = []
    first: dict[str, dict[str, int]] = {}  # phase -> attempt -> lowest step in later rows
    for line in reversed((folder / METRICS).read_text().split("\n")[:-1]):
        row = json.loads(line)
        row["values"] = {k: NOT_FINITE.get(v, v) if isinstance(v, str) else v for k, v in row["values"].items()}
        attempts = first.setdefault(row["phase"], {})
        if all(row["step"] < step for attempt, step in attempts.items() if attempt != row["attempt"]):
            kept.append(row)
        attempts[row["attempt"]] = min(row["step"], attempts.get(row["attempt"], row["step"]))
    return kept[::-1]
