"""The table of doses: how the images to forget look at each of them, and which one was chosen."""

from __future__ import annotations

from typing import Any

from distunlearn.report.data import RunFiles, number
from distunlearn.report.formatting import text

MAX_ROWS = 40


def dose_table(run: RunFiles) -> dict[str, Any] | None:
    """What was seen at each dose, and which one was chosen; None where none was looked for."""
    curve, rows = run.dose, []
    chosen, low, high, watch = (number(curve, *path) for path in (("dose",), ("low",), ("high",), ("images", "watch")))
    if chosen is None or low is None or high is None or watch is None:
        return None
    names = [str(name) for name in _listed(curve.get("features"))]
    columns = (_listed(curve.get(name)) for name in ("grid", "auc", "criterion", "lost", "allowed"))
    for dose, aucs, off, lost, allowed in zip(*columns, strict=False):
        share, knn = number(off), number(next(iter(_listed(lost)[1:]), None))
        rows.append({
            "dose": text(number(dose), 2), "aucs": [text(number(value)) for value in _listed(aucs)[: len(names)]],
            "off": text(None if share is None else 100 * share / max(1, len(names)), 1), "knn": text(knn, 1),
            "allowed": allowed is True, "chosen": number(dose) == chosen,
            "at": number(dose), "off_at": None if share is None else 100 * share / max(1, len(names)),
        })  # fmt: skip
    return {
        "rows": rows[:MAX_ROWS], "features": [name.replace("_", " ") for name in names], "watch": f"{watch:.0f}",
        "interval": f"{low:g} to {high:g}", "kept": number(run.done, "dose") == chosen,
        "at": chosen,
    }  # fmt: skip


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
