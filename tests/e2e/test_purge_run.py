"""`purge` after a run: a dry run first, then for good; the report stays, training and audits are over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tiny

from distunlearn.common.files import file_sha256
from distunlearn.data.manifest.manifest import Manifest


def files(folder) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir()}


def test_a_finished_run_needs_neither_its_checkpoint_nor_its_folder(finished_run, tmp_path, monkeypatch):
    """Case 08: the checkpoint was given by a relative path and is gone, and so is the list."""
    first = finished_run()[0]
    monkeypatch.chdir(tmp_path)
    shutil.copy(first / "export/model.safetensors", "enc.safetensors")
    shutil.copy(first / "export/config.json", "config.json")
    request = tiny.named_roles(Path())
    done = tiny.run(Path("run"), "encoder.checkpoint=enc.safetensors", request, "audit.tier=0")
    assert done.returncode in (0, 6, 7), done.stderr[-3000:]
    figures = tmp_path / "run/audit/summary.json"
    before = json.loads(figures.read_text())
    for name in ("enc.safetensors", "roles.csv"):
        (tmp_path / name).unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for verb in ("status", "report", "audit", "purge"):
        done = tiny.command(verb, "../run", *(["--apply"] if verb == "purge" else []))
        assert done.returncode in (0, 6, 7), (verb, done.stderr[-2000:])
    assert json.loads(figures.read_text())["attacks"] == before["attacks"]
    monkeypatch.chdir(tmp_path)
    done = tiny.run(Path("new"), "encoder.checkpoint=enc.safetensors", "data.holdout_source=digits")  # control
    assert done.returncode == 2 and "is not a file" in done.stderr


def test_purge_of_a_run(tmp_path):
    out = tmp_path / "run"
    early = tiny.command("purge", str(out))
    assert early.returncode == 3 and "not a run directory" in early.stderr
    assert tiny.command("prepare", "digits", "--out", str(out), *tiny.settings()).returncode == 0
    assert tiny.command("pretrain", "digits", "--out", str(out), *tiny.settings()).returncode == 0
    early = tiny.command("purge", str(out), "--apply")
    assert early.returncode == 3 and "finish the run (unlearn) before purging" in early.stderr
    assert tiny.run(out).returncode in (0, 6, 7)
    shards = out / "shards"
    before, ids = files(shards), Manifest.of_run(out).ids("forget")

    dry = tiny.command("purge", str(out))
    assert dry.returncode == 0, dry.stderr
    planned = json.loads(dry.stdout)
    assert planned["images"] == 24 and planned["applied"] is False and planned["after"] is None
    assert files(shards) == before and not (out / "purge.json").exists()

    done = tiny.command("purge", str(out), "--apply")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts == json.loads((out / "purge.json").read_text())
    assert (facts["images"], facts["before"], facts["applied"]) == (24, planned["before"], True)
    assert facts["after"] == Manifest.load(shards).index_sha256
    assert not set(ids) & set(Manifest.load(shards).by_id)
    assert not any(i in done.stdout for i in ids)

    again = tiny.command("purge", str(out), "--apply")
    assert again.returncode == 0 and json.loads(again.stdout)["images"] == 24
    assert facts == json.loads((out / "purge.json").read_text())
    assert tiny.command("report", str(out)).returncode == 0
    for verb in (["audit", str(out)], ["run", "digits", "--out", str(out), *tiny.settings()]):
        over = tiny.command(*verb)
        assert over.returncode == 3 and "Images of this request were purged" in over.stderr, over.stderr
        assert "(24 forget)" in over.stderr
        assert "Traceback" not in over.stderr
