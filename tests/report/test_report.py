"""The page as a reader gets it: verdicts, missing figures, curves, files that contradict each other."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rundir
from kinds import CURVE
from parts import ATTACKS, METHODS, method_settings
from rundir import CASES, Page, change_json, page, verdict
from sklearn.metrics import roc_auc_score

from distunlearn.config.load import save_config
from distunlearn.config.registry import ATTACKS as ATTACK_TABLE
from distunlearn.errors import DataError
from distunlearn.report import facts, texts
from distunlearn.report.data import load_run
from distunlearn.report.render import render, roc_curve, write_report
from distunlearn.verify.figures import ENCODERS

# -- what the page says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_verdict_is_shown_in_word_colour_and_sentence(finished: dict[str, Path], case: str) -> None:
    found = page(finished[case])
    assert verdict(found) == case
    assert found.text("verdict").startswith(f"Verdict {CASES[case]} ")
    others = [page(finished[other]).text("verdict") for other in CASES if other != case]
    assert found.text("verdict") not in others


def test_every_audited_thing_is_on_the_page(finished: dict[str, Path]) -> None:
    found = page(finished["pass"])
    summary = json.loads((finished["pass"] / "audit" / "summary.json").read_text())
    assert set(summary["attacks"]) == set(ATTACKS)
    assert list(texts.ATTACKS) == list(ATTACK_TABLE), "the report has words for every attack, in one order"
    for name in ATTACKS:
        assert texts.ATTACKS[name][0] in found.text("gates")
        assert texts.ATTACKS[name][0] in found.text("controls")
        for encoder in ENCODERS:
            assert f"{summary['attacks'][name][encoder]['auc']:.3f}" in found.text("roc")
    for encoder in ENCODERS:
        assert f"{summary['two_sample'][encoder]['auc']:.3f}" in found.text("non-members")
        assert f"{summary['controls']['third_party_against_holdout'][encoder]['auc']:.3f}" in found.text("controls")
    assert "63 000" in found.text("cost") and "21 %" in found.text("cost")
    assert "Every requested image (40) entered" in found.text("asked")
    assert "130 training steps, resumed after an interruption (2 attempts)" in found.text("asked")
    assert "handwritten digits" in found.text("asked") and "drawn by chance with seed 0" in found.text("asked")
    for head, _ in texts.LIMITS:
        assert head in found.text("limits")


def test_pictures_are_drawn_for_every_attack_and_encoder(finished: dict[str, Path]) -> None:
    found = page(finished["pass"])
    alts = found.attributes("alt")
    assert sum("how the scores are spread" in alt for alt in alts) == len(ATTACKS) * len(ENCODERS)
    assert sum(alt.startswith("ROC curves") for alt in alts) == len(ATTACKS) + 1
    assert sum("right answers" in alt for alt in alts) == 2
    assert sum("forgetting and retraining" in alt for alt in alts) == 2


def test_reason_stands_beside_what_is_not_a_pass(finished: dict[str, Path]) -> None:
    for case in ("fail", "inconclusive"):
        summary = json.loads((finished[case] / "audit" / "summary.json").read_text())
        reason = summary["attacks"]["view_agreement"]["gap"]["reason"]
        assert reason and reason in page(finished[case]).text("gates")
        assert reason not in page(finished["pass"]).text("gates")


def test_words_cover_every_method() -> None:
    for name, method in METHODS.items():
        assert facts._method(name) == (method.report, method.forgets) and len(method.report) > 10, name
    assert facts._method("nowhere.installed:Method") == ("nowhere.installed:Method", True)


# -- evidence that is missing or does not hold -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "0.01", True, 10**400])
@pytest.mark.parametrize("key", ["auc", "low", "high"])
def test_figure_that_is_not_a_number_is_never_a_pass(light: Path, key: str, value: object) -> None:
    assert verdict(page(light)) == "pass"
    change_json(light / "audit" / "summary.json", lambda s: s["attacks"]["bank_loss"]["gap"].update({key: value}))
    found = page(light)
    assert verdict(found) == "inconclusive"
    assert "Training loss" in found.text("verdict") and "Not evaluated" in found.text("gates")


def test_missing_figure_is_named_and_no_number_is_invented(light: Path) -> None:
    change_json(light / "audit" / "summary.json", lambda s: s["attacks"]["bank_loss"]["unlearned"].update(auc=None))
    before = page(light).text("roc").count("not evaluated")
    change_json(light / "audit" / "summary.json", lambda s: s["attacks"]["bank_loss"].pop("unlearned"))
    after = page(light).text("roc").count("not evaluated")
    assert after == before + 1, "the KS p-value is gone as well; the rate was never there"


def test_pass_outside_the_band_or_without_power_does_not_count(light: Path) -> None:
    path = light / "audit" / "summary.json"
    kept = path.read_bytes()
    change_json(path, lambda s: s["attacks"]["bank_loss"]["gap"].update(high=0.09))
    found = page(light)
    assert verdict(found) == "inconclusive" and "not inside the allowed band" in found.text("gates")
    path.write_bytes(kept)
    change_json(path, lambda s: s["attacks"]["bank_loss"]["original"].update(auc_low=0.49))
    found = page(light)
    assert verdict(found) == "inconclusive" and "not shown to work" in found.text("gates")


def test_failed_gate_outweighs_the_file_s_verdict(light: Path) -> None:
    change_json(light / "audit" / "summary.json", lambda s: s["gates"]["knn"].update(verdict="fail"))
    assert verdict(page(light)) == "fail"


def test_limits_are_those_of_the_settings(light: Path) -> None:
    cfg = rundir.settings()
    gates = replace(cfg.audit.gates, view_agreement=0.0001)
    save_config(replace(cfg, audit=replace(cfg.audit, gates=gates)), light / "run.yaml")
    found = page(light)
    assert "−0.0001 to +0.0001" in found.text("gates") and verdict(found) == "inconclusive"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"consumed_min": 0}, "never entered the forgetting"),
        ({"used_as_retain": 1}, "used as images to keep"),
    ],
)
def test_lost_coverage_takes_the_pass_away(light: Path, change: dict[str, int], sentence: str) -> None:
    change_json(light / "audit" / "summary.json", lambda s: s["coverage"].update(change))
    found = page(light)
    assert verdict(found) == "inconclusive" and sentence in found.text("asked")


def test_method_that_never_looks_at_the_images_is_not_blamed_for_it(light: Path) -> None:
    cfg = rundir.settings()
    save_config(replace(cfg, method=method_settings("none")), light / "run.yaml")
    change_json(light / "audit" / "summary.json", lambda s: s["coverage"].update(consumed_min=0, consumed_max=0))
    found = page(light)
    assert "never looks at the images to forget" in found.text("asked") and verdict(found) == "pass"
    change_json(light / "audit" / "summary.json", lambda s: s["coverage"].update(used_as_retain=1))
    assert verdict(page(light)) == "inconclusive"


# -- directories that are not complete ---------------------------------------------------------------------------------

PARTS = ("audit", "shards", "env.json", "plan.json", "done.json", "ledger.jsonl", "run.yaml")


@pytest.mark.parametrize("gone", PARTS)
def test_page_is_written_whichever_part_is_gone(light: Path, gone: str) -> None:
    path = light / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    expected = {"audit": "not_evaluated"}.get(gone, "pass")
    assert verdict(page(light)) == expected


@pytest.mark.parametrize("kept", ["run.yaml", "audit/summary.json"])
@pytest.mark.parametrize("content", [None, "{}"])
def test_page_is_written_from_nearly_nothing(light: Path, tmp_path: Path, kept: str, content: str | None) -> None:
    bare = tmp_path / "bare"
    (bare / kept).parent.mkdir(parents=True)
    (bare / kept).write_text((light / kept).read_text() if content is None else content)
    found = page(bare)
    assert found.text().count("not evaluated") > 10
    assert verdict(found) == ("pass" if kept.startswith("audit") and content is None else "not_evaluated")


def test_audit_without_raw_scores_has_figures_but_no_curves(light: Path) -> None:
    found = page(light)
    assert verdict(found) == "pass"
    assert not any(alt.startswith("ROC curves") for alt in found.attributes("alt"))


def test_every_leaf_of_the_summary_may_be_anything(light: Path) -> None:
    """StrictUndefined and formatting survive odd values in every place, one place at a time."""
    path = light / "audit" / "summary.json"
    whole = json.loads(path.read_text())
    for odd in (None, [1], "x"):
        for section in whole:
            path.write_text(json.dumps(whole | {section: odd}))
            shown = render(load_run(light))
            assert shown.rstrip().endswith("</html>") and "Traceback" not in shown and "Undefined" not in shown
            if section == "gates":  # a verdict that cannot be read is none
                assert verdict(page(light)) == "not_evaluated"
        for name in ("knn", "linear_probe"):
            path.write_text(json.dumps(whole | {"utility": {name: odd}, "attacks": {name: odd}}))
            render(load_run(light))


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds neither run.yaml nor"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["audit/summary.json", "audit/scores-original.json", "env.json", "run.yaml"])
def test_damaged_file_is_refused_and_the_old_report_stays(passing: Path, name: str) -> None:
    before = write_report(passing).read_bytes()
    (passing / name).write_text('{"attacks": ')
    with pytest.raises(DataError, match=re.escape(name)):
        write_report(passing)
    assert (passing / "report.html").read_bytes() == before


# -- curves ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_area_under_the_drawn_curve_is_the_auc(finished: dict[str, Path], case: str, attack: str) -> None:
    run = load_run(finished[case])
    for encoder in ENCODERS:
        curve = roc_curve(run.scores[encoder], attack)
        assert curve is not None
        x, y = curve
        area = float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2))
        assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1) and (np.diff(x) >= 0).all() and (np.diff(y) >= 0).all()
        reference = by_scikit_learn(finished[case], encoder, attack)
        assert area == pytest.approx(reference, abs=1e-12)
        assert area == pytest.approx(run.audit["attacks"][attack][encoder]["auc"], abs=1e-12)


def by_scikit_learn(run: Path, encoder: str, attack: str) -> float:
    """AUC from the raw file, by another implementation; the mean over the fits of a crosswise attack."""
    samples = json.loads((run / "audit" / f"scores-{encoder}.json").read_text())["samples"].values()
    columns = [f"{attack}_fold{fold}" for fold in (0, 1)] if attack == "encodermi_vector" else [attack]
    areas = []
    for column in columns:
        rows = [row for row in samples if row["role"] in ("forget", "holdout") and column in row]
        truth = [row["role"] == "forget" for row in rows]
        area = roc_auc_score(truth, [row[column] for row in rows])
        areas.append(1 - area if attack.startswith("gradient_norm") else area)
    return float(np.mean(areas))


# -- files that contradict each other ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "attacks.bank_loss.gap.high",
        "gates.knn.verdict",
        "utility.knn.original",
        "coverage.consumed_min",
        "states.original",
    ],
)
def test_summary_that_the_other_files_do_not_bear_out_is_refused(passing: Path, key: str) -> None:
    def change(summary: dict) -> None:
        *path, last = key.split(".")
        for name in path:
            summary = summary[name]
        summary[last] = "fail" if last == "verdict" else 0.123

    change_json(passing / "audit" / "summary.json", change)
    with pytest.raises(DataError, match=f"audit/summary.json differs .*{key}"):
        write_report(passing)


@pytest.mark.parametrize("gone", ["audit/scores-unlearned.json", "ledger.jsonl"])
def test_pass_needs_raw_scores_and_ledger(passing: Path, gone: str) -> None:
    (passing / gone).unlink()
    found = Page(write_report(passing).read_text(encoding="utf-8"))
    assert verdict(found) == "inconclusive" and "not there" in found.text("verdict")


def test_doses_are_a_table_and_a_page_of_another_dose_says_so(light: Path) -> None:
    (light / "dose").mkdir()
    (light / "dose/curve.json").write_text(json.dumps(CURVE))
    page = write_report(light).read_text()
    shown = page[page.index("How far to go") : page.index("How far from the retrained")]
    for words in ("321 unseen images", "0 to 1", "<small>chosen</small>", "may cost too much", "0.520", "25.0", "7.5"):
        assert words in shown, words
    assert shown.index("0.800") < shown.index("chosen") < shown.index("0.300")
    assert "has another dose" in shown  # the run is of the whole dose
    for damaged in ({**CURVE, "auc": "x"}, {**CURVE, "grid": [None, {}, "<b>"]}, {"dose": 1}, {**CURVE, "lost": [[]]}):
        (light / "dose/curve.json").write_text(json.dumps(damaged))
        assert "<b>" not in write_report(light).read_text()
