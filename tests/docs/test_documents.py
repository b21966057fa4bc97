"""The documents agree with the code: settings, links, and words that do not belong in them."""

from __future__ import annotations

import importlib.util
import json
import re
import types
from pathlib import Path

import pytest

from distunlearn.config.recipes import RECIPES
from distunlearn.config.shape import known_keys

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINKED = [*DOCUMENTS, ROOT / "tests" / "README.md", *sorted((ROOT / "benchmarks" / "results").glob("*.md"))]


def script(name: str) -> types.ModuleType:
    """docs/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def maker() -> types.ModuleType:
    """docs/make_configuration.py as a module."""
    return script("make_configuration")


def test_matrix_page_is_what_the_script_prints() -> None:
    committed = (ROOT / "docs" / "matrix.md").read_text(encoding="utf-8")
    assert committed == script("make_matrix").page(), "run: python docs/make_matrix.py > docs/matrix.md"


def test_a_failed_cell_shows_on_the_matrix_page(tmp_path: Path) -> None:
    maker = script("make_matrix")
    result = json.loads(maker.newest().read_text(encoding="utf-8"))
    stated = sum(cell["rounding"] is None for cell in result["cells"])
    beyond = "both" if stated < len(result["cells"]) else "them"
    text = " ".join(maker.page().split())
    assert f"{stated} within the stated limits" in text and f"; 0 beyond {beyond}" in text
    result["cells"][0] |= {"ok": False, "first": 0.5}
    path = tmp_path / "2026-01-01-matrix.json"
    path.write_text(json.dumps(result), encoding="utf-8")
    page = maker.page(path)
    assert f"{stated - 1} within the stated limits" in page and "**5e-01" in page
    assert f"; 1 beyond {beyond}" in " ".join(page.split())
    other = next(cell for cell in result["cells"] if cell["encoder"] == "vit")
    other |= {"precision": "float32", "rounding": [0.25, 0.5]}  # as a backend in float32 throughout
    path.write_text(json.dumps(result), encoding="utf-8")
    page = " ".join(maker.page(path).split())
    assert f"{stated - 2} within the stated limits; 1 beyond them" in page and "2e-01 / 5e-01" in page
    assert "; 1 beyond both" in page


def test_configuration_page_is_what_the_script_prints(maker: types.ModuleType) -> None:
    committed = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert committed == maker.page(), "run: python docs/make_configuration.py > docs/configuration.md"


def test_every_setting_has_a_meaning(maker: types.ModuleType) -> None:
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| (.*) \|$", maker.page(), flags=re.MULTILINE)
    assert {key for key, _ in rows} == set(known_keys())
    assert not [key for key, meaning in rows if not meaning.strip()]
    assert set(maker.MEANINGS) <= set(known_keys()), "a meaning of a setting that is gone"


def anchors(page: Path) -> set[str]:
    """The ids that GitHub and the site give the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("document", LINKED, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)[^)]*\)", document.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            page = document.parent / target if target else document
            assert page.exists(), f"{document.name}: {target}"
            assert not anchor or anchor in anchors(page), f"{document.name}: {target}#{anchor}"


def test_no_page_is_missing_from_the_site() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("nav:")[1]
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(re.findall(r"[\w.]+\.md", nav))


def test_every_document_of_measurements_is_in_the_index() -> None:
    index = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    documents = [path.name for path in (ROOT / "benchmarks" / "results").glob("*.md")]
    assert documents and not [name for name in documents if f"results/{name})" not in index]
    scripts, grids = set(re.findall(r"benchmarks/\w+\.py", index)), set(re.findall(r"--grid (\w+)", index))
    assert scripts and not [name for name in scripts if not (ROOT / name).exists()]
    text = (ROOT / "benchmarks" / "forgetting_grid.py").read_text(encoding="utf-8")
    assert grids and not [grid for grid in grids if f'"{grid}": Grid(' not in text]


def test_readme_shows_what_the_committed_results_say() -> None:
    maker = script("make_readme")
    found = json.loads(maker.QUICKSTART.read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == maker.readme(text, found), "run: python docs/make_readme.py"
    assert maker.PICTURE.read_text(encoding="utf-8") == maker.picture(found), "run: python docs/make_readme.py"
    assert maker.PICTURE.stat().st_size < 16_000 and {found["exit_code"]} <= {0, 6, 7}
    assert maker.readme(text, found | {"printed": ["Verdict: Pass."]}) != text
    other = {encoder: {"forget": [0.1, 0.2], "holdout": [0.3, 0.4]} for encoder in maker.ENCODERS}
    assert maker.picture({"view_agreement": other}) != maker.picture(found)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_settings_and_recipes_that_are_named_exist(document: Path) -> None:
    """`--set key=` and `distunlearn run recipe` in commands, and dotted keys in backticks."""
    text = document.read_text(encoding="utf-8")
    keys = set(known_keys())
    groups = {key.split(".")[0] for key in keys if "." in key}
    named = set(re.findall(r"--set ([\w.]+)=", text)) - {"KEY"}
    named |= {key for key in re.findall(r"`([a-z_]+\.[a-z_.]+)`", text) if key.split(".")[0] in groups}
    groups_named = {key for key in named if any(known.startswith(f"{key}.") for known in keys)}
    assert not named - keys - groups_named
    recipes = set(re.findall(r"distunlearn (?:run|pretrain|unlearn|plan) ([a-z0-9_]+)", text))
    assert recipes <= set(RECIPES)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_lines_are_short_outside_tables(document: Path) -> None:
    long = [line for line in document.read_text(encoding="utf-8").splitlines() if len(line) > 120]
    assert not [line for line in long if not line.startswith("|")]
