"""The document on the dose says what its cells say, and AUCs of cells are scikit-learn's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(ROOT))
from forgetting_dose_report import USED, curves, ranking, read, rules  # noqa: E402

CELLS = ROOT / "results/forgetting-dose"


@pytest.fixture(scope="module")
def cells():
    return read(CELLS)


def test_the_document_has_the_tables_of_the_cells(cells):
    document = (ROOT / "results/2026-11-30-dose.md").read_text(encoding="utf-8")
    for table in (ranking(cells), rules(cells), curves(cells)):
        assert table in document
    assert rules(cells[:-1]) not in document  # control


def test_a_choice_is_the_smallest_criterion_among_the_doses_that_are_allowed(cells):
    for cell in cells:
        assert cell.chosen("retained", points=-1) == 0  # nothing but dose 0 costs less than nothing
        at = cell.chosen("retained", points=2)
        allowed = (cell.lost[:, 1] <= 2) & (cell.doses <= 1.6)
        assert allowed[at] and cell.criterion("retained")[at] == cell.criterion("retained")[allowed].min()


def test_levels_are_near_those_of_the_signals_that_were_kept():
    """Kept are 140 images of a role at most, in float16, so that AUCs of all images are met within sampling."""
    for path in sorted(CELLS.glob("*.npz")):
        with np.load(path, allow_pickle=False) as found:
            stated = np.array(json.loads(str(found["figures"]))["watch"])
            forget, watch = found["forget"].astype(float), found["watch"].astype(float)
        truth = np.r_[np.ones(forget.shape[1]), np.zeros(watch.shape[1])]
        for a in (0, 9, len(stated) - 1):
            for s in range(USED):
                assert roc_auc_score(truth, np.r_[forget[a, :, s], watch[a, :, s]]) == pytest.approx(
                    stated[a, s], abs=0.1
                )
