"""Tiers of the audit on tiny runs: what each trains, keeps and says."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from distunlearn.audit.trainings.shadows import assign_parts, audit_shadows
from distunlearn.audit.trainings.stress import audit_stress
from distunlearn.config.load import load_config
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.engine.session import open_session
from distunlearn.errors import CoverageError, DataError
from distunlearn.plan.plan import make_plan
from distunlearn.run import pipeline
from distunlearn.verify.ledger import effective_steps, read_ledger

SMALLEST = [
    *tiny.TINY, "pretrain.epochs=1", "unlearn.steps=3", "encoder.image_size=16", "encoder.embed_dim=16",
    "encoder.args={stem_width: 4, channels: [4, 8, 8, 16], layers: [1, 1, 1, 1]}", "audit.relearn_steps=1",
    "objective.hidden_dim=16", "objective.output_dim=8",
]  # fmt: skip


def config(*extra: str):
    return load_config("digits", None, [*SMALLEST, *extra], world=1)


def summary_of(out) -> dict:
    return json.loads((out / "audit/summary.json").read_text())


def test_tier_0_trains_nothing_and_compares_with_held_out_images(tmp_path):
    out = tmp_path / "run"
    code = pipeline.run(config("audit.tier=0", "audit.part_crops=4"), out)
    found = summary_of(out)
    assert not (out / "retrained").exists() and not (out / "audit/scores-retrained.json").exists()
    assert code in (6, 7) and found["gates"]["view_agreement"]["verdict"] == "inconclusive"
    assert found["evidence"]["kind"] == "reference_groups" and found["evidence"]["seed"] == 0
    shown = found["attacks"]["view_agreement"]
    assert shown["gap"]["auc"] == pytest.approx(shown["unlearned"]["auc"] - 0.5) and shown["reference"]["widening"] >= 1
    assert found["attacks"]["view_agreement"]["retrained"]["auc"] is None
    assert found["attacks"]["view_agreement"]["original"]["auc"] is not None
    assert found["cost"]["retrain_images"] is None and found["tow"] is found["relearning"] is found["pooled"] is None
    assert "part_crop" in found["further_attacks"] and "rmia" not in found["further_attacks"]
    page = (out / "report.html").read_text()
    assert "No encoder was retrained" in page and "2026-11-30-tier0.md" in page and "AUC minus 0.5" in page
    assert ">Retrained</th>" not in page and "PartCrop" in page and "RMIA</th>" not in page


def test_tier_2_pools_shadows_that_never_see_what_they_must_not(tmp_path, monkeypatch):
    out = tmp_path / "run"
    cfg = config("audit.tier=2", "audit.shadows=6", "audit.gates.also=[rmia]")
    pipeline.prepare(cfg, out)
    pipeline.pretrain(cfg, out)
    pipeline.unlearn(cfg, out)
    assert pipeline.audit(out, cfg) in (0, 6, 7)
    found = summary_of(out)
    assert found["pooled"]["shadows"] == 6 and found["pooled"]["images"] == 24
    assert "rmia" in found["attacks"] and "rmia" in found["gates"] and "rmia" not in found["further_attacks"]
    assert "verdict" not in found["further_attacks"]["lira_alignment"]["gap"]
    raw = json.loads((out / "audit/shadows.json").read_text())["ids"]
    ids = Manifest.of_run(out).ids("forget")
    parts = assign_parts(24, 6, cfg.seed)
    for k in range(6):
        folder = out / "shadows" / f"{k:02d}"
        steps = effective_steps(read_ledger(folder / "ledger.jsonl"), "unlearn")
        forgotten = {i for line in steps.values() for i in line["forget"]}
        assert forgotten == {i for i, part in zip(ids, parts[k], strict=True) if part == 2}
        assert [raw[i]["part"][k] for i in ids] == parts[k].tolist()
    planned = make_plan(cfg)["audit"]
    assert planned.keys() == {"shadows"}
    shadows = sorted((out / "shadows").glob("??"))
    assert planned["shadows"]["unlearn_steps"] == steps_in(shadows, "unlearn")
    assert planned["shadows"]["pretrain_steps"] == pytest.approx(steps_in(shadows, "pretrain"), abs=len(shadows))
    # The same command again trains no encoder a second time, and measures the same.
    monkeypatch.setattr("distunlearn.engine.phases.train_phase", None)
    assert pipeline.audit(out) in (0, 6, 7)
    assert summary_of(out)["pooled"] == found["pooled"]


def test_too_few_images_for_a_pool_are_refused_before_a_shadow_is_trained(tmp_path):
    out = tmp_path / "run"
    cfg = config("audit.tier=2", "data.forget=3", "unlearn.forget_batch=2")
    pipeline.prepare(cfg, out)
    with open_session(cfg, out) as session, pytest.raises(DataError, match="audit.tier=1"):
        audit_shadows(session)
    assert not (out / "shadows").exists()


def test_a_shadow_that_misses_an_image_is_refused(tmp_path):
    out = tmp_path / "run"
    cfg = config("audit.tier=2", "audit.shadows=6", "unlearn.steps=1", "unlearn.forget_batch=2")
    pipeline.prepare(cfg, out)
    with open_session(cfg, out) as session, pytest.raises(CoverageError, match="never entered"):
        audit_shadows(session)
    assert not (out / "shadows/01").exists()


def steps_in(folders, phase: str) -> int:
    """Steps of `phase` that the ledgers of these folders tell of."""
    return sum(len(effective_steps(read_ledger(folder / "ledger.jsonl"), phase)) for folder in folders)


def requested(folder) -> set[str]:
    """Ids that entered the loss as images to forget."""
    steps = effective_steps(read_ledger(folder / "ledger.jsonl"), "unlearn")
    return {i for line in steps.values() for i in line["forget"]}


def test_stress_tests_forget_what_they_say_and_nothing_else(tmp_path, monkeypatch):
    out = tmp_path / "run"
    cfg = config("audit.stress=[worst_case,whole_class,canaries,sequential]", "unlearn.steps=8")
    assert pipeline.run(cfg, out) in (0, 6, 7)
    found = summary_of(out)
    for name, planned in make_plan(cfg)["audit"].items():
        folders = sorted((out / "stress").glob(f"{name}*"))
        assert planned["unlearn_steps"] == steps_in(folders, "unlearn") > 0, name
        assert planned["pretrain_steps"] == sum(steps_in(folders, phase) for phase in ("pretrain", "retrain")), name
    manifest = Manifest.of_run(out)
    ids, members = set(manifest.ids("forget")), manifest.ids(("retain", "forget"))

    worst = {name: requested(out / f"stress/worst_case-{name}") for name in ("most", "random", "least")}
    assert all(len(chosen) == 8 and chosen < ids for chosen in worst.values())
    assert not worst["most"] & worst["least"]
    scores = {e: json.loads((out / f"audit/scores-{e}.json").read_text())["samples"] for e in ("original", "retrained")}
    gained = {i: np.subtract(*(np.arctanh(scores[e][i]["view_agreement"]) for e in scores)) for i in ids}
    assert worst["most"] == set(sorted(ids, key=lambda i: gained[i])[-8:])  # the raw scores say the same
    known = {name: figures["memorisation"] for name, figures in found["stress"]["worst_case"].items()}
    assert known["most"] > known["random"] > known["least"]

    label = found["stress"]["whole_class"]["label"]
    labels = dict(zip(members, manifest.labels(members).tolist(), strict=True))
    assert requested(out / "stress/whole_class") == {i for i, found_label in labels.items() if found_label == label}
    strangers = manifest.labels(manifest.ids("holdout"))
    assert found["stress"]["whole_class"]["images"]["holdout"] == int((strangers == label).sum())

    copies = requested(out / "stress/canaries")
    assert ids < copies and len(copies) == 8 * (1 + 2 + 4)
    attacked = {count: figures["images"]["forget"] for count, figures in found["stress"]["canaries"].items()}
    assert attacked == {"1": 8, "2": 8, "4": 8}

    parts = [requested(out / f"stress/sequential-{number}") for number in (1, 2, 3)]
    assert set.union(*parts) == ids and sum(map(len, parts)) == len(ids)
    after = found["stress"]["sequential"]["view_agreement_after"]
    assert np.array(after).shape == (3, 3)
    last = [r["attacks"]["view_agreement"]["unlearned"] for r in found["stress"]["sequential"]["requests"]]
    assert after[-1] == pytest.approx(last)
    assert found["stress"]["sequential"]["at_once"]["attacks"]["view_agreement"]["unlearned"] == pytest.approx(
        found["attacks"]["view_agreement"]["unlearned"]["auc"]
    )
    # Each request starts where the last one ended, not from the original.
    digests = [json.loads((out / f"stress/sequential-{n}/done.json").read_text())["digest"] for n in (1, 2, 3)]
    assert len(set(digests)) == 3
    page = (out / "report.html").read_text()
    assert "Memorised most" in page and "Three requests in turn" in page and "The images that stay" in page

    monkeypatch.setattr("distunlearn.engine.phases.train_phase", None)  # a second time nothing is trained
    assert pipeline.audit(out) in (0, 6, 7)
    assert summary_of(out)["stress"] == found["stress"]


def test_a_later_request_starts_from_the_encoder_that_the_last_one_left(tmp_path):
    """With a learning rate of (nearly) 0 the last encoder is the original; with another start it could not be."""
    out = tmp_path / "run"
    cfg = config("audit.stress=[sequential]", "unlearn.steps=8", "unlearn.lr=1e-12", "unlearn.weight_decay=0")
    assert pipeline.run(cfg, out) in (0, 6, 7)
    folders = (out / "original", out / "stress/sequential-3")
    first, last = (load_file(folder / "training_state.safetensors") for folder in folders)
    for name, value in first.items():
        if "running" not in name and "num_batches" not in name and value.is_floating_point():
            assert torch.allclose(value, last[name], atol=1e-6), name
    rerun = tmp_path / "other"
    cfg = config("audit.stress=[sequential]", "unlearn.steps=8", "unlearn.lr=5e-4")
    assert pipeline.run(cfg, rerun) in (0, 6, 7)
    states = [load_file(rerun / f"stress/sequential-{n}/training_state.safetensors") for n in (1, 2, 3)]
    start = load_file(rerun / "original/training_state.safetensors")
    name = next(n for n in start if n.endswith("weight") and start[n].ndim > 1)
    moved = [float((state[name] - start[name]).norm()) for state in states]
    assert moved[0] < moved[1] < moved[2]  # it goes on


def test_too_few_classes_have_no_whole_class_test(tmp_path):
    out = tmp_path / "run"
    cfg = config("audit.stress=[whole_class]")
    pipeline.prepare(cfg, out)
    pipeline.pretrain(cfg, out)
    pipeline.unlearn(cfg, out)
    with open_session(cfg, out) as session:
        bare = [dataclasses.replace(s, label=None) for s in session.manifest.samples]
        files = session.manifest.shard_files
        unlabelled = dataclasses.replace(session, manifest=Manifest(session.manifest.folder, bare, files))
        assert "labels of 0 classes" in audit_stress(unlabelled)["whole_class"]["reason"]
    assert not (out / "stress").exists()
