"""What must hold for the page of any run, whatever its verdict."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

from rundir import Page

BROKEN = re.compile(
    r"\b(?:nan|inf|None(?! was| of)|Undefined|True|False)\b|\{\{|\}\}|strangers?\b|(?<!\d)-\d|\+-|--(?![a-z])"
)
MISSING = "not evaluated"
TICK = re.compile(r'<g id="([xy])tick_\d+">.*?<text[^>]*>([^<]*)</text>', re.S)


class Tables(HTMLParser):
    """Cells of every table: a list of rows, each a list of texts, row headings left out."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: list[list[list[str]]] = []
        self._cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag == "td":
            self.tables[-1][-1].append("")
        self._cell = tag == "td" or (self._cell and tag not in ("th", "table", "tr"))

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[-1][-1][-1] += data


def scales(page: Page) -> list[list[str]]:
    """The numbers on every axis of every picture."""
    found = []
    for source in page.attributes("src"):
        ticks = TICK.findall(base64.b64decode(source.partition(",")[2]).decode())
        found += [axis for of in "xy" if (axis := [text for letter, text in ticks if letter == of])]
    return found


def problems(text: str) -> list[str]:
    """Sentences about what is wrong on a page."""
    page = Page(text)
    shown = " ".join(page.text(section) for section in page.sections if section != "origin")  # where texts are foreign
    found = [f"broken: {shown[max(0, at.start() - 30) : at.end() + 20]!r}" for at in BROKEN.finditer(shown)]
    names = set(page.attributes("id"))
    found += [f"no section {link}" for link in page.attributes("href") if link.removeprefix("#") not in names]
    alts = [attrs.get("alt") or "" for tag, attrs in page.elements if tag == "img"]
    found += [f"no content: {alt!r}" for alt in alts if alt and not re.search(r"\d", alt)]
    found += [f"a scale with one number twice: {axis}" for axis in scales(page) if len(set(axis)) < max(2, len(axis))]
    for rows in Tables(text).tables:
        width = max((len(row) for row in rows), default=0)
        for column in range(width):
            cells = [row[column].strip() for row in rows if len(row) == width]
            if len(cells) > 1 and set(cells) == {MISSING}:
                found.append(f"a column that says nothing beside {rows[1][:column]}")
    captions = " ".join(re.findall(r'<p class="caption">(.*?)</p>', text, re.S))
    if 'class="key retrained"' not in text and "retrained one" in captions:
        found.append("a caption speaks of a retrained encoder that is not there")
    return found
