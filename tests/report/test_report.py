"""The page as a reader gets it: verdicts, missing figures, hostile text, nothing fetched, nobody named."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rundir
from parts import ATTACKS, METHODS, method_settings
from rundir import Page, change_json
from sklearn.metrics import roc_auc_score

from distunlearn.config.load import save_config
from distunlearn.config.registry import ATTACKS as ATTACK_TABLE
from distunlearn.config.schema import RuntimeConfig
from distunlearn.errors import ConfigError, DataError
from distunlearn.report import facts, texts
from distunlearn.report.data import load_run
from distunlearn.report.render import render, roc_curve, write_report
from distunlearn.verify.figures import ENCODERS

CASES = {"pass": "Pass", "fail": "Fail", "inconclusive": "Inconclusive"}
HOSTILE = (
    "<script>alert(1)</script>",
    "{{7*7}}{% include 'report.css.j2' %}",
    "javascript:alert(1)",
    "\"><img src=http://example.org/x onerror=alert(1)>",
    "</style><style>*{background:url(http://example.org/y)}",
    "gnp.\u202efdp\u2066<b>",
)  # fmt: skip


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One finished run for each verdict; tests that change one copy it."""
    root = tmp_path_factory.mktemp("finished")
    return {case: rundir.build_run(root / case, case) for case in CASES}


@pytest.fixture
def passing(finished: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the run that passes."""
    return shutil.copytree(finished["pass"], tmp_path / "run")


@pytest.fixture
def light(passing: Path) -> Path:
    """The same without raw scores: no curves, and a page in a tenth of the time."""
    for encoder in ENCODERS:
        (passing / "audit" / f"scores-{encoder}.json").unlink()
    return passing


def page(run: Path) -> Page:
    return Page(render(load_run(run)))


def verdict(found: Page) -> str:
    """The class of the verdict's box, after "verdict"."""
    boxes = [attrs["class"] for tag, attrs in found.elements if tag == "section" and "class" in attrs]
    return next(box.split()[1] for box in boxes if box and box.startswith("verdict "))


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
        assert f"{summary['two_sample'][encoder]['auc']:.3f}" in found.text("strangers")
        assert f"{summary['controls']['third_party_against_holdout'][encoder]['auc']:.3f}" in found.text("controls")
    assert "63 000" in found.text("cost") and "21 %" in found.text("cost")
    assert "Every one of the 40 requested images" in found.text("asked")
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


# -- nothing harmful, nothing fetched, nobody named --------------------------------------------------------------------


def assert_inert(found: Page) -> None:
    """No script, no handler, no form or frame, and no address that a browser would open by itself or by a click."""
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "iframe", "object", "embed", "form", "link", "base", "audio", "video", "a"}, tags
    for tag, attrs in found.elements:
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("srcset", "action", "formaction", "poster", "background", "style"), (tag, name)
            if name in ("src", "href", "xlink:href"):
                assert value and value.startswith("data:image/svg+xml;base64,"), (tag, name, str(value)[:60])
    assert "url(" not in found.style and "@import" not in found.style
    for source in found.attributes("src"):
        svg = base64.b64decode(source.partition(",")[2], validate=True).decode("utf-8")
        inner = Page(svg)
        assert not {"script", "image", "foreignobject", "style"} & {tag for tag, _ in inner.elements} - {"style"}
        for _, attrs in inner.elements:
            for name, value in attrs.items():
                assert not name.startswith("on")
                if name in ("href", "xlink:href"):
                    assert value and value.startswith("#"), value
        assert all(address.startswith("url(#") for address in re.findall(r"url\([^)]", svg))


def test_page_of_a_run_is_inert_and_guarded(finished: dict[str, Path]) -> None:
    found = page(finished["pass"])
    assert_inert(found)
    policies = [attrs["content"] for _, attrs in found.elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    rules = dict(rule.strip().split(" ", 1) for rule in (policies[0] or "").split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    assert not {"script-src", "connect-src", "font-src"} & rules.keys()
    head = [tag for tag, _ in found.elements].index("style")
    assert found.elements.index(next(e for e in found.elements if e[1].get("http-equiv"))) < head


def test_inertness_check_can_fail() -> None:
    for bad in ("<script></script>", "<img src='http://x/'>", "<p onclick=x>", "<a href='javascript:x'>y</a>"):
        with pytest.raises(AssertionError):
            assert_inert(Page(bad))


def poison(value: object, text: str, depth: int = 0) -> object:
    """Every text and every key below the first two levels replaced by `text`; numbers stay."""
    if isinstance(value, dict):
        odd = {text: 1.0, "": text}
        return {key: poison(inner, text, depth + 1) for key, inner in value.items()} | (odd if depth else {})
    if isinstance(value, list):
        return [poison(inner, text, depth + 1) for inner in value]
    return text if isinstance(value, str) else value


@pytest.mark.parametrize("text", [*HOSTILE, "A" * 1_000_000], ids=lambda text: text[:24])
def test_hostile_text_is_inert_wherever_it_stands(passing: Path, text: str) -> None:
    clean = len(write_report(passing).read_bytes())
    for name in ("env.json", "plan.json", "done.json", "shards/summary.json", "audit/summary.json"):
        path = passing / name
        path.write_text(json.dumps(poison(json.loads(path.read_text()), text)))
    change_json(passing / "audit" / "summary.json", lambda s: s["attacks"].update({text: s["attacks"]["bank_loss"]}))
    for encoder in ENCODERS:
        odd = {text: {"role": "forget", text: 1.0}, "b": {"role": text, "bank_loss": 1.0}}
        change_json(passing / "audit" / f"scores-{encoder}.json", lambda s, odd=odd: s["samples"].update(odd))
    short = text[:60_000]  # a settings file has at most 1 MiB
    settings = {key: short for key in ("recipe", "seed", "reuse", "backend")}
    groups = {"data": ("source", "forget", "third_party_source", "root"), "encoder": ("name", "checkpoint")}
    groups |= {"objective": ("name",), "method": ("name",), text[:500]: (text[:500],)}
    settings |= {group: dict.fromkeys(keys, short) for group, keys in groups.items()}
    (passing / "run.yaml").write_text(json.dumps(settings))  # JSON is YAML
    with (passing / "ledger.jsonl").open("a") as ledger:
        ledger.write(json.dumps({"event": "done", "phase": text, "time": text}, separators=(",", ":")) + "\n")
    found = page(passing)
    assert_inert(found)
    assert "49" not in found.text("asked") and "\u202e" not in found.text() and "\u2066" not in found.text()
    assert len(render(load_run(passing)).encode()) < clean + 400_000
    assert verdict(found) == "not_evaluated", "a verdict that is no word of ours is none"


def test_page_is_small(finished: dict[str, Path], tmp_path: Path) -> None:
    counts = rundir.COUNTS | {"holdout": 2000, "forget": 800, "retain": 500}
    large = rundir.build_run(tmp_path / "large", counts=counts)
    for run in (*finished.values(), large):
        assert write_report(run).stat().st_size < 3_000_000


def test_no_image_and_no_list_is_named(passing: Path) -> None:
    cfg = rundir.settings()
    data = replace(cfg.data, forget="/home/alice/jane-doe-request.csv", root="/home/alice/patients")
    encoder = replace(cfg.encoder, checkpoint="/home/alice/clinic.pth")
    save_config(
        replace(cfg, data=data, encoder=encoder, runtime=RuntimeConfig(reuse="earlier-alice")), passing / "run.yaml"
    )
    text = render(load_run(passing))
    everything = text + "".join(
        base64.b64decode(source.partition(",")[2]).decode() for source in Page(text).attributes("src")
    )
    ids = json.loads((passing / "audit" / "scores-original.json").read_text())["samples"]
    assert len(ids) > 100
    for name in [*ids, "people/", ".png", "alice", "jane", "clinic", "members-000000"]:
        assert name not in everything, name
    assert "a list that was handed in as a file" in Page(text).text("asked")


def test_same_inputs_give_the_same_bytes(passing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    first = write_report(passing).read_bytes()
    elsewhere = shutil.copytree(passing, tmp_path / "another name")
    assert write_report(passing).read_bytes() == first == write_report(elsewhere).read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    dated = write_report(passing).read_bytes()
    assert b"2023-11-14" in dated and b"2023-11-14" not in first
    assert dated.replace(b", 2023-11-14", b"") == first
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "soon")
    with pytest.raises(ConfigError, match="SOURCE_DATE_EPOCH"):
        write_report(passing)


def test_order_of_the_raw_scores_leaves_no_trace(passing: Path) -> None:
    first = render(load_run(passing))
    for encoder in ENCODERS:
        path = passing / "audit" / f"scores-{encoder}.json"
        content = json.loads(path.read_text())
        content["samples"] = {f"renamed-{key}": row for key, row in reversed(content["samples"].items())}
        path.write_text(json.dumps(content))
    assert render(load_run(passing)) == first


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
