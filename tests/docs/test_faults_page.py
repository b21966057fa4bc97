"""docs/faults.md is made from the tables, and the tests that it names exist."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_documents import ROOT, script


@pytest.fixture(scope="module")
def maker():
    return script("make_faults")


def test_every_test_that_a_row_names_exists(maker):
    assert maker.missing() == []
    assert len(maker.rows()) >= 60 and all(shown for _, shown in maker.rows().values())


def test_a_test_that_is_gone_is_noticed(maker, monkeypatch):
    monkeypatch.setattr(maker, "rows", lambda: {"C01": ("", ["tests/cli/test_config_io.py::test_of_nothing"])})
    assert maker.missing() == ["C01: tests/cli/test_config_io.py::test_of_nothing"]


def test_every_kind_has_rows_and_three_further_inputs(maker):
    kinds = maker.kinds()
    assert len(kinds) == 9 and all(len(inputs) >= 3 for _, inputs in kinds.values())
    named = {name for names, _ in kinds.values() for name in names}
    assert named <= set(maker.rows()) and all(names for names, _ in kinds.values())


def test_the_page_is_what_the_script_prints(maker):
    committed = (Path(ROOT) / "docs" / "faults.md").read_text(encoding="utf-8")
    assert committed == maker.page(), "run: python docs/make_faults.py > docs/faults.md"


COUNTS = [("C", 15), ("F", 15), ("S", 21), ("E", 10), ("D", 16), ("N", 10), ("K", 14), ("L", 12),
          ("R", 15), ("X", 7), ("O", 31)]  # fmt: skip


@pytest.mark.parametrize(("group", "count"), COUNTS)
def test_no_row_is_left_out(maker, group, count):
    assert [name for name in maker.rows() if name[0] == group] == [f"{group}{n:02d}" for n in range(1, count + 1)]
