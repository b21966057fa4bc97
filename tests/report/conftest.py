"""Finished runs for the tests of the page."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import rundir
from rundir import CASES

from distunlearn.verify.figures import ENCODERS


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One finished run for each verdict; tests that change one copy it."""
    root = tmp_path_factory.mktemp("finished")
    return {case: rundir.build_run(root / case, case) for case in CASES}


@pytest.fixture
def passing(finished: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the run that passes."""
    return shutil.copytree(finished["pass"], tmp_path / "run")


@pytest.fixture
def light(passing: Path) -> Path:
    """The same without raw scores: no curves, and a page in a tenth of the time."""
    for encoder in ENCODERS:
        (passing / "audit" / f"scores-{encoder}.json").unlink()
    return passing
