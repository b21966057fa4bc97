"""Imports run down only: a declared order of the rooms, no circle of modules, nothing loose at the package's root."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import distunlearn

PACKAGE = Path(distunlearn.__file__).parent
LAYERS = (
    "verify", "errors", "common", "config", "distributed", "data", "encoders", "objectives", "constraints", "methods",
    "engine", "audit", "report", "plan", "run", "sweep", "cli", "api", "__main__",
)  # fmt: skip
LOOSE = {"__init__.py", "__main__.py", "api.py", "errors.py"}
LIMIT = 40  # imports inside functions, for heavy optional packages and light commands


def modules(package: Path) -> dict[str, str]:
    """Source text of every module, by dotted name below the package."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path.read_text("utf-8")
    return found


def imports(text: str, names: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
    """(imported module below the package, inside a function), imports for type checkers included."""
    tree = ast.parse(text)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("distunlearn"):
            continue
        base = (node.module or "").removeprefix("distunlearn").lstrip(".")
        for alias in node.names:
            full = f"{base}.{alias.name}".lstrip(".")
            if full in names or base:
                yield (full if full in names else base), id(node) in inside


def upward(texts: Mapping[str, str]) -> list[str]:
    """Imports of a room that lies above the importing one, or beside it in no declared order."""
    wrong = []
    for name, text in texts.items():
        room = name.split(".")[0]
        for target, _ in imports(text, texts):
            other = target.split(".")[0]
            if room != "__init__" and room != other and LAYERS.index(other) >= LAYERS.index(room):
                wrong.append(f"{name} imports {target}")
    return wrong


def circle(texts: Mapping[str, str]) -> list[str]:
    """One circle of modules that import each other when they are loaded; empty if there is none."""
    graph = {
        name: {t for t, inside in imports(text, texts) if not inside and t != name} for name, text in texts.items()
    }
    state: dict[str, int] = {}

    def visit(name: str, path: list[str]) -> list[str]:
        state[name] = 1
        for target in sorted(graph.get(name, ())):
            if state.get(target) == 1:
                return [*path[path.index(target) :], target]
            if target not in state and (found := visit(target, [*path, target])):
                return found
        state[name] = 2
        return []

    for name in graph:
        if name not in state and (found := visit(name, [name])):
            return found
    return []


def test_imports_run_down_only():
    assert upward(modules(PACKAGE)) == []


def test_an_arrow_that_runs_up_is_seen():
    texts = modules(PACKAGE)
    texts["common.text"] += "\nfrom distunlearn.methods.base import Method\n"
    assert upward(texts) == ["common.text imports methods.base"]
    texts["data.schedule"] += "\ndef f():\n    from distunlearn import api\n"
    assert len(upward(texts)) == 1 + ("api" in texts)


def test_no_modules_import_each_other():
    assert circle(modules(PACKAGE)) == []


def test_a_circle_is_seen():
    texts = modules(PACKAGE)
    texts["common.text"] += "\nfrom distunlearn.data.decode_all import x\n"
    texts["data.decode_all"] = "from distunlearn.common.text import printable\n"
    assert set(circle(texts)) == {"common.text", "data.decode_all"}


def test_nothing_is_loose_at_the_root():
    assert {path.name for path in PACKAGE.glob("*.py")} <= LOOSE


def test_imports_inside_functions_are_few():
    texts = modules(PACKAGE)
    inside = 0
    for text in texts.values():
        tree = ast.parse(text)
        functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        found = {id(n) for f in functions for n in ast.walk(f) if isinstance(n, (ast.Import, ast.ImportFrom))}
        inside += len(found)
    assert inside <= LIMIT


def test_verify_needs_nothing_else_of_the_package_and_no_torch():
    """It is a wheel of its own under another name, so that even its own modules have relative names alone."""
    allowed = {"numpy", "scipy", "pydantic", "rfc8785", "cryptography", *sys.stdlib_module_names}
    allowed |= {"rfc3161_client"}  # of the extra `timestamps`, imported where it is used
    for path in (PACKAGE / "verify").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{path.name} imports from above"
                named = [] if node.level else [node.module]
            assert {name.split(".")[0] for name in named} <= allowed, (path.name, named)
