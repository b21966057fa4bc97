"""Existing WebDataset shards: listed as they are, read by offset, and taken as a source for shards of our own."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from distunlearn.cli.main import main
from distunlearn.config.schema import DataConfig
from distunlearn.data.loading.verify import read_sample, verify_shards
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.prepare import index_shards as module
from distunlearn.data.prepare.write_shards import prepare_shards
from distunlearn.data.purge import purge_shards
from distunlearn.errors import ConfigError, DataError

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from hostile_tars import img2dataset, jpeg, sample, write_tar  # noqa: E402
from pictures import by_webdataset, indexed  # noqa: E402

ALL = DataConfig(
    source="webdataset", members=None, forget=6, holdout=6, calibration=4, third_party=4, third_party_audit=4
)
SETTINGS = ["data.members=40", "data.forget=6", "data.holdout=6", "data.calibration=4", "data.third_party=4",
            "data.third_party_audit=4", "unlearn.retain_batch=16", "unlearn.forget_batch=4", "unlearn.steps=4",
            "unlearn.third_party_batch=4", "pretrain.batch=16"]  # fmt: skip


@pytest.fixture
def shards(tmp_path) -> Path:
    img2dataset(tmp_path / "shards")
    return tmp_path / "shards"


def sets(*values: str) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def test_an_index_lists_what_is_there_and_leaves_it_alone(shards):
    import webdataset

    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    manifest = indexed(ALL, 0, shards)
    found = Manifest.load(shards)
    verify_shards(found, deep=True)
    assert {name: (shards / name).read_bytes() for name in before} == before
    assert {p.name for p in shards.iterdir()} - before.keys() == {"index.arrow", "summary.json"}
    assert found.index_sha256 == manifest.index_sha256 and found.info["indexed"]
    assert found.count_roles()["unused"] == 60  # roles are a request's
    assert {(s.width, s.height) for s in found.samples} == {(24, 20)}
    oracle = {}
    for name in sorted(before):
        if name.endswith(".tar"):
            with (shards / name).open("rb") as handle:
                raw = webdataset.tariterators.tar_file_expander([{"url": name, "stream": handle}])
                grouped = webdataset.tariterators.group_by_keys(raw)
                oracle |= {record["__key__"]: (name, record["jpg"]) for record in grouped}
            assert found.shard_files[name].sha256 == hashlib.sha256(before[name]).hexdigest()
            assert found.shard_files[name].bytes == len(before[name]) and found.shard_files[name].samples == 30
        if name.endswith(".tar"):  # a reader that checks every sample agrees
            wanted = {s.id for s in found.in_shard(name)}
            assert by_webdataset(found, name) == {i: oracle[i][1] for i in wanted}
    assert len(oracle) == 60 and {s.id: (s.shard, read_sample(found, s.id)) for s in found.samples} == oracle
    assert manifest.count_roles() == {
        "retain": 36, "forget": 6, "third_party": 4, "third_party_audit": 4, "calibration": 4, "holdout": 6,
        "watch": 0,
    }  # fmt: skip


def test_an_index_serves_several_requests_and_no_shard_is_read_again(shards, tmp_path, monkeypatch):
    """Case 11: another list on the same shards; both requests stand beside each other."""
    indexed(ALL, 0, shards).save_request(tmp_path / "first")
    content = (shards / "summary.json").read_bytes()
    monkeypatch.setattr(module, "read_tar", lambda *args: pytest.fail("a shard was read again"))
    indexed(replace(ALL, forget=9, prepare_workers=2), 1, shards).save_request(tmp_path / "second")
    assert (shards / "summary.json").read_bytes() == content and not (shards / ".index.partial").exists()
    first, second = (Manifest.load(shards, run=tmp_path / name) for name in ("first", "second"))
    assert (len(first.ids("forget")), len(second.ids("forget"))) == (6, 9)
    assert first.index_sha256 == second.index_sha256 and first.fingerprint != second.fingerprint


def test_the_index_of_other_shards_is_refused(shards):
    indexed(ALL, 0, shards)
    with pytest.raises(DataError, match="other settings .*remove index.arrow"):
        indexed(replace(ALL, near_distance=None), 0, shards)
    write_tar(shards / "00002.tar", sample(99))
    with pytest.raises(DataError, match="index of other shards"):
        indexed(ALL, 0, shards)


def test_an_interrupted_index_does_not_read_twice(shards, monkeypatch):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        indexed(ALL, 0, shards, stop)
    assert not (shards / "summary.json").exists() and (shards / ".index.partial" / "00000.tar.note").exists()
    read: list[str] = []
    real = module.read_tar
    monkeypatch.setattr(module, "read_tar", lambda path, *more: (read.append(path.name), real(path, *more))[1])
    shutil.copytree(shards, shards.parent / "changed")
    made = indexed(ALL, 0, shards)
    assert read == ["00001.tar"] and not (shards / ".index.partial").exists()
    verify_shards(made, deep=True)
    read.clear()
    changed = shards.parent / "changed"
    write_tar(changed / "00000.tar", [part for k in range(40) for part in sample(k)])
    verify_shards(indexed(ALL, 0, changed), deep=True)  # what was noted of another file is not taken
    assert read == ["00000.tar", "00001.tar"]


def test_ids_and_labels_come_from_the_samples_own_files(shards):
    parts = []
    for k in range(4):
        key = f"dir/{90 + k}"
        parts += [(f"{key}.JPG", jpeg(90 + k)), (f"{key}.cls", f" {k}\n".encode())]
        facts = json.dumps({"id": f"patient/{k}" if k else 7}).encode()
        parts += [(f"{key}.json", facts), (f"{key}.seg.png", b"no image")]
    write_tar(shards / "00002.tar", parts)
    manifest = indexed(ALL, 0, shards)
    found = manifest.in_shard("00002.tar")
    assert [s.id for s in found] == ["dir/90", "patient/1", "patient/2", "patient/3"]
    assert [s.label for s in found] == [0, 1, 2, 3] and manifest.samples[0].label is None
    assert [read_sample(manifest, s.id) for s in found] == [jpeg(90 + k) for k in range(4)]


def test_images_that_cannot_be_decoded_are_counted(shards):
    write_tar(shards / "00002.tar", [("7.jpg", jpeg(7)[:-200]), ("8.jpg", b"<html>"), ("9.jpg", jpeg(900))])
    manifest = indexed(ALL, 0, shards)
    assert manifest.info["undecodable"] == 2 and manifest.info["undecodable_ids"] == ["7", "8"]
    (shards / "summary.json").unlink(), (shards / "index.arrow").unlink()
    assert indexed(replace(ALL, near_distance=None), 0, shards).info["undecodable_ids"] == ["8"]  # headers only


def test_copies_in_indexed_shards(shards, tmp_path):
    parts = [("a.jpg", jpeg(3)), ("b.jpg", jpeg(901))]
    write_tar(shards / "00002.tar", parts)
    path = tmp_path / "list.csv"
    path.write_text("id,role\n000000003,forget\n000000004,forget\na,retain\n")
    cfg = replace(ALL, forget=str(path))
    with pytest.raises(DataError, match="1 exact copies.*'a'"):
        indexed(cfg, 0, shards)
    manifest = indexed(replace(cfg, copies="forget"), 0, shards)
    assert set(manifest.ids("forget")) == {"000000003", "000000004", "a"}


def test_forgotten_images_are_purged_from_indexed_shards(shards):
    manifest = indexed(ALL, 0, shards)
    gone = manifest.ids("forget")
    kept = {s.id: read_sample(manifest, s.id) for s in manifest.samples if s.id not in gone}
    with pytest.raises(DataError, match="holds '00000_stats.json'.*move it away"):
        purge_shards(shards, gone)
    for path in shards.glob("*_stats.json"):
        path.unlink()
    purge_shards(shards, gone)
    after = Manifest.load(shards)
    verify_shards(after, deep=True)
    assert {s.id: read_sample(after, s.id) for s in after.samples} == kept
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            assert not {name.partition(".")[0] for name in tar.getnames()} & set(gone)


def test_the_command_and_a_run_on_it(shards, tmp_path, capsys):
    assert main(["index", str(shards), *sets(*SETTINGS)]) == 0
    said = capsys.readouterr()
    assert said.err == "" and "60 images in 2 shards" in said.out and "retain" not in said.out
    use = sets(*SETTINGS, "data.source=webdataset", f"data.root={shards}", f"data.shards={shards}")
    assert main(["plan", "digits", "--out", str(tmp_path / "run"), *use]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["roles"]["forget"] == 6 and planned["roles"]["unused"] == 2
    assert planned["request"]["undecodable"] == 0
    assert main(["prepare", "digits", "--out", str(tmp_path / "run"), *use]) == 0  # the roles alone are written
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"request.json", "roles.arrow"}
    assert "60 images in 2 shards: 34 retain, 6 forget" in (said := capsys.readouterr().out) and "2 unused" in said
    for other in ("seed=3", "data.source=digits"):
        assert main(["prepare", "digits", "--out", str(tmp_path / "run"), *use, "--set", other]) == 3
        assert "another selection" in capsys.readouterr().err
    assert main(["prepare", "digits", "--out", str(tmp_path / "other"), *use, "--set", "data.source=digits"]) == 3


def test_shards_of_others_are_a_source_for_shards_of_our_own(shards, tmp_path):
    cfg = replace(ALL, root=str(shards), samples_per_shard=16)
    manifest = prepare_shards(cfg, 0, tmp_path / "own")
    verify_shards(manifest, deep=True)
    assert len(manifest) == 60 and all(read_sample(manifest, s.id) for s in manifest.samples)
    assert read_sample(manifest, "000010007") == jpeg(10_007) and manifest.info["skipped_files"] == {".json": 2}


def test_what_cannot_be_indexed_is_refused(shards, tmp_path):
    with pytest.raises(ConfigError, match="third_party_source"):
        indexed(replace(ALL, third_party_source="digits"), 0, shards)
    with pytest.raises(DataError, match="no folder"):
        indexed(ALL, 0, shards / "00000.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no .tar files"):
        indexed(ALL, 0, tmp_path / "empty")
    (shards / "a b.tar").write_bytes((shards / "00000.tar").read_bytes())
    with pytest.raises(DataError, match="'a b.tar' is not a plain file name"):
        indexed(ALL, 0, shards)


def test_progress_shows_rate_and_time_once_the_work_takes_a_moment(tmp_path, capsys, monkeypatch):
    from distunlearn.common import progress

    words = ["prepare", "digits", *sets(*SETTINGS, "data.samples_per_shard=10")]
    monkeypatch.setattr(progress, "QUIET", 1000.0)
    assert main([*words, "--out", str(tmp_path / "quick")]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "QUIET", -1.0)
    assert main([*words, "--out", str(tmp_path / "slow")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("prepare: 10/58") and lines[-1].startswith("prepare: 58/58")
    assert " images/s" in lines[-1] and "took" in lines[-1]
