"""Both forms of the manifest say the same, refuse what contradicts itself, and are searched without Python objects."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distunlearn.config.schema import DataConfig
from distunlearn.data.loading.verify import read_sample, verify_shards
from distunlearn.data.manifest import manifest as module
from distunlearn.data.manifest.columns import Columns
from distunlearn.data.manifest.manifest import Manifest, Sample, Shard
from distunlearn.data.prepare.write_shards import prepare_shards
from distunlearn.data.purge import purge_shards, purged_before
from distunlearn.errors import DataError

SMALL = DataConfig(
    members=40, forget=10, holdout=12, calibration=6, third_party=6, third_party_audit=6, samples_per_shard=16
)


def samples(n: int = 50, shards: int = 4) -> tuple[list[Sample], dict[str, Shard]]:
    rng = np.random.default_rng(n)
    names = [f"{k:05d}.tar" for k in range(shards)]
    found = [
        Sample(
            f"caf\u00e9/{k}{'x' * (k % 7)}.jpg", names[k * shards // n], 512 + 1000 * k, int(rng.integers(1, 400)),
            rng.bytes(32).hex(), module.CODES[k % 7], None if k % 3 else k,
        )
        for k in range(n)
    ]  # fmt: skip
    counts = [sum(s.shard == name for s in found) for name in names]
    return found, {name: Shard(10**6, "ab" * 32, count) for name, count in zip(names, counts, strict=True)}


@pytest.fixture
def as_columns(monkeypatch):
    """The form of large manifests, for small ones."""
    monkeypatch.setattr(module, "SMALL", 0)


def both(folder: Path, monkeypatch) -> tuple[Manifest, Manifest]:
    """The same samples saved and loaded in both forms."""
    found, files = samples()
    for name, limit in (("text", 10**6), ("columns", 0)):
        monkeypatch.setattr(module, "SMALL", limit)
        (folder / name).mkdir()
        Manifest(folder / name, found, files, {"a": 1}).save(folder / name)
    columns = Manifest.load(folder / "columns")
    assert not columns.is_small and (folder / "columns" / "manifest" / "id_bytes.npy").exists()
    return Manifest.load(folder / "text"), columns


def test_both_forms_say_the_same(tmp_path, monkeypatch):
    found, files = samples()
    text, columns = both(tmp_path, monkeypatch)
    monkeypatch.undo()
    assert text.is_small and text.samples == found
    monkeypatch.setattr(module, "SMALL", 0)  # from here on both answer as a large one does
    for manifest in (text, columns):
        manifest.__dict__.pop("samples", None)
        manifest.__dict__.pop("by_id", None)
        manifest._selections.clear()
        assert list(manifest.samples) == found and len(manifest) == 50 and manifest.shard_files == files
        assert manifest.samples[7] == found[7] and manifest.samples[-1] == found[-1]
        assert manifest.samples[3:9] == found[3:9]
        assert [manifest.by_id[s.id] for s in found] == found and set(manifest.by_id) == {s.id for s in found}
        assert "nobody" not in manifest.by_id and found[0].id in manifest.by_id and 5 not in manifest.by_id
        with pytest.raises(KeyError, match="nobody"):
            manifest.by_id["nobody"]
        for name in files:
            assert manifest.in_shard(name) == [s for s in found if s.shard == name]
        for roles in ("forget", ("retain", "forget"), "holdout"):
            wanted = [s for s in found if s.role in roles]
            chosen = manifest.select(roles)
            assert chosen.ids == [s.id for s in wanted] == manifest.ids(roles)
            assert [chosen.shards[k] for k in chosen.shard_of] == [s.shard for s in wanted]
            assert chosen.ids[2] == wanted[2].id and chosen.ids[1:3] == [s.id for s in wanted[1:3]]
        labels = [-1 if s.label is None else s.label for s in found]
        assert manifest.labels([s.id for s in found]).tolist() == labels
        assert manifest.count_roles() == {role: sum(s.role == role for s in found) for role in module.CODES}
    assert text.fingerprint != columns.fingerprint  # each is the digest of its own files


def test_a_saved_manifest_has_the_fingerprint_it_had_before(tmp_path, as_columns):
    found, files = samples()
    made = Manifest(tmp_path, found, files)
    before = made.fingerprint
    made.save(tmp_path)
    assert Manifest.load(tmp_path).fingerprint == before
    assert Manifest(tmp_path, [replace(found[0], label=9), *found[1:]], files).fingerprint != before
    column = np.load(tmp_path / "manifest" / "offset.npy", mmap_mode="r")  # by NumPy alone
    assert column.tolist() == [s.offset for s in found]


COLUMN_DAMAGE = {
    "a byte": (lambda f: flip(f / "offset.npy"), "offset.npy does not have the sha256"),
    "cut": (lambda f: os.truncate(f / "sha256.npy", 300), "sha256.npy does not have the sha256"),
    "gone": (lambda f: (f / "role.npy").unlink(), "role.npy cannot be read"),
    "all gone": (lambda f: shutil.rmtree(f), "cannot be read"),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", COLUMN_DAMAGE)
def test_damaged_columns_are_refused(tmp_path, as_columns, damage):
    found, files = samples()
    Manifest(tmp_path, found, files).save(tmp_path)
    assert len(Manifest.load(tmp_path)) == 50
    change, words = COLUMN_DAMAGE[damage]
    change(tmp_path / "manifest")
    with pytest.raises(DataError, match=words):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("offset", lambda c: c + np.uint64(10**6)),
        ("shard", lambda c: c[::-1].copy()),
        ("shard", lambda c: np.zeros_like(c)),
        ("role", lambda c: c + np.uint8(7)),
        ("id_ends", lambda c: c[::-1].copy()),
        ("id_bytes", lambda c: np.full_like(c, 10)),
        ("hash", lambda c: c[::-1].copy()),
        ("hash_row", lambda c: c + np.uint32(50)),
        ("label", lambda c: c[:-1]),
        ("label", lambda c: c.astype(np.float32)),
    ],
)
def test_columns_that_contradict_one_another_are_refused(tmp_path, as_columns, name, change):
    """With digests that agree, as a program with an error would write them."""
    found, files = samples()
    Manifest(tmp_path, found, files).save(tmp_path)
    path = tmp_path / "manifest" / f"{name}.npy"
    np.save(path, change(np.load(path)))
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["columns"][name] = digest(path)
    summary["manifest_sha256"] = module._of_digests(summary["columns"])
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(DataError, match="contradict|has the shape|lists|holds float32"):
        Manifest.load(tmp_path)


def digest(path: Path) -> str:
    from distunlearn.common.files import file_sha256

    return file_sha256(path)


@pytest.mark.parametrize("limit", [0, 10**6])
def test_an_id_that_is_there_twice_is_refused(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(module, "SMALL", limit)
    found, files = samples()
    Manifest(tmp_path, [*found[:-1], replace(found[-1], id=found[3].id)], files).save(tmp_path)
    with pytest.raises(DataError, match="twice"):
        Manifest.load(tmp_path)


def test_a_text_manifest_out_of_order_is_refused(tmp_path):
    found, files = samples()
    made = Manifest(tmp_path, found, files)
    made.save(tmp_path)
    lines = (tmp_path / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "manifest.jsonl").write_bytes(b"".join(lines[::-1]))
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["manifest_sha256"] = digest(tmp_path / "manifest.jsonl")
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(DataError, match="line 13 is not in the order of the shards"):
        Manifest.load(tmp_path)


def test_a_version_of_the_future_is_refused(tmp_path):
    found, files = samples()
    Manifest(tmp_path, found, files).save(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "version": 3}))
    with pytest.raises(DataError, match="version 3; expected 1 or 2"):
        Manifest.load(tmp_path)


def test_what_does_not_fit_into_the_columns_is_refused(tmp_path):
    found, files = samples()
    for change in ({"length": 2**32}, {"label": 2**31}):
        with pytest.raises(DataError, match="4 GiB or more, or a label"):
            Manifest(tmp_path, [replace(found[0], **change)], files)


def test_shards_are_prepared_verified_and_purged_with_columns(tmp_path, as_columns):
    folder = tmp_path / "shards"
    made = prepare_shards(SMALL, 0, folder)
    found = Manifest.load(folder)
    verify_shards(found, deep=True)
    assert made.fingerprint == found.fingerprint and not (folder / "manifest.jsonl").exists()
    kept = {s.id: read_sample(found, s.id) for s in found.samples if s.role != "forget"}
    purge_shards(folder, found.ids("forget"))
    after = Manifest.load(folder)
    assert {s.id: read_sample(after, s.id) for s in after.samples} == kept
    assert purged_before(folder).images == 10
    assert prepare_shards(SMALL, 0, tmp_path / "again").fingerprint == made.fingerprint


def test_columns_take_73_bytes_and_the_id(as_columns):
    found, files = samples(1000)
    columns = Manifest(Path("x"), found, files).columns
    ids = sum(len(s.id.encode()) for s in found)
    assert columns.nbytes() == 73 * 1000 + 8 + ids
    assert Columns.join([columns, columns]).nbytes() == 2 * (73 * 1000 + ids) + 8


def test_look_ups_in_mapped_columns_take_no_memory_that_stays(tmp_path):
    """200,000 look-ups in a manifest of 1,200,000: less is held, lists included, than the 126 MB that are mapped."""
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "manifest.py"
    done = subprocess.run(
        [sys.executable, str(script), "--ids", "200000", "--samples", "1200000", "--folder", str(tmp_path)],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(done.stdout)["cases"]
    assert case["found"] == 200_000 and case["form"] == "columns" and case["missing"] == 1
    assert case["mib_above_imports"] < 100, case
