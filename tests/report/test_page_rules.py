"""The page of runs of every kind: nothing broken or empty, no caption that the run contradicts, the case on top."""

from __future__ import annotations

from pathlib import Path

import pytest
from kinds import KINDS
from page_rules import problems
from rundir import CASES, Page, page, verdict

from distunlearn.report.data import checked_run, load_run
from distunlearn.report.render import render


@pytest.fixture(scope="module", params=[*KINDS, "certified", "tiny"])
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Name of a kind of run, and its page."""
    name = request.param
    if name == "certified":
        run = request.getfixturevalue("case").run
    elif name == "tiny":
        run = request.getfixturevalue("finished_run")()[0]
    else:
        run = KINDS[name](tmp_path_factory.mktemp("kind") / "run")
    return name, render(checked_run(run))


VERDICTS = {
    "fail": "fail", "inconclusive": "inconclusive", "tier_0": "fail", "tier_0_few": "inconclusive",
    "small_request": "inconclusive", "chained": "inconclusive", "without_labels": "inconclusive", "certified": None,
    "tiny": None,
}  # fmt: skip
ONLY = {  # words -> the kinds on whose page they stand
    "lie elsewhere as a whole": {"moved"},
    "this run has none (audit.tier is 0)": {"tier_0", "tier_0_few"},
    "No encoder was retrained without the images": {"tier_0", "tier_0_few"},
    "groups of 20 held-out images": {"tier_0_few"},
    "12 images are too few for a pass": {"small_request"},
    "images are recognised,": {"fail", "tier_0"},
    "Persons on them: 24": {"persons"},
    "3 images of the requested persons stay": {"persons"},
    "It is request 3 on this encoder": {"chained"},
    "The original was not trained in this run": {"chained"},
    "5 of the images forgotten before are no longer in the shards": {"chained"},
    "labelled images of two classes or more, and there are none": {"without_labels"},
    "How far to go": {"dosed"},
    "keeps the share 0.50": {"dosed"},
    "has another dose": set(),
    "40 images were deleted from the shards": {"purged"},
    "Images purged from the shards after this audit: 40": {"purged"},
    "5 to 8": {"relearned"},
    "retrained: more than 16": {"relearned"},
    "ticket 17": {"certified"},
    "this run has deleted none of them": {*KINDS, "certified", "tiny"} - {"purged"},
}


def test_no_page_has_a_broken_number_an_empty_column_or_a_false_caption(kind: tuple[str, str]) -> None:
    name, text = kind
    assert problems(text) == []
    found = Page(text)
    shown = found.text()
    expected = VERDICTS.get(name, "pass")
    assert verdict(found) == expected or expected is None
    for words, kinds in ONLY.items():
        if expected is not None or name in kinds or words == "ticket 17":  # a real run may be recognised or not
            assert (words in shown) == (name in kinds), words
    assert "`" not in shown, "commands are set as code"
    assert ("The method of this run works on a part" in found.text("gradients")) == (
        name not in ("other_method", "relearned")  # the other method, and the sketch of the whole network
    )
    assert ("no encoder was retrained" in shown.lower()) == name.startswith("tier_0")
    assert ("distunlearn purge RUN" in found.text("brief")) == (verdict(found) == "pass" and name != "purged")
    following = "verify CERTIFICATE" if name == "certified" else "certify RUN"
    assert f": distunlearn {following}" in found.text("assurance")
    if name == "dosed":
        assert "best 0.5" in " ".join(found.attributes("alt"))


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
