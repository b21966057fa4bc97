"""`purge` after a run: a dry run first, then for good; the report stays, training and audits are over."""

from __future__ import annotations

import json

import tiny

from distunlearn.common.files import file_sha256
from distunlearn.data.manifest.manifest import Manifest


def files(folder) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir()}


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
