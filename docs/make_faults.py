"""Print docs/faults.md, made from the tables tests/faults/rows_*.py.

    python docs/make_faults.py > docs/faults.md
    python docs/make_faults.py --tests   # its tests instead, without those that need daemons of SLURM

A test compares the committed page with what this prints, and that every test it names exists.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {
    "C": "Settings and the command line", "F": "Forget lists", "S": "Shards and images", "E": "Encoders as input",
    "D": "Processes", "N": "Numerics", "K": "Checkpoints and the file system", "L": "SLURM",
    "R": "Evidence and report", "X": "Secrets and traces", "O": "Found from outside",
}  # fmt: skip
HEAD = """\
# Faults and the tests that show what happens

Each row is a fault, what happens, and the tests that bring the fault about. A row that does not apply says why. This
page is made by `python docs/make_faults.py > docs/faults.md`; do not edit it by hand.

The rows under SLURM need its daemons (`launch/test.sh -m slurm tests/slurm`); the long tests of O27, O29 and O30 belong
to `launch/test.sh -m matrix`; all others are part of the default run.
To run those of this page alone: `launch/test.sh -n 2 --dist loadscope $(python docs/make_faults.py --tests)`.
"""

# For tables that name tests alone.
SENTENCES = {
    "F01": "empty list", "F02": "ids that no image has", "F03": "one image listed several times",
    "F04": "a list of nearly all images, or of a class", "F05": "an id to forget and to retain",
    "F06": "exact copies of a forgotten image among the retained", "F07": "near copies among the retained",
    "F08": "a list edited after the shards were made", "F09": "millions of ids", "F10": "formulas and markup in ids",
    "F11": "ids that are paths out of the folder", "F12": "malformed lists",
    "F13": "spellings that differ in case, Unicode form or slashes", "F14": "fewer images to forget than ranks",
    "F15": "the key of a signature is missing",
    "S01": "a broken header in mid-shard", "S02": "a shard that is truncated, empty, missing or no tar",
    "S03": "other bytes of the same size", "S04": "a manifest of other shards",
    "S05": "duplicate or incomplete members",
    "S06": "links, devices and paths as members", "S07": "commands and URLs as shards", "S08": "pickles as members",
    "S09": "an image that claims a huge size", "S10": "damaged and foreign bytes as images",
    "S11": "unusual colour modes and orientations", "S12": "tiny and extreme images",
    "S13": "a retained image cannot be read",
    "S14": "an image to forget cannot be read", "S15": "a reader process is killed", "S16": "a reader process raises",
    "S17": "uneven shares and last batches", "S18": "fewer images than a batch", "S19": "read errors and slow disks",
    "S20": "prepare is interrupted", "S21": "two prepares into one folder",
    "K01": "SIGKILL at every point of a save", "K02": "disk full, read-only or failing",
    "K03": "flipped bytes, missing files, edited COMMIT.json or LATEST", "K04": "resumed at every step",
    "K05": "resumed on another number of ranks", "K06": "a save in flight at the end or a signal",
    "K07": "removing old checkpoints", "K08": "clocks and file times that jump", "K09": "two runs in one folder",
    "K10": "an orphan of an earlier attempt", "K11": "checkpoints of other format versions",
    "K12": "a run directory that was moved", "K13": "random state that is missing or damaged",
    "K14": "a folder that others may write into",
}  # fmt: skip

Row = tuple[str, "list[str] | str"]
KINDS_HEAD = """
## Kinds of what was found from outside

The rows above are the faults that were found. Each kind has inputs of its own, too, that were not among them; their
tests prove that the fault fired.

| kind | rows | further inputs | shown by |
|---|---|---|---|
"""


def table(path: Path) -> ModuleType:
    """A table of rows, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kinds() -> dict[str, tuple[list[str], list[tuple[str, str]]]]:
    """kind -> (its rows, further inputs and their tests)."""
    return table(ROOT / "tests/faults/rows_outside.py").KINDS


def rows() -> dict[str, Row]:
    """All tables together, in the order of GROUPS."""
    found: dict[str, Row] = {}
    for path in sorted((ROOT / "tests" / "faults").glob("rows_*.py")):
        for name, row in table(path).ROWS.items():
            assert name not in found, f"{name} is in two tables"
            found[name] = row if isinstance(row, tuple) else (SENTENCES.get(name, ""), row)
    order = list(GROUPS)
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0])))


def tests_of(path: Path) -> set[str]:
    """Names of the test functions of a file, methods as Class::name."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return {name for name in names if name.rpartition("::")[2].startswith("test")}


def missing() -> list[str]:
    """Tests that a table names and that do not exist."""
    known: dict[str, set[str]] = {}
    gone = []
    further = {kind: ("", [test for _, test in inputs]) for kind, (_, inputs) in kinds().items()}
    for name, (_, shown) in {**rows(), **further}.items():
        for test in shown if isinstance(shown, list) else ():
            file, _, function = test.partition("::")
            path = ROOT / file
            if file not in known:
                known[file] = tests_of(path) if path.is_file() else set()
            if re.sub(r"\[.*\]$", "", function) not in known[file]:
                gone.append(f"{name}: {test}")
    return gone


def fault_tests() -> list[str]:
    """All tests that the tables name and that need no daemon of SLURM, each once."""
    named = {test for _, shown in rows().values() if isinstance(shown, list) for test in shown}
    return sorted(test for test in named if not test.startswith("tests/slurm/test_cluster.py"))


def page() -> str:
    """The whole page as Markdown."""
    parts, group = [HEAD], ""
    for name, (sentence, shown) in rows().items():
        if name[0] != group:
            group = name[0]
            parts.append(f"\n## {GROUPS[group]}\n\n| row | fault, and what happens | shown by |\n|---|---|---|\n")
        told = "<br>".join(f"`{test}`" for test in shown) if isinstance(shown, list) else shown
        parts.append(f"| {name} | {sentence} | {told} |\n")
    parts.append(KINDS_HEAD)
    for kind, (names, inputs) in kinds().items():
        for number, (sentence, test) in enumerate(inputs):
            parts.append(
                f"| {'' if number else kind} | {'' if number else ', '.join(names)} | {sentence} | `{test}` |\n"
            )
    return "".join(parts)


if __name__ == "__main__":
    sys.stdout.write("\n".join(fault_tests()) + "\n" if sys.argv[1:] == ["--tests"] else page())
