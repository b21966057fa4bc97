"""The page in Debian's Chromium: no serious finding of axe, by day and by night, and nothing wider than the screen.

    pip install axe-playwright-python
    pytest -m browser tests/report

Chromium is looked for on the PATH; playwright's own browsers are not needed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rundir import CASES

from distunlearn.report.data import load_run
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("case", CASES)
def test_everybody_can_read_it(browser: Any, finished: dict[str, Path], tmp_path: Path, case: str, scheme: str) -> None:
    file = tmp_path / "report.html"
    file.write_text(render(load_run(finished[case])))
    for width in (1200, 390):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True)
        page = context.new_page()
        page.goto(file.as_uri())
        assert serious(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        context.close()


def test_what_nobody_can_read_is_found(browser: Any) -> None:
    page = browser.new_page()
    page.set_content(
        "<html lang=en><title>t</title><main><h1>t</h1><p style='color:#eee;background:#fff'>pale</p></main>"
    )
    assert any("color-contrast" in each for each in serious(page))
