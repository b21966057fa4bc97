"""Purged shards: what stays keeps its bytes, what goes is gone, and a kill leaves the old set or the new one."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from forked import killed_at
from pictures import by_webdataset

from distunlearn.common.files import file_sha256
from distunlearn.config.schema import DataConfig
from distunlearn.data import purge
from distunlearn.data.loading.verify import read_sample, verify_shards
from distunlearn.data.manifest import manifest as manifest_module
from distunlearn.data.manifest.manifest import Manifest, Shard
from distunlearn.data.prepare.write_shards import prepare_shards
from distunlearn.data.purge import plan_purge, purge_shards, purged_before
from distunlearn.errors import DataError

SMALL = DataConfig(
    members=40, forget=10, holdout=12, calibration=6, third_party=6, third_party_audit=6, samples_per_shard=8
)


RUN: list[Path] = []  # the run directory of the request


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "shards"
    RUN[:] = [folder.with_name("run")]
    prepare_shards(SMALL, 0, folder).save_request(RUN[0])
    return folder


def load(shards: Path) -> Manifest:
    return Manifest.load(shards, run=RUN[0])


@pytest.fixture
def shards(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "shards"))


def images(manifest: Manifest) -> dict[str, bytes]:
    return {sample.id: read_sample(manifest, sample.id) for sample in manifest.samples}


def test_what_stays_keeps_its_bytes_and_what_goes_is_gone(shards):
    before = load(shards)
    kept, forget = images(before), before.ids("forget")
    gone = {i: kept.pop(i) for i in forget}
    planned = plan_purge(before, forget)
    done = purge_shards(shards, forget)
    after = load(shards)
    verify_shards(after, deep=True)
    assert images(after) == kept
    assert [s.id for s in after.samples] == [s.id for s in before.samples if s.id not in gone]
    assert {(s.id, s.role, s.label) for s in after.samples} < {(s.id, s.role, s.label) for s in before.samples}
    for name in after.shards():  # webdataset agrees, with every check of a run
        wanted = {s.id for s in after.in_shard(name)}
        assert by_webdataset(after, name) == {i: kept[i] for i in wanted}
    everything = b"".join(path.read_bytes() for path in shards.iterdir())
    for sample_id, data in gone.items():
        assert data not in everything and f'"{sample_id}"'.encode() not in everything
    assert any(f'"{i}"'.encode() in everything for i in kept)  # control: names can be found
    assert (done.images, done.before, done.after) == (10, before.index_sha256, after.index_sha256)
    assert planned == replace(done, after=None, bytes_after=None)
    assert done.bytes_after == sum(path.stat().st_size for path in shards.glob("*.tar")) < done.bytes_before
    rows = before.rows(["forget"]).tolist()
    assert after.info["purged"] == {
        "images": 10, "copies": 0, "steps": [{"index": before.index_sha256, "rows": rows}],
    }  # fmt: skip
    assert after.lost == {"forget": 10} and not before.lost
    assert (after.columns.near == before.columns.near[np.isin(before.columns.ids.at(np.arange(len(before))),
                                                               [s.id for s in after.samples])]).all()  # fmt: skip
    untouched = [n for n in before.shards() if not {s.id for s in before.in_shard(n)} & set(forget)]
    assert untouched and all(after.shard_files[n] == before.shard_files[n] for n in untouched)
    assert [p.name for p in shards.parent.iterdir()] == ["shards"]  # nothing is left beside it


def test_a_second_purge_has_nothing_to_do_and_another_list_goes_on(shards):
    forget, retain = (load(shards).ids(role) for role in ("forget", "retain"))
    purge_shards(shards, forget)
    with pytest.raises(DataError, match="10 images were purged from them before"):
        purge_shards(shards, forget)
    purge_shards(shards, retain[:1] + forget)
    after = load(shards)
    history = after.info["purged"]
    assert history["images"] == 11 and len({step["index"] for step in history["steps"]}) == 2
    assert after.lost == {"forget": 10, "retain": 1} and after.ids("retain") == retain[1:]  # both steps, in turn


def test_a_shard_of_forgotten_images_alone_vanishes(shards):
    manifest = load(shards)
    name = manifest.shards()[0]
    ids = [s.id for s in manifest.in_shard(name)]
    done = purge_shards(shards, ids)
    assert done.emptied == done.shards == 1
    assert name not in load(shards).shard_files and not (shards / name).exists()


def test_copies_under_other_names_are_counted(shards):
    manifest = load(shards)
    first, second = manifest.samples[:2]
    twins = [replace(s, sha256=first.sha256) if s is second else s for s in manifest.samples]
    assert plan_purge(manifest, [first.id]).copies == 0
    assert plan_purge(Manifest(shards, twins, manifest.shard_files), [first.id]).copies == 1


def test_members_of_other_writers_are_copied_as_they_are(tmp_path):
    """Long names, extra parts, keys with folders: what is not of the forgotten sample keeps all its bytes."""
    names = ["a/0001.jpg", "a/0001.txt", "a/0002.jpg", "a/0002.seg.png", f"b/{'x' * 180}.jpg", "b/0001.jpg"]
    source, target = tmp_path / "in.tar", tmp_path / "out.tar"
    with tarfile.open(source, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            data = bytes([number]) * (700 * number + 1)
            member.size, member.mtime = len(data), 12345.678
            tar.addfile(member, io.BytesIO(data))
    with tarfile.open(source) as tar:
        places = {m.name: m.offset_data for m in tar}
        contents = {m.name: (tar.extractfile(m).read(), m.mtime) for m in tar.getmembers()}
    moved = purge._rewrite(source, target, {places["a/0002.jpg"]})
    with tarfile.open(target) as tar:
        found = {m.name: (tar.extractfile(m).read(), m.mtime) for m in tar.getmembers()}
        assert {m.name: m.offset_data for m in tar.getmembers()} == {n: moved[places[n]] for n in found}
    assert found == {n: c for n, c in contents.items() if not n.startswith("a/0002")}
    assert target.stat().st_size % tarfile.RECORDSIZE == 0


@pytest.mark.parametrize("damage", ["byte", "missing", "extra"])
def test_damaged_shards_are_not_purged(shards, damage):
    manifest = load(shards)
    victim = manifest.shard_path(manifest.shards()[-1])
    if damage == "byte":
        content = bytearray(victim.read_bytes())
        content[700] ^= 1
        victim.write_bytes(content)
    elif damage == "missing":
        victim.unlink()
    else:
        shutil.copy(victim, shards / "other.tar")
    before = {p.name: file_sha256(p) for p in shards.iterdir()}
    with pytest.raises(DataError):
        purge_shards(shards, manifest.ids("forget"))
    assert {p.name: file_sha256(p) for p in shards.iterdir()} == before
    assert [p.name for p in shards.parent.iterdir()] == ["shards"]


@pytest.mark.parametrize("lie", ["id left", "image lost"])
def test_a_purge_that_went_wrong_replaces_nothing(shards, monkeypatch, lie):
    """The proof looks at what lies on the disk."""
    right = purge._rewrite
    manifest = load(shards)

    def wrong(source: Path, target: Path, gone: set[int]) -> dict[int, int]:
        if lie == "id left":
            return right(source, target, set())
        return right(source, target, gone | {manifest.in_shard(source.name)[0].offset})

    monkeypatch.setattr(purge, "_rewrite", wrong)
    with pytest.raises((DataError, KeyError)):
        purge_shards(shards, manifest.ids("forget"))
    assert load(shards).fingerprint == manifest.fingerprint
    verify_shards(manifest, deep=True)


def test_one_purge_at_a_time(shards):
    with purge._work_folder(shards), pytest.raises(DataError, match="another purge works on"):
        purge_shards(shards, load(shards).ids("forget"))


def test_everything_or_nothing_is_no_purge(shards):
    manifest = load(shards)
    with pytest.raises(DataError, match="delete the folder instead"):
        purge_shards(shards, [s.id for s in manifest.samples])
    with pytest.raises(DataError, match="none of the 1 images"):
        purge_shards(shards, ["nobody"])
    assert Shard(1, "", 1) not in manifest.shard_files.values()


# -- kills -----------------------------------------------------------------------------------------------------------

EVENTS = ("open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir")


def killed_purge(last: int, folder: Path, ids: list[str], log: Path) -> int:
    return killed_at(last, lambda: purge_shards(folder, ids), log, EVENTS, "shards")


@pytest.mark.parametrize("form", ["objects", "views"])
def test_a_kill_leaves_the_old_set_or_the_new_one(original, tmp_path, monkeypatch, form):
    """At twenty points, before and after the exchange."""
    monkeypatch.setattr(manifest_module, "SMALL", 10**6 if form == "objects" else 0)
    source = tmp_path / "source" / "shards"
    shutil.copytree(original, source)
    forget, log = load(source).ids("forget"), tmp_path / "log"
    whole = Path(shutil.copytree(source, tmp_path / "whole" / "shards"))
    assert killed_purge(0, whole, forget, log) == 0
    events, new = int(log.read_text()), load(whole).fingerprint
    old = load(source).fingerprint
    assert events > 40 and new != old
    points = sorted({round(1 + k * (events - 1) / 19) for k in range(20)})
    seen = []
    for point in points:
        folder = Path(shutil.copytree(source, tmp_path / str(point) / "shards"))
        assert killed_purge(point, folder, forget, log) == -signal.SIGKILL  # the kill came
        found = load(folder)
        verify_shards(found, deep=True)
        assert found.fingerprint in (old, new)
        seen.append(found.fingerprint == new)
        if not seen[-1]:
            assert purged_before(folder) is None
            purge_shards(folder, forget)
        else:
            assert purged_before(folder).images == 10
        assert load(folder).fingerprint == new
        assert [p.name for p in folder.parent.iterdir()] == ["shards"]  # what the killed one left is gone
        assert json.loads((folder / "summary.json").read_text())["info"]["purged"]["images"] == 10
    assert len(points) == 20 and seen == sorted(seen) and not seen[0] and seen[-1]  # both sides of the exchange


def test_where_folders_cannot_be_exchanged_nothing_happens(shards, monkeypatch):
    class Refuses:
        @staticmethod
        def renameat2(*args) -> int:
            return -1

    monkeypatch.setattr(purge.ctypes, "CDLL", lambda *args, **how: Refuses)
    monkeypatch.setattr(purge.ctypes, "get_errno", lambda: 22)
    before = load(shards)
    with pytest.raises(DataError, match="cannot exchange two folders"):
        purge_shards(shards, before.ids("forget"))
    verify_shards(load(shards), deep=True)
    assert load(shards).fingerprint == before.fingerprint and os.listdir(shards.parent) == ["shards"]
