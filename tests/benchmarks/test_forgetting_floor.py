"""The least gap of a perfect match: sklearn's AUCs on made-up scores, and the formula against simulation."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from forgetting_floor import by_chance, floor, main  # noqa: E402

SIZES = {"forget": 40, "third_party_audit": 60, "holdout": 80, "retain": 10}


def scores(moved: float = 0.0) -> dict[str, dict]:
    """Scores of made-up images; the third party's are moved."""
    draw = np.random.default_rng(0)
    found = {}
    for role, count in SIZES.items():
        for number in range(count):
            shift = moved if role == "third_party_audit" else 0.0
            row = {"role": role, "bank_loss": draw.normal() + shift, "gradient_norm_head": draw.normal() - shift}
            folds = [number % 2] if role == "holdout" else [0, 1]
            found[f"{role}-{number}"] = row | {f"embedding_norm_fold{fold}": draw.normal() + shift for fold in folds}
    return found


def area(rows: list[dict], role: str, column: str, sign: int = 1) -> float:
    used = [row for row in rows if row["role"] in (role, "holdout") and column in row]
    return roc_auc_score([row["role"] == role for row in used], [sign * row[column] for row in used])


def test_differences_are_those_of_sklearns_areas():
    rows = list(scores().values())
    found = floor(rows, ["bank_loss", "gradient_norm_head", "embedding_norm"])
    roles = ("forget", "third_party_audit")
    assert found["bank_loss"] == pytest.approx(np.subtract(*(area(rows, role, "bank_loss") for role in roles)))
    own = np.subtract(*(area(rows, role, "gradient_norm_head", -1) for role in roles))
    assert found["gradient_norm_head"] == pytest.approx(own)
    folds = [[area(rows, role, f"embedding_norm_fold{fold}") for fold in (0, 1)] for role in roles]
    assert found["embedding_norm"] == pytest.approx(np.mean(folds[0]) - np.mean(folds[1]))
    moved = floor(list(scores(1.0).values()), ["bank_loss", "gradient_norm_head", "embedding_norm"])
    assert all(value < -0.15 for value in moved.values())  # strangers of another kind: known better than the forgotten


def test_what_chance_makes_is_that_of_a_simulation():
    draw, n, m = np.random.default_rng(1), 60, 150
    holdout = np.sort(draw.normal(size=20_000))

    def mean_rank(count: int) -> float:
        return np.searchsorted(holdout, draw.normal(size=count)).mean() / len(holdout)  # the AUC

    simulated = np.mean([abs(mean_rank(n) - mean_rank(m)) for _ in range(4000)])
    assert simulated == pytest.approx(by_chance(n, m), rel=0.05)
    assert simulated != pytest.approx(by_chance(n, 4 * m), rel=0.05)


def test_the_command_prints_every_run_and_names_what_is_missing(tmp_path, monkeypatch, capsys):
    for name in ("one", "two"):
        (tmp_path / name / "audit").mkdir(parents=True)
        path = tmp_path / name / "audit" / "scores-retrained.json"
        path.write_text(json.dumps({"encoder": "retrained", "samples": scores()}), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["floor", *map(str, tmp_path.iterdir()), "--attacks", "bank_loss"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all("40, 60" in line and f"{100 * by_chance(40, 60):.2f}" in line for line in lines[2:4])
    expected = 100 * abs(floor(list(scores().values()), ["bank_loss"])["bank_loss"])
    assert lines[-1].split("|")[3].strip() == f"{expected:.2f}"
    monkeypatch.setattr(sys, "argv", ["floor", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "expected a finished run" in capsys.readouterr().err
