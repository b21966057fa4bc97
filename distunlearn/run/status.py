"""What a run directory tells about a run: phases, steps, attempts, evidence; from its files alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from distunlearn.engine.checkpoint.format import latest_checkpoint
from distunlearn.errors import DataError
from distunlearn.verify.chain import chain_facts
from distunlearn.verify.ledger import effective_steps, read_ledger
from distunlearn.verify.records import find_record, read_records
from distunlearn.verify.run import DONE, DONE_FIELDS, SUMMARY_FIELDS

FOLDERS = {"pretrain": "original", "unlearn": ".", "retrain": "retrained"}


def run_status(run_dir: Path) -> dict[str, Any]:
    """Plain JSON: `phases` (state, steps done and planned, attempts, newest checkpoint), `audit`, `chain`
    (`chain_facts`), `purged` (images, if they were), `jobs`, `next`.

    A phase is "done", "stopped" (begun and not done; it may be at work in another process) or "waiting".

    Raises:
        DataError: no run directory, or a damaged ledger.
    """
    folder = Path(run_dir)
    if not (folder / "run.yaml").exists() and not (folder / "request.json").exists():
        raise DataError(
            f"{run_dir} is not a run directory (run.yaml and request.json are missing); give the --out folder of a run."
        )
    ledger = folder / "ledger.jsonl"
    lines = read_ledger(ledger) if os.path.lexists(ledger) else []
    phases = {name: _phase(folder / where, name, lines) for name, where in FOLDERS.items()}
    summary = find_record(folder / "audit" / "summary.json", SUMMARY_FIELDS)
    jobs = folder / "slurm" / "jobs.jsonl"
    found: dict[str, Any] = {
        "phases": phases,
        "audit": {"verdict": summary["gates"].get("verdict"), "coverage": summary["coverage"]} if summary else None,
        "report": (folder / "report.html").exists(),
        "chain": chain_facts(folder) or None,
        "purged": (find_record(folder / "purge.json") or {}).get("images"),
        "jobs": [line.get("job") for _, line in read_records(jobs)] if os.path.lexists(jobs) else [],
    }
    waiting = next((name for name, phase in phases.items() if phase["state"] != "done"), None)
    found["next"] = waiting or ("audit" if not summary else "report" if not found["report"] else None)
    return found


def _phase(folder: Path, name: str, lines: list[dict]) -> dict[str, Any]:
    done = find_record(folder / DONE, DONE_FIELDS)
    starts = [line for line in lines if line.get("phase") == name and line["event"] == "start"]
    checkpoint, rejected = latest_checkpoint(folder / "checkpoints")
    return {
        "state": "done" if done else "stopped" if starts else "waiting",
        "steps": max(effective_steps(lines, name), default=-1) + 1,
        "of": done["steps"] if done else starts[-1].get("steps") if starts else None,
        "attempts": len(starts),
        "world": starts[-1].get("world") if starts else None,
        "checkpoint": checkpoint.step if checkpoint else None,
        "rejected_checkpoints": rejected,
    }
