"""What a request of few images is told: signals as planted, through the gates, to the exit code and the sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rundir import COUNTS, build_run, page, settings, verdict

from distunlearn.errors import EXIT_GATE_FAILED, EXIT_INCONCLUSIVE
from distunlearn.report.terminal import ending
from distunlearn.run.pipeline import VERDICT_CODES

RETAINED = COUNTS["retain"]


def small(folder: Path, case: str, images: int) -> tuple[Path, dict[str, Any]]:
    """A finished run of a request of so many images, and its audit."""
    cfg = settings()
    cfg = replace(cfg, data=replace(cfg.data, members=RETAINED + images, forget=images))
    run = build_run(folder / "run", case, cfg, COUNTS | {"forget": images, "holdout": 300}, draw=2)
    return run, json.loads((run / "audit" / "summary.json").read_text(encoding="utf-8"))


def test_twelve_alike_images_that_stand_out_as_unknown_fail(tmp_path: Path) -> None:
    run, audit = small(tmp_path, "unknown", 12)
    found = audit["attacks"]["view_agreement"]
    assert found["unlearned"]["auc"] == pytest.approx(0.27, abs=0.03)
    assert found["retrained"]["auc"] == pytest.approx(0.75, abs=0.03)
    assert found["gap"]["verdict"] == audit["gates"]["verdict"] == "fail"
    assert VERDICT_CODES[audit["gates"]["verdict"]] == EXIT_GATE_FAILED == 6
    shown = page(run)
    told = f"these images now stand out as unknown, {-found['gap']['auc']:.2f} below what retraining gives"
    assert verdict(shown) == "fail" and told in shown.text("gates")
    lines = ending(run)
    assert lines.startswith("Verdict: Fail. ") and told in lines
    assert "No check failed" not in lines + shown.text()


@pytest.mark.parametrize("images", [1, 5])
@pytest.mark.parametrize("case", ["unknown", "fail", "pass"])
def test_so_few_images_never_pass_and_are_never_told_that_no_check_failed(
    tmp_path: Path, case: str, images: int
) -> None:
    run, audit = small(tmp_path, case, images)
    assert VERDICT_CODES[audit["gates"]["verdict"]] == EXIT_INCONCLUSIVE
    shown, lines = page(run), ending(run)
    counted = "1 image is too few" if images == 1 else "5 images are too few"
    assert verdict(shown) == "inconclusive" and counted in shown.text("verdict")
    assert lines.startswith(f"Verdict: Inconclusive. {counted} to say whether the request is fulfilled")
    assert "what was seen: " in lines
    for text in (lines, shown.text()):
        assert "no check failed" not in text.lower()


def test_a_larger_request_that_is_not_settled_is_told_that_no_check_failed(tmp_path: Path) -> None:
    """The control: the sentence is there where checks could have failed."""
    run, audit = small(tmp_path, "pass", 12)
    assert audit["gates"]["verdict"] == "inconclusive"
    assert "No check failed" in ending(run)


def test_one_image_has_no_table_without_a_figure(tmp_path: Path) -> None:
    """No classifier can be fitted on it, which is said once; control: twelve images have the table."""
    one, few = (page(small(tmp_path / str(images), "unknown", images)[0]) for images in (1, 12))
    assert "AUC of the classifier" in few.text("non-members")
    assert "AUC of the classifier" not in one.text("non-members") and "not evaluated" in one.text("non-members").lower()
    assert "To forget 1 image:" in one.text() and "To forget 12 images:" in few.text()
