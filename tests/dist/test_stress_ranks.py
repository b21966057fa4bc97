"""Stress tests on two sharded processes: the same requests, and the figures of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import execute_ranks
from test_launchers import SETTINGS

from distunlearn.verify.ledger import effective_steps, read_ledger

pytestmark = pytest.mark.slow

# Small rates and few images: ranks of scores change by float32 rounding alone, and one exchanged pair of 8 x 48 images
# is 0.0026 of an AUC.
CLOSE = 0.011
STRESS = [
    *SETTINGS, "pretrain.epochs=2", "unlearn.steps=8", "unlearn.lr=1e-4", "audit.views=4", "audit.bootstrap=100",
    "audit.relearn_steps=0", "audit.stress=[sequential]",
]  # fmt: skip
EVERY = "audit.stress=[worst_case,canaries,sequential]"


def stressed(world: int, out: Path, *extra: str) -> Path:
    chosen = [part for value in (*STRESS, *extra) for part in ("--set", value)]
    codes, said = execute_ranks(world, ["run", "digits", "--out", str(out), *chosen], timeout=300)
    assert len(set(codes)) == 1 and codes[0] in (0, 6, 7), said[-4000:]  # the verdict's
    assert (out / "report.html").exists(), said[-4000:]
    return out


def figures(out: Path) -> dict[str, Any]:
    return json.loads((out / "audit/summary.json").read_text())["stress"]


def aucs(found: Any) -> list[float]:
    """Every AUC of view agreement among the figures, in order."""
    if isinstance(found, list):
        return [value for item in found for value in aucs(item)]
    if not isinstance(found, dict):
        return []
    own = (
        [found["view_agreement"][e] for e in ("original", "unlearned", "retrained")]
        if "view_agreement" in found
        else []
    )
    return own + [value for item in found.values() for value in aucs(item)]


def requests(out: Path) -> dict[str, set[str]]:
    """Who was forgotten in each training of the tests."""
    found = {}
    for folder in sorted((out / "stress").iterdir()):
        steps = effective_steps(read_ledger(folder / "ledger.jsonl"), "unlearn")
        found[folder.name] = {i for line in steps.values() for i in line["forget"]}
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    return stressed(1, tmp_path_factory.mktemp("alone") / "run")


def compare(out: Path, alone: Path, count: int) -> None:
    assert requests(out) == requests(alone)
    found, expected = np.array(aucs(figures(out))), np.array(aucs(figures(alone)))
    print(f"largest difference of {len(found)} AUCs: {np.abs(found - expected).max():.4f}")
    assert len(found) == count and np.abs(found - expected).max() <= CLOSE


def test_two_sharded_processes_find_what_one_finds(alone, tmp_path):
    compare(stressed(2, tmp_path / "run", "backend=fsdp2"), alone, 3 * 5)


@pytest.mark.matrix
def test_every_stress_test_on_two_sharded_processes(tmp_path):
    compare(stressed(2, tmp_path / "two", "backend=fsdp2", EVERY), stressed(1, tmp_path / "one", EVERY), 3 * 11)


def test_control_another_start_differs_by_more(alone, tmp_path):
    """The comparison sees encoders that are not the same: ten times the rate of pretraining, the same shards."""
    out = stressed(1, tmp_path / "run", "pretrain.lr=1e-3", f"data.shards={alone / 'shards'}")
    found, expected = (np.array(aucs(figures(run)["sequential"])) for run in (out, alone))
    assert len(found) == len(expected) > 0 and np.abs(found - expected).max() > CLOSE
