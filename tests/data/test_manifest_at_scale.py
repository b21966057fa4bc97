"""What a manifest of many samples takes, and the digest of its samples a window at a time."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_manifest import samples, size  # noqa: F401  (a fixture)

from distunlearn.data.manifest import columns as columns_module
from distunlearn.data.manifest.columns import NO_LABEL
from distunlearn.data.manifest.ids import hash_ids
from distunlearn.data.manifest.manifest import Manifest, Shard


def test_look_ups_in_mapped_columns_take_no_memory_that_stays(tmp_path):
    """200,000 look-ups in a manifest of 1,200,000: less is held, lists included, than the 126 MB that are mapped."""
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "manifest.py"
    done = subprocess.run(
        [sys.executable, str(script), "--ids", "200000", "--samples", "1200000", "--folder", str(tmp_path)],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(done.stdout)["cases"]
    assert case["found"] == 200_000 and case["missing"] == 1
    assert case["mib_above_imports"] < 100, case


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("window", [7, 1 << 16])
def test_the_digest_of_samples_is_of_what_they_are_and_not_of_where_they_lie(tmp_path, window, monkeypatch):
    monkeypatch.setattr(columns_module, "WINDOW", window)
    found, files = samples()
    roles = ("retain", "forget")
    digest = Manifest(tmp_path, found, files).samples_digest(roles)
    chosen = sorted((s for s in found if s.role in roles), key=lambda s: int(hash_ids([s.id])[0]))
    expected = hashlib.sha256()
    for start in range(0, len(chosen), window):
        part = chosen[start : start + window]
        expected.update(b"".join(len(s.id.encode()).to_bytes(8, "little") for s in part))
        expected.update(b"".join(s.id.encode() for s in part))
        expected.update(b"".join(bytes.fromhex(s.sha256) for s in part))
        expected.update(b"".join((NO_LABEL if s.label is None else s.label).to_bytes(4, "little", signed=True)
                                 for s in part))  # fmt: skip
    assert digest == expected.hexdigest()
    elsewhere = [replace(s, shard="one.tar", offset=512 + 1000 * k) for k, s in enumerate(reversed(found))]
    other = Manifest(tmp_path, elsewhere, {"one.tar": Shard(10**6, "cd" * 32, len(found))})
    assert other.samples_digest(roles) == digest
    at = next(k for k, s in enumerate(found) if s.role == "retain")
    changes = ({"id": "another.jpg"}, {"sha256": "0" * 64}, {"label": 99}, {"role": "holdout"})
    for change in changes:
        changed = [*found[:at], replace(found[at], **change), *found[at + 1 :]]
        assert Manifest(tmp_path, changed, files).samples_digest(roles) != digest
    unseen = next(k for k, s in enumerate(found) if s.role == "holdout")
    changed = [*found[:unseen], replace(found[unseen], label=99), *found[unseen + 1 :]]
    assert Manifest(tmp_path, changed, files).samples_digest(roles) == digest
