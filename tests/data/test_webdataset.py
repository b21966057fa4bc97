"""Shards are webdataset's: it reads what prepare writes, and our pipeline over it loses nothing where it would."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import pickle
import shutil
import sys
import tarfile
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import webdataset as wds
from PIL import Image

import distunlearn
from distunlearn.config.schema import DataConfig
from distunlearn.data.loading.verify import read_sample
from distunlearn.data.loading.webdataset_pipeline import webdataset
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.manifest.records import ROLES, Remote
from distunlearn.data.prepare.write_shards import prepare_shards
from distunlearn.errors import ConfigError, DataError

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from hostile_tars import img2dataset, jpeg, sample, write_tar  # noqa: E402
from pictures import indexed  # noqa: E402

SMALL = DataConfig(
    members=40, forget=10, holdout=12, calibration=6, third_party=6, third_party_audit=6, samples_per_shard=8
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "shards"
    prepare_shards(SMALL, 0, folder).save_request(folder.parent)
    return folder


@pytest.fixture
def shards(made, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made.parent, tmp_path / "run")) / "shards"


def plain(paths: list[Path], **how) -> list[dict]:
    """By webdataset alone, as its documentation has it; it leaves the files to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        found = list(wds.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False, **how))
        gc.collect()
    return found


def test_plain_webdataset_reads_what_prepare_writes(made):
    manifest = Manifest.of_run(made.parent)
    found = plain([made / name for name in manifest.shards()])
    assert len(found) == len(manifest) == 70 and [int(record["__key__"]) for record in found] == list(range(70))
    for record, listed in zip(found, manifest.samples, strict=True):
        assert set(record) == {"__key__", "__url__", "__local_path__", "png", "cls", "json"}
        assert Path(record["__url__"]).name == listed.shard and json.loads(record["json"]) == {"id": listed.id}
        assert int(record["cls"]) == listed.label
        assert record["png"] == read_sample(manifest, listed.id)  # at the offset of the manifest, by its digest
        assert hashlib.sha256(record["png"]).hexdigest() == listed.sha256


def test_prepare_twice_gives_the_same_bytes(made, tmp_path):
    """Whatever the clock and the user: nothing of either is in the headers."""
    prepare_shards(SMALL, 0, tmp_path / "again")
    names = sorted(path.name for path in made.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir()) and "index.arrow" in names
    for name in names:
        assert (made / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    for path in made.glob("*.tar"):
        with tarfile.open(path, "r:") as tar:
            heads = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in tar}
        assert heads == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE)}


@pytest.mark.parametrize("role", ["forget", ("retain", "forget"), ROLES, "third_party_audit"])
def test_the_pipeline_gives_every_image_of_the_roles_once(made, role):
    manifest = Manifest.of_run(made.parent)
    found = list(webdataset(made.parent, role))
    wanted = [s for s in manifest.samples if s.role in ((role,) if isinstance(role, str) else role)]
    assert [record["__id__"] for record in found] == [s.id for s in wanted] and wanted
    for record, listed in zip(found, wanted, strict=True):
        assert set(record) == {"__key__", "__url__", "__id__", "__role__", "png", "cls", "json"}
        assert hashlib.sha256(record["png"]).hexdigest() == listed.sha256 and record["__role__"] == listed.role
        assert int(record["cls"]) == listed.label and Path(record["__url__"]) == made / listed.shard
    assert [r["__id__"] for r in webdataset(manifest, role)] == [r["__id__"] for r in found]


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (3, 2)])
def test_ranks_and_workers_share_the_images(made, monkeypatch, world, workers):
    """With webdataset's own stages behind it, as training code has them."""
    manifest, found, labels = Manifest.of_run(made.parent), Counter(), {}
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        pipeline = webdataset(manifest, ("retain", "forget")).decode("torchrgb8").to_tuple("__id__", "png", "cls")
        for ids, images, classes in torch.utils.data.DataLoader(pipeline, batch_size=3, num_workers=workers):
            assert images.dtype == torch.uint8 and images.shape[1] == 3
            found.update(ids)
            labels |= dict(zip(ids, classes.tolist(), strict=True))
    assert found == dict.fromkeys(manifest.ids(("retain", "forget")), 1)
    assert labels == {i: manifest.by_id[i].label for i in labels}


def broken(folder: Path, number: int, change) -> tuple[Manifest, str]:
    """Change bytes of a shard near its image `number`; change(content, offset of the image)."""
    manifest = Manifest.of_run(folder.parent)
    name = manifest.shards()[1]
    content = bytearray((folder / name).read_bytes())
    change(content, manifest.in_shard(name)[number].offset)
    (folder / name).write_bytes(content)
    return manifest, name


def break_header(content: bytearray, offset: int) -> None:
    content[offset - 512 + 148 : offset - 512 + 156] = b"garbage!"  # its checksum


@pytest.mark.parametrize("workers", [0, 2])
def test_a_header_broken_in_mid_shard_raises_and_never_ends_it_silently(shards, workers):
    manifest, name = broken(shards, 5, break_header)
    lost = plain([shards / name], handler=wds.handlers.reraise_exception)
    assert len(lost) < len(manifest.in_shard(name)) == 8  # negative control: the strict handler says nothing
    loader = torch.utils.data.DataLoader(webdataset(manifest, ROLES), batch_size=None, num_workers=workers)
    before = []
    with pytest.raises(DataError, match=rf"{name} (gave [56] samples; expected 8|\(number 6 of 8\) has another)"):
        before.extend(record["__id__"] for record in loader)
    assert len(before) < len(manifest)
    others = [role for role in ROLES if role not in ("retain", "forget")]
    assert len(list(webdataset(manifest, others))) == 30  # the other shards are as they were


def flip(at: int):
    def change(content: bytearray, offset: int) -> None:
        content[offset + at] ^= 1

    return change


DAMAGE = {
    "a byte of an image": (flip(40), "does not have the sha256 of the manifest"),
    "a byte of a class": (flip(-2048), "has the class"),
    "a byte of padding": (lambda content, _: content.__setitem__(-1, 1), "does not have the sha256 of the manifest"),
    "truncated": (lambda content, offset: content.__delitem__(slice(offset, None)), "bytes; expected"),
    "other bytes": (lambda content, _: content.__setitem__(slice(None), b"<html>" + bytes(len(content) - 6)), "cannot"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_shard_that_differs_by_one_byte_raises(shards, damage):
    change, words = DAMAGE[damage]
    manifest, name = broken(shards, 3, change)
    with pytest.raises(DataError, match=words) as caught:
        list(webdataset(manifest, ROLES))
    assert name in str(caught.value)


def test_shards_of_another_order_or_number_raise(shards):
    manifest = Manifest.of_run(shards.parent)
    first, second = manifest.shards()[:2]
    swapped = Manifest(shards, [replace(s, id=f"x/{s.id}") for s in manifest.samples], manifest.shard_files)
    with pytest.raises(DataError, match=f"{first} .number 1 of 8. has another or a partial sample where 'x/"):
        list(webdataset(swapped, ROLES))
    (shards / second).unlink()
    with pytest.raises(DataError, match=f"{second} is missing"):
        list(webdataset(manifest, ROLES))


def test_of_shards_made_by_others_only_image_class_and_json_are_handed_out(tmp_path):
    """A pickle among the parts, which `decode` would load, stays where it is."""
    img2dataset(tmp_path)
    parts = [*sample(70_000), ("000070000.pyd", pickle.dumps(Path("x")))]
    write_tar(tmp_path / "00002.tar", parts)
    made = indexed(replace(SMALL, source="webdataset", members=0, near_distance=None), 0, tmp_path)
    (found,) = (record for record in webdataset(made, (*ROLES, "unused")) if record["__id__"] == "000070000")
    assert found["jpg"] == jpeg(70_000) and set(found) <= {"__key__", "__url__", "__id__", "__role__", "jpg", "json"}
    assert "pyd" in plain([tmp_path / "00002.tar"])[0]  # it is there
    assert Image.open(io.BytesIO(found["jpg"])).size


def test_it_is_a_name_of_the_package():
    assert distunlearn.webdataset is webdataset


def test_what_cannot_be_read_is_refused_at_once(made, tmp_path):
    with pytest.raises(ConfigError, match="role is everything; expected some of retain, forget"):
        webdataset(made.parent, ["retain", "everything"])
    with pytest.raises(ConfigError, match="role is empty"):
        webdataset(made.parent, [])
    with pytest.raises(DataError, match="no image of the role unused"):
        webdataset(made.parent, "unused")
    with pytest.raises(DataError, match=r"summary\.json cannot be read"):
        webdataset(tmp_path, "retain")
    with pytest.raises(DataError, match="lie in http://127.0.0.1:9/x; copy them"):
        webdataset(Manifest.load(made, Remote("http://127.0.0.1:9/x"), made.parent), "retain")
