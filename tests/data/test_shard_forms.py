"""WebDataset shards as people make them: read as webdataset reads them, each thing left out counted by its cause.

Case 03, forms of WebDataset shards that were refused as a whole, is `FORMS`.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset as wds
from pictures import indexed, jpeg

from distunlearn.config.schema import DataConfig
from distunlearn.data.loading.verify import read_sample, verify_shards
from distunlearn.data.loading.webdataset_pipeline import webdataset
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.manifest.records import CODES
from distunlearn.data.purge import purge_shards
from distunlearn.data.sources.tar_folder import ShardSource
from distunlearn.errors import DataError

CFG = DataConfig(source="webdataset", members=None, forget=3, holdout=2, calibration=2, third_party=2,
                 third_party_audit=2, near_distance=None)  # fmt: skip
PER = 8  # samples in each of two shards


def tar(path: Path, parts, mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, data in parts:
            member = tarfile.TarInfo(name)
            if data is None:
                member.type = tarfile.DIRTYPE
                archive.addfile(member)
            else:
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def numbered(s: int, i: int) -> str:
    return f"{s:02d}{i:04d}"


def parts(s: int, key=numbered, cls=b"1", first=(), more=lambda s, i: (), kind="jpg"):
    found = list(first)
    for i in range(PER):
        found += [(f"{key(s, i)}.{kind}", jpeg(100 * s + i)), (f"{key(s, i)}.cls", cls), *more(s, i)]
    return found


def at(number, *what):
    """These members after one sample of each shard."""
    return lambda s, i: [(name.format(s=s, i=i), data) for name, data in what] if i == number else []


# how a shard is written, what is left out of both, and whether webdataset gives the very same samples
FORMS = {
    "plain": ({}, {}, True),
    "folder entries": ({"first": [("data", None), ("data/x", None)], "key": lambda s, i: f"data/x/{s}{i}"},
                       {"folders": 4}, True),
    "dots before the folder": ({"key": lambda s, i: f"./v1.2/{s}{i}"}, {}, True),
    "keys that begin anew": ({"key": lambda s, i: f"sample{i:06d}"}, {}, True),
    "dots in names": ({"key": lambda s, i: f"IMG_2021.05.{s}{i:03d}"}, {}, False),  # webdataset: one sample a shard
    "one dot in names": ({"key": lambda s, i: f"{s}{i}.v2"}, {}, False),
    "capitals": ({"kind": "JPG"}, {}, True),
    "jpeg": ({"kind": "jpeg"}, {}, True),
    "class -1": ({"cls": b"-1"}, {}, True),
    "class in words": ({"cls": b"Alpine chough\n"}, {}, True),
    "large classes": ({"cls": b"500000001"}, {}, True),
    "empty class": ({"cls": b""}, {}, True),
    "sample without image": ({"more": at(5, ("bad{s}{i}.json", b'{"status": "failed_to_download"}'))},
                             {"samples without an image": 2}, False),
    "AppleDouble": ({"more": lambda s, i: [(f"._{s:02d}{i:04d}.jpg", b"\0\5\26\7")]}, {"hidden": 2 * PER}, True),
    "hidden folder": ({"more": at(3, ("@eaDir/{s}{i}.jpg", b"thumb"), (".git/x.jpg", b"x"))}, {"hidden": 4}, False),
    "macOS": ({"more": at(7, ("__MACOSX/._{s}{i}.jpg", b"\0\5\26\7"))}, {"hidden": 2}, True),
    "file without ending": ({"first": [("README", b"x"), ("LICENSE", b"y")]}, {"files without ending": 4}, True),
    "webdataset's metadata": ({"first": [("__meta__", b"x"), ("__index__/x.json", b"{}")]}, {"metadata": 4}, True),
    "mask beside": ({"more": lambda s, i: [(f"{numbered(s, i)}.seg.png", b"mask")]}, {}, True),
    "captions and pickles beside": ({"more": lambda s, i: [(f"{numbered(s, i)}.txt", b"a"),
                                                          (f"{numbered(s, i)}.pyd", b"\x80")]}, {}, True),
    "ids of their own": ({"more": lambda s, i: [(f"{numbered(s, i)}.json", json.dumps({"id": f"p/{s}-{i}"}).encode())]},
                         {}, True),
    "other kinds": ({"kind": "tiff"}, {}, True),  # what it is, its content says
}  # fmt: skip


@pytest.fixture(scope="module", params=FORMS)
def form(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("form")
    how, left, same = FORMS[request.param]
    for s in range(2):
        tar(folder / f"{s:05d}.tar", parts(s, **how))
    return folder, indexed(CFG, 0, folder), left, same, request.param


def by_webdataset(folder: Path) -> list[bytes]:
    """The images of all samples that have one, by webdataset alone."""
    images = []
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as stream:
            members = wds.tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
            for sample in wds.tariterators.group_by_keys(members):
                images += [data for kind, data in sample.items() if kind in ("jpg", "jpeg", "tiff")]
    return images


def test_shards_of_every_form(form):
    folder, manifest, left, same, name = form
    assert manifest.info["left_out"] == left and manifest.info["skipped_files"] == {}
    assert len(manifest) == 2 * PER == len(set(s.id for s in manifest.samples))
    found = [read_sample(manifest, s.id) for s in manifest.samples]
    assert found == [jpeg(100 * s + i) for s in range(2) for i in range(PER)]
    if same:
        assert found == by_webdataset(folder)
    verify_shards(Manifest.load(folder), deep=True)
    handed = list(webdataset(manifest, CODES))
    assert {sample["__id__"] for sample in handed} == {s.id for s in manifest.samples}
    classes = {"class -1": [], "empty class": [], "class in words": ["Alpine chough"], "large classes": ["500000001"]}
    assert manifest.info["classes"] == classes.get(name, ["1"])
    labels = {s.label for s in manifest.samples}
    assert labels == ({None} if not manifest.info["classes"] else {0})
    source = ShardSource(folder, 10**6)
    assert source.samples == [(s.id, s.label) for s in manifest.samples] and dict(source.skipped) == left
    expected = {"keys that begin anew": "00001/sample000000", "dots in names": "IMG_2021.05.1000",
                "ids of their own": "p/1-0", "dots before the folder": "./v1.2/10"}  # fmt: skip
    if name in expected:
        assert manifest.samples[PER].id == expected[name]


def test_as_many_forms_as_were_promised():
    assert len(FORMS) >= 20


@pytest.mark.parametrize("form_", ["AppleDouble", "dots in names", "keys that begin anew"])
def test_forgotten_images_are_purged_from_every_form(tmp_path, form_):
    for s in range(2):
        tar(tmp_path / f"{s:05d}.tar", parts(s, **FORMS[form_][0]))
    manifest = indexed(CFG, 0, tmp_path)
    gone = manifest.ids("forget")
    kept = {s.id: read_sample(manifest, s.id) for s in manifest.samples if s.id not in gone}
    purge_shards(tmp_path, gone)
    after = Manifest.load(tmp_path)
    assert {s.id: read_sample(after, s.id) for s in after.samples} == kept
    names = []
    for path in tmp_path.glob("*.tar"):
        with tarfile.open(path) as archive:
            names += archive.getnames()
    assert len(names) == (3 if form_ == "AppleDouble" else 2) * len(kept)


def test_compressed_shards_are_counted_not_read(tmp_path):
    for s in range(2):
        tar(tmp_path / f"{s:05d}.tar", parts(s))
    tar(tmp_path / "z.tgz", parts(9), "w:gz")
    (tmp_path / "00000_stats.json").write_text("{}")
    assert indexed(CFG, 0, tmp_path).info["skipped_files"] == {".tgz": 1, ".json": 1}


def test_classes_are_numbered_as_they_occur_and_forgotten_by_name(tmp_path):
    for s in range(2):
        found = []
        for i in range(PER):
            number = str(500_000_000 + 1000 * (i % 3)).encode()
            found += [(f"{s}{i}.jpg", jpeg(100 * s + i)), (f"{s}{i}.cls", number)]
        tar(tmp_path / f"{s:05d}.tar", found)
    cfg = DataConfig(**{**vars(CFG), "forget": "class:500001000", "max_forget_share": 0.9})
    manifest = indexed(cfg, 0, tmp_path)
    assert manifest.info["classes"] == ["500000000", "500001000", "500002000"]
    assert {s.label for s in manifest.samples} == {0, 1, 2}
    assert {manifest.by_id[i].label for i in manifest.ids("forget")} == {1}
    assert manifest.facts["whole_classes"] == ["500001000"]


@pytest.mark.parametrize("by", ["url", "key", "sha256"])
def test_a_list_by_url_key_or_digest_of_shards(tmp_path, by):
    folder = tmp_path / "shards"
    folder.mkdir()
    for s in range(2):
        facts = lambda s, i: [(f"{numbered(s, i)}.json", json.dumps(  # noqa: E731
            {"url": f"https://x.org/{s}/{i}", "key": numbered(s, i), "sha256": f"{s}{i}" * 32}).encode())]  # fmt: skip
        tar(folder / f"{s:05d}.tar", parts(s, more=facts))
    (tmp_path / "list.csv").write_text(
        f"{by}\n" + {"url": "https://x.org/1/2", "key": "010002", "sha256": "12" * 32}[by]
    )
    cfg = DataConfig(**{**vars(CFG), "forget": str(tmp_path / "list.csv"), "forget_by": by})
    assert indexed(cfg, 0, folder).ids("forget") == ["010002"]


def test_one_id_in_two_shards_is_refused_where_samples_name_themselves(tmp_path):
    for s in range(2):
        tar(tmp_path / f"{s}.tar", [("a.jpg", jpeg(s)), ("a.json", b'{"id": "same"}')])
    with pytest.raises(DataError, match="1.tar: the id 'same' is in 0.tar too"):
        indexed(CFG, 0, tmp_path)
