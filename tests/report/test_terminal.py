"""The end of a run in the terminal says what the page says."""

from __future__ import annotations

from pathlib import Path

import pytest
from rundir import build_run

from distunlearn.errors import DataError
from distunlearn.report.render import write_report
from distunlearn.report.terminal import ending


@pytest.mark.parametrize(("case", "word"), [("pass", "Pass"), ("fail", "Fail"), ("inconclusive", "Inconclusive")])
def test_it_ends_with_the_verdict_every_gate_and_the_path(tmp_path: Path, case: str, word: str) -> None:
    run = build_run(tmp_path / "run", case)
    page = write_report(run)
    lines = ending(run).splitlines()
    assert lines[0].startswith(f"Verdict: {word}. ")
    assert any(line.startswith("View agreement ") and "−0.06 to +0.06" in line for line in lines)
    assert any(line.startswith("Nearest neighbours ") for line in lines)
    assert f"Report: {page}" in lines
    assert lines[-1].startswith("Next: ")


def test_a_report_that_is_not_there_is_not_named(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", "pass")
    assert f"`distunlearn report {run}` writes it." in ending(run)
    with pytest.raises(DataError):
        ending(tmp_path)
