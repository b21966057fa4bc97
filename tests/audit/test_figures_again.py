"""Level 2 is exact: for every recipe, figures from the files of raw scores and settings are those of summary.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic import make_signals

from distunlearn.audit.summary import summarise, write_audit
from distunlearn.config.load import load_config, save_config
from distunlearn.config.recipes import RECIPES
from distunlearn.config.yaml import read_yaml
from distunlearn.verify.figures import Rules, judge, plain
from distunlearn.verify.run import difference
from distunlearn.verify.scores import raw_scores, read_scores

PARTS = ("attacks", "further_attacks", "utility", "persons", "evidence", "gates")


def written(folder: Path, recipe: str, *settings: str, labels: bool = True, persons: bool = False) -> dict:
    """The files of an audit of made-up signals; what summary.json holds."""
    root = [f"data.root={folder}"] if recipe.startswith("photos") else []
    cfg = load_config(recipe, None, ["audit.bootstrap=100", *root, *settings], world=1)
    names = ("original", "unlearned") if cfg.audit.tier == 0 else ("original", "unlearned", "retrained")
    signals = {name: make_signals(0.8 * (name == "original"), seed=number) for number, name in enumerate(names)}
    if not labels:
        signals = {name: replace(s, labels=np.full(len(s.ids), -1)) for name, s in signals.items()}
    count = len(signals["original"].ids)
    who = np.arange(count, dtype=np.int32) // 2 if persons else None
    summary, scores = summarise(signals, cfg, cost={}, coverage={}, persons=who)
    write_audit(folder / "audit", summary, scores)
    save_config(cfg, folder / "run.yaml")
    return json.loads((folder / "audit" / "summary.json").read_text())


def again(folder: Path) -> dict:
    """The same parts from the files alone."""
    return plain(judge(raw_scores(read_scores(folder / "audit")), Rules.of(read_yaml(folder / "run.yaml"))))


CASES = {
    "as it is": {}, "another attack judged": {"also": True}, "no labels": {"labels": False},
    "persons": {"persons": True}, "tier 0": {"tier": 0},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_figures_are_computed_again_without_a_difference(tmp_path, recipe, case):
    more = dict(CASES[case])
    settings = [f"audit.tier={more.pop('tier', 1)}"]
    settings += ["audit.gates.also=[embedding_norm]"] if more.pop("also", False) else []
    summary = written(tmp_path, recipe, *settings, **more)
    found = again(tmp_path)
    assert found.keys() == set(PARTS) and len(found["gates"]) > 2
    for part in PARTS:
        assert difference(found[part], summary[part], part) is None
    assert ("embedding_norm" in found["attacks"]) == (case == "another attack judged")
    assert (found["persons"] is not None) == (case == "persons")


def test_control_another_score_or_rule_is_a_difference(tmp_path):
    recipe = sorted(RECIPES)[0]
    summary = written(tmp_path, recipe)
    path = tmp_path / "audit/scores-unlearned.json"
    scores = json.loads(path.read_text())
    row = next(row for row in scores["samples"].values() if row["role"] == "forget")
    row["view_agreement"] += 1.0
    path.write_text(json.dumps(scores))
    assert difference(again(tmp_path)["attacks"], summary["attacks"], "attacks") is not None
    written(tmp_path, recipe)
    text = (tmp_path / "run.yaml").read_text()
    (tmp_path / "run.yaml").write_text(text.replace("confidence: 0.9", "confidence: 0.8"))
    assert difference(again(tmp_path)["gates"], summary["gates"], "gates") is not None
