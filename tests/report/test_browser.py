"""The page in Debian's Chromium: no serious finding of axe, by day and by night, and nothing wider than the screen.

    pip install -e '.[browser]'
    SCREENSHOTS=/tmp pytest -m browser tests/report

Chromium is looked for on the PATH; playwright's own browsers are not needed. SCREENSHOTS: a folder for the whole pages.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kinds import KINDS

from distunlearn.report.data import checked_run
from distunlearn.report.render import render

pytestmark = pytest.mark.browser
SERIOUS = ("serious", "critical")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield opened
        opened.close()


def serious(page: Any) -> list[str]:
    """axe's findings that keep somebody from reading the page."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {each['nodes'][0]['html'][:120]}" for each in found if each["impact"] in SERIOUS]


@pytest.mark.parametrize("name", KINDS)
def test_everybody_can_read_it(browser: Any, tmp_path: Path, name: str) -> None:
    file = tmp_path / "report.html"
    file.write_text(render(checked_run(KINDS[name](tmp_path / "run"))))
    for width, scheme in itertools.product((1200, 390), ("light", "dark")):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True)
        page = context.new_page()
        page.goto(file.as_uri())
        assert serious(page) == [], (width, scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if shots := os.environ.get("SCREENSHOTS"):
            page.screenshot(path=Path(shots) / f"{name}-{width}-{scheme}.png", full_page=True)
        context.close()


def test_it_prints_on_white_paper(browser: Any, tmp_path: Path) -> None:
    """Also from a dark screen; nothing is wider than the page."""
    file = tmp_path / "report.html"
    file.write_text(render(checked_run(KINDS["fail"](tmp_path / "run"))))
    page = browser.new_page(viewport={"width": 720, "height": 900}, color_scheme="dark")
    page.goto(file.as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= 720
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") in (
        "rgb(255, 255, 255)",
        "rgba(0, 0, 0, 0)",
    )


def test_the_command_of_the_documents_makes_a_pdf(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs/privacy_officer.md"
    [command] = re.findall(r"^chromium .*$", page.read_text(), re.M)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits").symlink_to(KINDS["fail"](tmp_path / "run"))
    (tmp_path / "run/report.html").write_text(render(checked_run(tmp_path / "run")))
    program, *options = shlex.split(command)
    subprocess.run([program, "--no-sandbox", *options], cwd=tmp_path, check=True, timeout=120)
    made = (tmp_path / "report.pdf").read_bytes()
    assert made.startswith(b"%PDF") and b"%%EOF" in made[-10:]
    assert 5 <= len(re.findall(rb"/Type */Page\b", made)) <= 20


def test_what_nobody_can_read_is_found(browser: Any) -> None:
    page = browser.new_page()
    page.set_content(
        "<html lang=en><title>t</title><main><h1>t</h1><p style='color:#eee;background:#fff'>pale</p></main>"
    )
    assert any("color-contrast" in each for each in serious(page))
