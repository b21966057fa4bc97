"""The page is safe to open and to pass on: nothing runs, nothing is fetched, nobody is named, the same bytes again."""

from __future__ import annotations

import base64
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import rundir
from rundir import Page, change_json, page, verdict

from distunlearn.config.load import save_config
from distunlearn.config.schema import RuntimeConfig
from distunlearn.errors import ConfigError
from distunlearn.report.data import load_run
from distunlearn.report.render import render, write_report
from distunlearn.verify.figures import ENCODERS
from distunlearn.verify.ledger import next_link

HOSTILE = (
    "<script>alert(1)</script>",
    "{{70001*7}}{% include 'report.css.j2' %}",
    "javascript:alert(1)",
    "\"><img src=http://example.org/x onerror=alert(1)>",
    "</style><style>*{background:url(http://example.org/y)}",
    "gnp.\u202efdp\u2066<b>",
)  # fmt: skip


def assert_inert(found: Page) -> None:
    """No script, no handler, no form or frame, and no address that a browser would open by itself or by a click."""
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "iframe", "object", "embed", "form", "link", "base", "audio", "video"}, tags
    for tag, attrs in found.elements:
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("srcset", "action", "formaction", "poster", "background", "style"), (tag, name)
            if tag == "a":
                assert name == "href" and re.fullmatch(r"#[a-z-]+", value or ""), "only to a section of this page"
            elif name in ("src", "href", "xlink:href"):
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
    line = {"event": "done", "phase": text, "step": 0, "time": text}
    line["n"], line["prev"] = next_link(passing / "ledger.jsonl")
    with (passing / "ledger.jsonl").open("a") as ledger:
        ledger.write(json.dumps(line, separators=(",", ":")) + "\n")
    found = page(passing)
    assert_inert(found)
    assert "490007" not in found.text("asked") and "\u202e" not in found.text() and "\u2066" not in found.text()
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
