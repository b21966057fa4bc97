"""What is in no group, and what is doubtful in its group, stands in the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rundir import Page, build_run, change_json, settings

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
    assert "that were left out, because they are no images that can be read: 1 203." in shown
    assert "because a member or an image of another group has the same bytes: 7." in shown
    assert "Images that count as never trained on and look almost like a member: 2." in shown


def test_layers_that_probes_cannot_follow_are_named(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    names = {"audit": ["2 in groups (backbone.a, b)", "1 else (d)"], "constraint": ["1 of <b>another</b> kind (c)"]}
    change_json(run / "plan.json", lambda found: found.update(not_probed=names))
    shown = Page(render(load_run(run))).text("asked")
    assert "gradient classifier of the audit" in shown and "2 in groups (backbone.a, b); 1 else (d)." in shown
    assert "gradient constraint" in shown and "1 of <b>another</b> kind (c)" in shown, "escaped, so shown as it is"


def test_of_an_encoder_from_elsewhere_nothing_is_said_that_nobody_knows(tmp_path: Path) -> None:
    cfg = settings()
    foreign = replace(cfg, encoder=replace(cfg.encoder, checkpoint="w.pth", trained_with="dino"))
    run = build_run(tmp_path / "run", cfg=foreign)
    change_json(run / "request.json", lambda found: found["facts"].update(non_members="named"))
    small = {"smaller_than_the_encoder": {"images": 3, "looked_at": 40}}
    change_json(run / "plan.json", lambda found: found["request"].update(small))
    page = Page(render(load_run(run)))
    asked = page.text("asked")
    assert "trained with dino" in asked and "trained with simclr." not in asked
    assert "from the images that were named as never trained on" in asked and "more cannot be checked" in asked
    assert "The retrained encoder was trained by the settings of this run" in asked
    assert "Of 40 images whose size was looked at, 3 are smaller than the 32 pixels" in asked
    assert "Watch" not in asked, "no dose was chosen"
    assert "Training new heads for the original took 420 000 of them" in page.text("cost")
    own = Page(render(load_run(build_run(tmp_path / "own"))))
    assert "Training the original took 420 000 of them" in own.text("cost")
    assert "more cannot be checked" not in own.text("asked")
