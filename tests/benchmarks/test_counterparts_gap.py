"""What counterparts would leave of a request: weighted areas against copies, both kinds of request, a finished run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(SCRIPTS))
import counterparts  # noqa: E402
from counterparts import area, requests  # noqa: E402

from distunlearn.methods.third_party_weights import Look  # noqa: E402


def test_weights_are_numbers_of_copies():
    draw = np.random.default_rng(0)
    member, other, copies = draw.normal(size=20), draw.normal(size=30), draw.integers(0, 4, 20)
    repeated = np.repeat(member, copies)
    truth = np.r_[np.ones(len(repeated)), np.zeros(30)]
    assert area(member, other, copies) == pytest.approx(roc_auc_score(truth, np.r_[repeated, other]))
    assert area(member, other) != pytest.approx(area(member, other, copies), abs=1e-3)


def test_requests_of_both_kinds():
    draw = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(50, 3, generator=draw), dim=1)
    found = list(requests(Look(direction, torch.zeros(50)), 10, 4, seed=0))
    assert [kind for kind, _ in found] == ["alike", "by chance"] * 4
    assert all(len(set(rows.tolist())) == 10 for _, rows in found)
    near = {kind: np.mean([float((direction[rows] @ direction[rows].mT).mean()) for k, rows in found if k == kind])
            for kind in ("alike", "by chance")}  # fmt: skip
    assert near["alike"] > near["by chance"] + 0.3
    assert [kind for kind, _ in requests(Look(direction, torch.zeros(50)), 50, 4, seed=0)] == ["all"]


def test_a_finished_run_is_measured_and_an_unfinished_one_refused(tmp_path):
    from test_forgetting import ENVIRONMENT

    settings = [*counterparts_settings(), "method.name=none"]
    chosen = [part for value in settings for part in ("--set", value)]
    command = [sys.executable, "-m", "distunlearn", "run", "digits", "--out", str(tmp_path / "run"), *chosen]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode in (6, 7), done.stderr[-2000:]
    (found,) = [f for f in counterparts.measure(tmp_path / "run", 100, 1, [10]) if f[1] == "uniform"]
    rows = json.loads((tmp_path / "run/audit/scores-retrained.json").read_text())["samples"].values()
    gaps = []
    for name in counterparts.FOUR:
        areas = []
        for role in ("forget", "third_party_audit"):
            used = [row for row in rows if row["role"] in (role, "holdout")]
            sign = counterparts.ATTACKS[name]
            areas.append(roc_auc_score([row["role"] == role for row in used], [sign * row[name] for row in used]))
        gaps.append(abs(areas[0] - areas[1]))
    assert found[0] == "all" and found[2] == pytest.approx(100 * np.mean(gaps)) and found[3] == pytest.approx(24)
    script = [sys.executable, str(SCRIPTS / "counterparts.py")]
    printed = subprocess.run([*script, str(tmp_path / "run"), "--images", "8", "--requests", "2"],
                             capture_output=True, text=True, timeout=120, env=ENVIRONMENT)  # fmt: skip
    assert "| alike (2) | matched, 50 neighbours |" in printed.stdout, printed.stderr[-2000:]
    refused = subprocess.run([*script, str(tmp_path)], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert refused.returncode == 2 and "expected a finished run" in refused.stderr


def counterparts_settings() -> list[str]:
    """Seconds a run."""
    from forgetting_grid import SMOKE

    return [*SMOKE, "audit.tier=1", "runtime.threads=1"]
