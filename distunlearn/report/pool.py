"""The page and the last words in the terminal of a pool of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distunlearn import __version__
from distunlearn.common.files import write_atomic
from distunlearn.report import evidence, facts, texts
from distunlearn.report.data import ENCODER_NAMES, RunFiles, number
from distunlearn.report.formatting import percent, signed, text, whole
from distunlearn.report.render import REPORT, environment, forest, written
from distunlearn.report.terminal import gate_lines
from distunlearn.verify.run import Checked

POOL = "pool.json"


def write_pool_report(out: Path, runs: Sequence[RunFiles], told: dict[str, Any]) -> Path:
    """Write `<out>/report.html` and return its path. told: what `pool.json` holds."""
    pooled = _as_run(runs, told)
    rows = evidence.gates(pooled)
    page = environment().get_template("pool.html.j2").render(
        version=__version__, written=written(), verdict=evidence.verdict(pooled, rows, "pass"), gates=forest(rows),
        confidence=f"{100 * (number(pooled.config, 'audit', 'gates', 'confidence') or 0.9):g}",
        difference=facts.compared(runs[0]),
        request=facts.request(replace(runs[0], config=runs[0].config | {"seed": None})),  # each has its own
        runs=[_row(run) for run in runs], spread=_spread(told),
        attacks=evidence.attack_table(pooled), encoders=texts.ENCODERS, not_evaluated=texts.NOT_EVALUATED,
        settings=facts.provenance(runs[0])["settings"], same=told["same_images"],
        twice=whole(told["images_in_several_runs"]),
    )  # fmt: skip
    write_atomic(out / REPORT, page)
    return out / REPORT


def pool_ending(out: Path, runs: Sequence[RunFiles], told: dict[str, Any]) -> str:
    """Verdict, gates and report for a terminal, as a single run ends."""
    pooled = _as_run(runs, told)
    rows = evidence.gates(pooled)
    found = evidence.verdict(pooled, rows, "pass")
    head = f"Verdict over {len(runs)} runs: {found['word']}. {found['sentence']}"
    return "\n".join([head, *found["notes"], "", *gate_lines(rows), f"Report: {out / REPORT}"])


def _as_run(runs: Sequence[RunFiles], told: dict[str, Any]) -> RunFiles:
    """The pooled figures in the place of a run's own; what belongs to one run alone is left out."""
    notes = [note for run in runs for note in run.checked.notes]
    return replace(
        runs[0], audit={name: told[name] for name in ("attacks", "utility", "gates")}, scores={},
        checked=Checked(notes=list(dict.fromkeys(notes))), folder=None,
    )  # fmt: skip


def _row(run: RunFiles) -> dict[str, Any]:
    """One run in the table of runs."""
    verdict = run.audit["gates"]["verdict"]
    agreement = {name: text(number(run.audit, "attacks", "view_agreement", name, "auc")) for name in ENCODER_NAMES}
    knn = {name: percent(number(run.audit, "utility", "knn", name)) for name in ENCODER_NAMES}
    return {
        "seed": str(run.config.get("seed")), "verdict": verdict, "word": texts.VERDICTS[verdict][0],
        "agreement": agreement, "knn": knn, "finished": run.finished or "not recorded",
        "weights": (run.checked.states.get("unlearned") or texts.NOT_EVALUATED)[:12],
    }  # fmt: skip


def _spread(told: dict[str, Any]) -> list[dict[str, Any]]:
    """The difference of every run, beside the pooled one."""
    rows = []
    for name, found in told["attacks"].items():
        each = [signed(value, 3) for value in found["runs"]]
        rows.append({"title": evidence.attack_words(name)[0], "each": each, "mean": signed(found["gap"]["auc"], 3)})
    for name, (title, _) in texts.UTILITY.items():
        found, gate = told["utility"][name], told["gates"][name]
        each = [signed(None if value is None else 100 * value, 1) for value in found["runs"]]
        change = gate["change"]
        mean = signed(None if change is None else 100 * change, 1)
        rows.append({"title": f"{title}, change in points", "each": each, "mean": mean})
    return rows
