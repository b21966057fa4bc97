"""How far a run is, and what must be the same of two runs, whatever interrupted them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from distunlearn.verify.scores import read_scores

PHASES = ("pretrain", "unlearn", "retrain", "audit", "report")
ENDS = {"pretrain": "original/done.json", "unlearn": "done.json", "retrain": "retrained/done.json",
        "audit": "audit/summary.json", "report": "report.html"}  # fmt: skip
TIMES = (  # what a report says of time, and of the attempts that it took; nothing else of it may differ
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC"), 1, 1),
    (re.compile(r">Time, in seconds</h3>.*?</dl>", re.DOTALL), 1, 1),
    (re.compile(r", resumed after an interruption \(\d+ attempts\)"), 0, 3),  # of each training
)


def phase_of(out: Path) -> str:
    """The first phase that has not ended."""
    return next((phase for phase in PHASES if not (out / ENDS[phase]).exists()), "done")


def without_times(report: str) -> str:
    for pattern, least, most in TIMES:
        report, count = pattern.subn("", report)
        assert least <= count <= most, f"{pattern.pattern} is there {count} times"
    return report


def outcome(out: Path) -> dict[str, object]:
    """What must be the same: weights, exports, raw scores, figures, the report; not how long it took."""
    done = [json.loads((out / ENDS[phase]).read_text()) for phase in ("pretrain", "unlearn", "retrain")]
    summary = json.loads((out / "audit" / "summary.json").read_text())
    kept = {key: value for key, value in summary.items() if key != "cost"}
    return {"states": [d["state"] for d in done], "exports": [d["export"] for d in done],
            "scores": read_scores(out / "audit"), "summary": kept,
            "report": without_times((out / "report.html").read_text(encoding="utf-8"))}  # fmt: skip


def has_begun(out: Path, phase: str, since: float) -> bool:
    """Whether these very processes are at work at a phase, and no longer at the start of themselves."""
    try:
        if phase == "report":
            return (out / ENDS["audit"]).stat().st_mtime > since
        if phase == "audit":
            return (out / "logs" / "audit.log").stat().st_mtime > since
        last = [
            line for line in (out / "ledger.jsonl").read_text().splitlines() if f'"start","phase":"{phase}"' in line
        ]
        return bool(last) and json.loads(last[-1])["time"] > since
    except OSError:
        return False
