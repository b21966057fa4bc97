"""What is in no group, and what is doubtful in its group, stands in the report."""

from __future__ import annotations

from pathlib import Path

from rundir import Page, build_run, change_json

from distunlearn.report.data import load_run
from distunlearn.report.render import render


def test_images_that_were_left_out_are_counted(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    assert "left out" not in Page(render(load_run(run))).text("asked")
    counts = {
        "skipped_files": {"hidden": 1200, ".txt": 3},
        "dropped_copies": {"holdout": 7},
        "near_copies_of_members": {"holdout": 0, "calibration": 2},
    }
    change_json(run / "request.json", lambda found: found["facts"].update(counts))
    shown = Page(render(load_run(run))).text("asked")
    assert "1 203 files of the source were left out" in shown
    assert "7 images were left out, because a member or an image of another group has the same bytes" in shown
    assert "2 images that count as never trained on look almost like a member" in shown


def test_layers_that_probes_cannot_follow_are_named(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    names = {"audit": ["2 in groups (backbone.a, b)", "1 else (d)"], "constraint": ["1 of <b>another</b> kind (c)"]}
    change_json(run / "plan.json", lambda found: found.update(not_probed=names))
    shown = Page(render(load_run(run))).text("asked")
    assert "gradient classifier of the audit" in shown and "2 in groups (backbone.a, b); 1 else (d)." in shown
    assert "gradient constraint" in shown and "1 of <b>another</b> kind (c)" in shown, "escaped, so shown as it is"
