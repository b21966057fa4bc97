"""The page of runs of every kind: nothing broken or empty, no caption that the run contradicts, the case on top."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from page_rules import problems
from parts import method_settings
from rundir import CASES, Page, build_run, change_json, page, settings
from test_report import CURVE

from distunlearn.config.load import save_config
from distunlearn.report.data import load_run
from distunlearn.report.render import render


def without_retrained(run: Path) -> None:
    cfg = settings()
    save_config(replace(cfg, audit=replace(cfg.audit, tier=0)), run / "run.yaml")
    (run / "audit/scores-retrained.json").unlink()

    def forget(value: object) -> object:
        if not isinstance(value, dict):
            return value
        kept = {key: forget(inner) for key, inner in value.items() if key != "retrained"}
        return kept | {"gap": dict.fromkeys(value["gap"])} if isinstance(value.get("gap"), dict) else kept

    change_json(run / "audit/summary.json", lambda found: found.update(forget(found)))


def moved(run: Path) -> None:
    signals = {"view_agreement": {"original": 0.0, "unlearned": -1.5}}
    level = {"farthest": "view_agreement", "kept": False, "signals": signals}
    change_json(run / "audit/summary.json", lambda found: found.update(level=level))


def dosed(run: Path) -> None:
    (run / "dose").mkdir()
    (run / "dose/curve.json").write_text(json.dumps(CURVE))


def other_method(run: Path) -> None:
    save_config(replace(settings(), method=method_settings("neg_grad")), run / "run.yaml")


def relearned(run: Path) -> None:
    figures = {"steps": [0, 1, 2, 4, 8, 16], "steps_to_relearn": 8}
    both = {"original": {}, "unlearned": figures, "retrained": {**figures, "steps_to_relearn": None}}
    change_json(run / "audit/summary.json", lambda found: found.update(relearning=both))


def purged(run: Path) -> None:
    (run / "purge.json").write_text(json.dumps({"images": 40, "copies": 1}))


def nothing(run: Path) -> None:
    """As it is."""


CHANGES: list[Callable[[Path], None]] = [without_retrained, moved, dosed, other_method, relearned, purged]


@pytest.fixture(scope="module", params=[*CASES, *CHANGES], ids=lambda p: p if isinstance(p, str) else p.__name__)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Name of a kind of run, and its page."""
    change = nothing if isinstance(request.param, str) else request.param
    run = build_run(tmp_path_factory.mktemp("kind") / "run", request.param if change is nothing else "pass")
    change(run)
    return request.param if change is nothing else change.__name__, render(load_run(run))


def test_no_page_has_a_broken_number_an_empty_column_or_a_false_caption(kind: tuple[str, str]) -> None:
    name, text = kind
    assert problems(text) == []
    shown, found = " ".join(Page(text).words), Page(text)
    assert ("have moved as a whole" in shown) == (name == "moved")
    assert ("this run has none (audit.tier is 0)" in found.text("compare")) == (name == "without_retrained")
    assert ("The method of this run works on a part" in found.text("gradients")) == (name != "other_method")
    assert ("no encoder was retrained" in shown.lower()) == (name == "without_retrained")
    if name == "relearned":
        assert "5 to 8" in found.text("roc") and "retrained: more than 16" in found.text("roc")
    if name == "dosed":
        assert "best 0.5" in " ".join(found.attributes("alt"))
    assert ("40 images were deleted from the shards" in found.text("brief")) == (name == "purged")


def test_what_is_wrong_is_seen(finished: dict[str, Path]) -> None:
    good = render(load_run(finished["pass"]))
    assert problems(good) == []
    table = "<table><tr><td>1</td><td>not evaluated</td></tr><tr><td>2</td><td>not evaluated</td></tr></table>"
    for bad in ("<p>nan</p>", "<p>-0.5</p>", '<a href="#nowhere">x</a>', '<img alt="a picture">', table):
        assert len(problems(bad + good)) == 1, bad
    assert problems(good.replace('class="key retrained"', ""))


@pytest.mark.parametrize("case", CASES)
def test_the_page_begins_with_case_verdict_and_what_to_do(finished: dict[str, Path], case: str) -> None:
    found = page(finished[case])
    text, run = found.text(), load_run(finished[case])
    order = ["Case reference", str(run.request_sha256), "Verdict", "What was asked", "What was done", "What remains"]
    places = [text.index(words) for words in [*order, "Next step", "Contents"]]
    assert places == sorted(places)
    remains, following = found.text("brief").split("What remains")[1].split("Next step")
    for name in ("View agreement", "Training loss"):
        assert (name in remains) == (case != "pass")
    assert ("purge" in following) == (case == "pass")
    assert all(f"Level {number}" in found.text("assurance") for number in range(5))
