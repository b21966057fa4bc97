"""Tiers of the audit on tiny runs: what each trains, keeps and says."""

from __future__ import annotations

import json

import pytest
import tiny

from distunlearn import pipeline
from distunlearn.audit.shadows import assign_parts, audit_shadows
from distunlearn.config_io import load_config
from distunlearn.data.manifest import Manifest
from distunlearn.engine.ledger import effective_steps, read_ledger
from distunlearn.errors import DataError

SMALLEST = [
    *tiny.TINY, "pretrain.epochs=1", "unlearn.steps=3", "encoder.image_size=16", "encoder.embed_dim=16",
    "encoder.args={stem_width: 4, channels: [4, 8, 8, 16], layers: [1, 1, 1, 1]}", "audit.relearn_steps=1",
    "objective.hidden_dim=16", "objective.output_dim=8",
]  # fmt: skip


def config(*extra: str):
    return load_config("digits", None, [*SMALLEST, *extra], world=1)


def summary_of(out) -> dict:
    return json.loads((out / "audit/summary.json").read_text())


def test_tier_0_trains_nothing_and_concludes_nothing(tmp_path):
    out = tmp_path / "run"
    code = pipeline.run(config("audit.tier=0", "audit.part_crops=4"), out)
    found = summary_of(out)
    assert not (out / "retrained").exists() and not (out / "audit/scores-retrained.json").exists()
    # A fail needs no yardstick (lost utility), a pass does.
    assert code in (6, 7) and found["gates"]["view_agreement"]["verdict"] == "inconclusive"
    assert "audit.tier" in found["gates"]["view_agreement"]["reason"]
    assert found["attacks"]["view_agreement"]["retrained"]["auc"] is None
    assert found["attacks"]["view_agreement"]["original"]["auc"] is not None
    assert found["cost"]["retrain_images"] is None and found["tow"] is found["relearning"] is found["pooled"] is None
    assert "part_crop" in found["further_attacks"] and "rmia" not in found["further_attacks"]
    page = (out / "report.html").read_text()
    assert "not evaluated" in page and "PartCrop" in page and "RMIA</th>" not in page


def test_tier_2_pools_shadows_that_never_see_what_they_must_not(tmp_path, monkeypatch):
    out = tmp_path / "run"
    cfg = config("audit.tier=2", "audit.shadows=6", "audit.gates.also=rmia")
    pipeline.prepare(cfg, out)
    pipeline.pretrain(cfg, out)
    pipeline.unlearn(cfg, out)
    assert pipeline.audit(out, cfg) in (0, 6, 7)
    found = summary_of(out)
    assert found["pooled"]["shadows"] == 6 and found["pooled"]["images"] == 24
    assert "rmia" in found["attacks"] and "rmia" in found["gates"] and "rmia" not in found["further_attacks"]
    assert "verdict" not in found["further_attacks"]["lira_alignment"]["gap"]
    raw = json.loads((out / "audit/shadows.json").read_text())["ids"]
    ids = Manifest.load(out / "shards").ids("forget")
    parts = assign_parts(24, 6, cfg.seed)
    for k in range(6):
        folder = out / "shadows" / f"{k:02d}"
        steps = effective_steps(read_ledger(folder / "ledger.jsonl"), "unlearn")
        forgotten = {i for line in steps.values() for i in line["forget"]}
        assert forgotten == {i for i, part in zip(ids, parts[k], strict=True) if part == 2}
        assert [raw[i]["part"][k] for i in ids] == parts[k].tolist()
    # The same command again trains no encoder a second time, and measures the same.
    monkeypatch.setattr("distunlearn.engine.phases.train_phase", None)
    assert pipeline.audit(out) in (0, 6, 7)
    assert summary_of(out)["pooled"] == found["pooled"]


def test_too_few_images_for_a_pool_are_refused_before_a_shadow_is_trained(tmp_path):
    out = tmp_path / "run"
    cfg = config("audit.tier=2", "data.forget=3", "unlearn.forget_batch=2")
    pipeline.prepare(cfg, out)
    with pipeline._session(cfg, out) as session, pytest.raises(DataError, match="audit.tier=1"):
        audit_shadows(session)
    assert not (out / "shadows").exists()
