"""mkdocs hook: README, CHANGELOG, CONTRIBUTING and the documents of measurements become pages of the site.

They stay where a reader of the repository looks for them. Here their links, and links to them, are turned towards the
site; files that are no pages (examples, scripts, raw results) are copied beside them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()([^)#\s]+)([^)]*\))")
PAGES = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}


def _pages() -> dict[str, str]:
    """{path in the repository: path in the site} of pages that docs/ does not hold."""
    results = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
    return {**PAGES, **{f"benchmarks/results/{p.name}": f"results/{p.name}" for p in results}}


def _place(path: str) -> str:
    """Where a file of the repository lies in the site."""
    return _pages().get(path) or (path[5:] if path.startswith("docs/") else f"files/{path}")


def _turned(text: str, source: str) -> tuple[str, set[str]]:
    """The page at `source` of the repository with its links as the site has them; and what they lead to."""
    targets, here = set(), PurePosixPath(_place(source)).parent

    def turn(match: re.Match[str]) -> str:
        if "://" in match[2]:
            return match[0]
        target = os.path.normpath(PurePosixPath(source).parent / match[2])
        if (ROOT / target).is_dir():  # a site has no folders
            target = next((str(p.relative_to(ROOT)) for p in sorted((ROOT / target).glob("*.py"))), target)
        targets.add(target)
        return match[1] + os.path.relpath(_place(target), here) + match[3]

    return LINK.sub(turn, text), targets


def on_files(files: Files, config: object) -> Files:
    """Adds the pages, and every other file of the repository that a page leads to."""
    sources = [*_pages(), *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    wanted: set[str] = set()
    for source in sources:
        text, targets = _turned((ROOT / source).read_text(encoding="utf-8"), source)
        wanted |= targets
        place = _place(source)
        if place in files.src_uris:
            files.remove(files.src_uris[place])
        files.append(File.generated(config, place, content=text))  # type: ignore[arg-type]
    for target in sorted(wanted - set(sources)):
        if (ROOT / target).is_file() and not target.startswith("docs/"):
            files.append(File.generated(config, _place(target), abs_src_path=str(ROOT / target)))  # type: ignore[arg-type]
    return files
