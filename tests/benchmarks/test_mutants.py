"""The script that plants mistakes: it refuses what it cannot plant, tells noticed from survived, leaves no trace."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

if sys.version_info < (3, 11):
    pytest.skip("the list of mistakes is TOML, which Python reads from 3.11 on", allow_module_level=True)

import mutants  # noqa: E402

ADDING = mutants.Mistake(
    1, "further", "sum", "adding.py", "subtracts", "return a + b", "return a - b", ("tests/test_adding.py",)
)


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "adding.py").write_text("def add(a, b):\n    return a + b\n\n\ndef unused(a):\n    return a * 2\n")
    (tmp_path / "tests").mkdir()
    test = "from adding import add\n\n\ndef test_adding():\n    assert add(2, 3) == 5\n"
    (tmp_path / "tests/test_adding.py").write_text(test)
    return tmp_path


def test_a_mistake_is_noticed_or_survives_and_is_taken_back(tree):
    before = (tree / "adding.py").read_text()
    outcome, test, _ = mutants.plant(ADDING, tree, 60)
    assert (outcome, test) == ("noticed", "tests/test_adding.py::test_adding")
    unseen = replace(ADDING, old="return a * 2", new="return a * 3")
    assert mutants.plant(unseen, tree, 60)[0] == "survived"
    assert (tree / "adding.py").read_text() == before
    nothing = replace(ADDING, tests=("tests/test_gone.py",))
    assert mutants.plant(nothing, tree, 60)[0] == "pytest ended with 4"  # no test ran: neither of both


def test_an_entry_that_does_not_fit_the_code_is_refused(tree):
    assert mutants.misfit(ADDING, tree) is None
    for changes, reason in (
        ({"old": "return a / b"}, "stands 0 times"), ({"old": "return a"}, "stands 2 times"),
        ({"file": "gone.py"}, "does not exist"), ({"new": ADDING.old}, "changes nothing"),
        ({"tests": ("tests/test_gone.py",)}, "test_gone.py does not exist"),
    ):  # fmt: skip
        assert reason in mutants.misfit(replace(ADDING, **changes), tree)


def test_the_list_is_complete_and_fits_the_code():
    """Where the code moves on, its entry follows: `python benchmarks/mutants.py --check`."""
    entries = mutants.read_list()
    known, further = (sum(m.kind == kind for m in entries) for kind in ("known", "further"))
    assert known == 20 and further >= 60
    assert len({(m.file, m.old, m.new) for m in entries}) == len(entries)
    assert {m.number: why for m in entries if (why := mutants.misfit(m, mutants.REPOSITORY))} == {}


def test_the_page_names_what_was_not_noticed():
    page = mutants.document([(ADDING, "survived", "", 1.0), (replace(ADDING, number=2), "noticed", "t::x", 2.0)], [])
    assert "| further | 2 | 1 | 50 % |" in page and "* 1, adding.py: subtracts (survived)." in page
