"""`audit.reference`: encoders that are brought in the place of a retrained one, as files and from another run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from distunlearn.config.shape import plain
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.engine.run_directory import saved_config
from distunlearn.errors import EvidenceError
from distunlearn.verify.certificate import limits
from distunlearn.verify.commitment import run_rules
from distunlearn.verify.ledger import read_ledger
from distunlearn.verify.run import check_run

ENDED = (0, 6, 7)


def summary(out: Path) -> dict:
    return json.loads((out / "audit/summary.json").read_text())


def forget_list(run: Path, role: str, folder: Path) -> str:
    """The setting of a list of 22 images that have this role in a run."""
    path = folder / f"{role}.txt"
    path.write_text("\n".join(list(Manifest.of_run(run).ids(role))[:22]) + "\n")
    return f"data.forget={path}"


def test_two_files_stand_in_the_place_of_a_retrained_encoder(finished_run, tmp_path):
    """One is that of the run whose original is reused, the other the same with noise in it."""
    base = finished_run()[0]
    kept = load_file(base / "retrained/training_state.safetensors")
    kept = {name.removeprefix("model."): tensor for name, tensor in kept.items()}
    generator = torch.Generator().manual_seed(1)
    noisy = {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point() and not name.endswith("running_var") else tensor
        for name, tensor in kept.items()
    }  # fmt: skip
    torch.save({"state_dict": kept}, tmp_path / "one.pt")
    save_file(noisy, tmp_path / "two.safetensors")
    brought, out = f"audit.reference={tmp_path}/one.pt,{tmp_path}/two.safetensors", tmp_path / "run"
    done = tiny.run(out, f"runtime.reuse={base}", brought)
    assert done.returncode in ENDED, done.stderr[-3000:]
    assert "\nretrain: 1" not in done.stderr and not any(line.get("phase") == "retrain" and line["event"] == "step"
                                                     for line in read_ledger(out / "ledger.jsonl"))  # fmt: skip
    found, before = summary(out), summary(base)
    for name, attack in found["attacks"].items():
        assert attack["retrained"]["auc"] == pytest.approx(before["attacks"][name]["retrained"]["auc"], abs=0.005)
        assert attack["retrained"]["auc"] != attack["retrained_2"]["auc"], "or it is one encoder twice"
        mean = (attack["retrained"]["auc"] + attack["retrained_2"]["auc"]) / 2
        assert attack["gap"]["auc"] == pytest.approx(attack["unlearned"]["auc"] - mean, abs=1e-12)
    assert found["evidence"] == {"kind": "brought_encoders", "encoders": 2}
    assert before["evidence"] == {"kind": "retrained_encoder"}

    rules = run_rules(plain(saved_config(out)), out)
    assert rules.references == 2 and not check_run(out, rules).gaps
    for other in (0, 1):  # control: declared otherwise
        with pytest.raises(EvidenceError, match="evidence"):
            check_run(out, dataclasses.replace(rules, references=other))
    assert 10 in limits(None, found["states"], rules.references) and 10 not in limits(None, found["states"], 0)
    page = (out / "report.html").read_text()
    assert "This run retrained no encoder" in page and "the word of who brought them" in page
    assert str(tmp_path) not in page
    (out / "audit/scores-retrained_2.json").unlink()  # of two declared encoders one is gone
    with pytest.raises(EvidenceError):
        check_run(out, rules)
    (tmp_path / "one.pt").unlink()
    assert tiny.command("audit", str(out)).returncode in ENDED, "what was taken is there"


def test_another_run_lends_its_retrained_encoder_where_its_roles_allow_it(finished_run, tmp_path):
    base = finished_run()[0]
    shared = (f"data.shards={base}/shards", f"audit.reference={base}")
    out = tmp_path / "run"
    done = tiny.run(out, *shared, forget_list(base, "forget", tmp_path))
    assert done.returncode in ENDED and "\nretrain: 1" not in done.stderr, done.stderr[-3000:]
    facts = json.loads((out / "retrained/done.json").read_text())
    assert facts["state"] == json.loads((base / "retrained/done.json").read_text())["state"]
    assert facts["reference"] == {"state": facts["state"], "images": 72, "of_images": 74}
    assert not check_run(out, run_rules(plain(saved_config(out)), out)).gaps
    page = (out / "report.html").read_text()
    assert "trained on 72 images, where this run keeps 74" in page and "word of who" not in page

    for number, (change, said) in enumerate((
        (forget_list(base, "retain", tmp_path), "was trained on 22 forget images of this run"),
        ("pretrain.epochs=3", "by other settings (pretrain.epochs)"),
        (f"audit.reference={out}", "was brought an encoder itself"),
    )):  # fmt: skip
        list_of, other = forget_list(base, "forget", tmp_path), tmp_path / f"other-{number}"
        refused = tiny.run(other, *shared, list_of, change)
        assert refused.returncode in (2, 3) and said in refused.stderr, refused.stderr[-2000:]
        assert "train: 1" not in refused.stderr and not other.exists(), "before anything is computed or written"


def test_a_file_without_heads_is_no_yardstick_for_an_encoder_with_heads(finished_run, tmp_path):
    base = finished_run()[0]
    kept = load_file(base / "retrained/training_state.safetensors")
    bare = {name.removeprefix("model.backbone."): t for name, t in kept.items() if name.startswith("model.backbone.")}
    save_file(bare, tmp_path / "bare.safetensors")
    out = tmp_path / "run"
    done = tiny.run(out, f"runtime.reuse={base}", f"audit.reference={tmp_path}/bare.safetensors")
    assert done.returncode == 2 and "the original encoder comes with heads" in done.stderr, done.stderr[-2000:]
    assert not out.exists()
    save_file({name: t[:2].clone() if t.dim() == 4 else t for name, t in bare.items()}, tmp_path / "other.safetensors")
    refused = tiny.run(tmp_path / "third", f"runtime.reuse={base}", f"audit.reference={tmp_path}/other.safetensors")
    assert refused.returncode in (2, 3) and not (tmp_path / "third").exists(), refused.stderr[-2000:]
