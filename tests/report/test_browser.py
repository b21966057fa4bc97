"""The page in Debian's Chromium: no serious finding of axe, by day and by night, and nothing wider than the screen.

    pip install -e '.[browser]'
    SCREENSHOTS=/tmp pytest -m browser tests/report

Chromium is looked for on the PATH; playwright's own browsers are not needed. SCREENSHOTS: a folder for the whole pages.
"""

from __future__ import annotations

import itertools
import os
import shutil
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
    assert page.pdf(path=tmp_path / "report.pdf", format="A4", print_background=True).startswith(b"%PDF")


def test_what_nobody_can_read_is_found(browser: Any) -> None:
    page = browser.new_page()
    page.set_content(
        "<html lang=en><title>t</title><main><h1>t</h1><p style='color:#eee;background:#fff'>pale</p></main>"
    )
    assert any("color-contrast" in each for each in serious(page))
