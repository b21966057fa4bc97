"""Plant small mistakes in a copy of the package, one at a time, and see whether the tests of their area notice.

    python benchmarks/mutants.py                       # all of benchmarks/planted_mistakes.toml
    python benchmarks/mutants.py --only 3 --only 17    # some, by number
    python benchmarks/mutants.py --check               # does every entry still fit the code? nothing is run
    python benchmarks/mutants.py --document FILE       # the outcome as a page

A mistake is noticed where pytest reports a failed test. A run that fails for another reason (nothing collected, an
internal error) counts as nothing. The areas' tests must pass without any mistake first, or they would notice all.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tomllib

REPOSITORY = Path(__file__).resolve().parents[1]
LIST = REPOSITORY / "benchmarks" / "planted_mistakes.toml"
COPIED = ("distunlearn", "tests", "benchmarks", "docs", "launch", "slurm", "examples", "pyproject.toml", "README.md")
OUTCOMES = {0: "survived", 1: "noticed"}  # by pytest's exit code


@dataclass(frozen=True)
class Mistake:
    """number: place in the list, from 1. kind: "known" or "further". tests: files of its area."""

    number: int
    kind: str
    area: str
    file: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...]


def read_list(path: Path = LIST) -> list[Mistake]:
    """All entries, numbered from 1."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    return [
        Mistake(number, entry["list"], entry["area"], entry["file"], entry["what"], entry["old"], entry["new"],
                tuple(content["areas"][entry["area"]]))
        for number, entry in enumerate(content["mistake"], start=1)
    ]  # fmt: skip


def misfit(mistake: Mistake, tree: Path) -> str | None:
    """Why an entry cannot be planted in a tree; None where it can."""
    path = tree / mistake.file
    if not path.is_file():
        return f"{mistake.file} does not exist"
    found = path.read_text(encoding="utf-8").count(mistake.old)
    if found != 1:
        return f"its old text stands {found} times in {mistake.file}, expected once"
    if mistake.old == mistake.new:
        return "it changes nothing"
    missing = [test for test in mistake.tests if not (tree / test).exists()]
    return f"{', '.join(missing)} does not exist" if missing else None


def run_tests(tree: Path, tests: Sequence[str], limit: float) -> tuple[str, str, float]:
    """(outcome, name of the first failed test or last line, seconds) of the tests in a tree."""
    begun = time.monotonic()
    variables = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    process = subprocess.Popen(
        command, cwd=tree, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return "timed out", "", time.monotonic() - begun
    lines = [line for line in said.splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    said_last = (failed or lines or [""])[-1]
    outcome = OUTCOMES.get(process.returncode, f"pytest ended with {process.returncode}")
    return outcome, said_last.split(" - ")[0].removeprefix("FAILED "), time.monotonic() - begun


def plant(mistake: Mistake, tree: Path, limit: float) -> tuple[str, str, float]:
    """`run_tests` of the mistake's area with the mistake in the tree, which is as before afterwards."""
    path = tree / mistake.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mistake.old, mistake.new), encoding="utf-8")
    try:
        return run_tests(tree, mistake.tests, limit)
    finally:
        path.write_text(text, encoding="utf-8")


def copy_tree(target: Path) -> None:
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        elif source.exists():
            shutil.copy2(source, target / name)


def document(rows: Sequence[tuple[Mistake, str, str, float]], unplanted: Sequence[tuple[Mistake, str]]) -> str:
    """The outcome as a page."""
    lines = ["# Planted mistakes", "", "Written by `python benchmarks/mutants.py --document`; one mistake at a time,",
             "each against the tests of its area.", ""]  # fmt: skip
    lines += ["| list | planted | noticed | share |", "|---|---|---|---|"]
    for kind in dict.fromkeys(m.kind for m, *_ in rows):
        of_kind = [outcome for m, outcome, *_ in rows if m.kind == kind]
        noticed = sum(outcome == "noticed" for outcome in of_kind)
        lines.append(f"| {kind} | {len(of_kind)} | {noticed} | {100 * noticed / len(of_kind):.0f} % |")
    missed = [row for row in rows if row[1] != "noticed"]
    lines += ["", "## Not noticed", ""]
    lines += [f"* {m.number}, {m.file}: {m.what} ({outcome})." for m, outcome, *_ in missed] or ["None."]
    lines += ["", "## Not planted", ""]
    lines += [f"* {m.number}, {m.file}: {m.what}: {why}." for m, why in unplanted] or ["None."]
    lines += ["", "## All", "", "| number | list | file | mistake | outcome | seconds | first failed test |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for m, outcome, test, seconds in rows:
        file = m.file.removeprefix("distunlearn/")
        name = test.replace("|", "\\|") if outcome == "noticed" else ""
        lines.append(f"| {m.number} | {m.kind} | {file} | {m.what} | {outcome} | {seconds:.0f} | {name} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """0: every mistake that was planted is noticed; 1: some are not, or do not fit the code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, action="append", help="number of an entry; may be given several times")
    parser.add_argument("--check", action="store_true", help="only look whether every entry fits the code")
    parser.add_argument("--unchanged", action="store_true", help="run the areas' tests without any mistake first")
    parser.add_argument("--limit", type=float, default=400, help="seconds for the tests of one mistake")
    parser.add_argument("--document", type=Path, help="write the outcome to this file")
    arguments = parser.parse_args(argv)
    entries = [m for m in read_list() if not arguments.only or m.number in arguments.only]
    unplanted = [(m, why) for m in entries if (why := misfit(m, REPOSITORY))]
    for mistake, why in unplanted:
        print(f"{mistake.number:3d} does not fit: {why}", flush=True)
    if arguments.check:
        return 1 if unplanted else 0
    planted = [m for m in entries if m not in {m for m, _ in unplanted}]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        if arguments.unchanged:
            for tests in dict.fromkeys(m.tests for m in planted):
                outcome, said, _ = run_tests(tree, tests, arguments.limit)
                if outcome != "survived":
                    print(f"{', '.join(tests)} fails without any mistake ({said}); mend it first", flush=True)
                    return 1
        for mistake in planted:
            outcome, said, seconds = plant(mistake, tree, arguments.limit)
            rows.append((mistake, outcome, said, seconds))
            print(f"{mistake.number:3d} {outcome:9s} {seconds:4.0f} s  {mistake.file}: {mistake.what}", flush=True)
            if arguments.document:
                arguments.document.write_text(document(rows, unplanted), encoding="utf-8")
    return 0 if not unplanted and all(outcome == "noticed" for _, outcome, *_ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
