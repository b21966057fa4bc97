"""The manifest says what it was made of, refuses what contradicts itself, is searched in place; others can read it."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from distunlearn.config.schema import DataConfig
from distunlearn.data.loading.verify import read_sample, verify_shards
from distunlearn.data.manifest import manifest as module
from distunlearn.data.manifest.ids import check_id, refused
from distunlearn.data.manifest.manifest import Manifest, Sample, Shard
from distunlearn.data.prepare.write_shards import prepare_shards
from distunlearn.data.purge import purge_shards, purged_before
from distunlearn.errors import DataError

SMALL = DataConfig(
    members=40, forget=10, holdout=12, calibration=6, third_party=6, third_party_audit=6, watch=0, samples_per_shard=16
)


def samples(n: int = 50, shards: int = 4) -> tuple[list[Sample], dict[str, Shard]]:
    rng = np.random.default_rng(n)
    names = [f"{k:05d}.tar" for k in range(shards)]
    found = [
        Sample(
            f"caf\u00e9/{k}{'x' * (k % 7)}.jpg", names[k * shards // n], 512 + 1000 * k, int(rng.integers(1, 400)),
            rng.bytes(32).hex(), module.CODES[k % len(module.CODES)], None if k % 3 else k, 3 + k, 4 + k,
        )
        for k in range(n)
    ]  # fmt: skip
    counts = [sum(s.shard == name for s in found) for name in names]
    return found, {name: Shard(10**6, "ab" * 32, count) for name, count in zip(names, counts, strict=True)}


def keep(manifest: Manifest, folder: Path) -> None:
    """Index and request in one folder."""
    manifest.save(folder)
    manifest.save_request(folder)


def load(folder: Path) -> Manifest:
    return Manifest.load(folder, run=folder)


@pytest.fixture(params=["objects", "views"])
def size(request, monkeypatch) -> str:
    """How samples are handed out: as objects that are kept, or, as a large manifest does, made when asked for."""
    monkeypatch.setattr(module, "SMALL", 10**6 if request.param == "objects" else 0)
    return request.param


def test_a_manifest_says_what_it_was_made_of(tmp_path, size):
    found, files = samples()
    keep(Manifest(tmp_path, found, files, {"a": 1}), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"index.arrow", "summary.json", "request.json", "roles.arrow"}
    for manifest in (Manifest(tmp_path, found, files), load(tmp_path)):
        assert manifest.is_small == (size == "objects")
        assert list(manifest.samples) == found and len(manifest) == 50 and manifest.shard_files == files
        assert manifest.samples[7] == found[7] and manifest.samples[-1] == found[-1]
        assert manifest.samples[3:9] == found[3:9]
        assert [manifest.by_id[s.id] for s in found] == found and set(manifest.by_id) == {s.id for s in found}
        assert "nobody" not in manifest.by_id and found[0].id in manifest.by_id and 5 not in manifest.by_id
        assert manifest.lookup([found[9].id, found[2].id]) == [found[9], found[2]]
        with pytest.raises(KeyError, match="nobody"):
            manifest.by_id["nobody"]
        for name in files:
            assert manifest.in_shard(name) == [s for s in found if s.shard == name]
        for roles in ("forget", ("retain", "forget"), "holdout"):
            wanted = [s for s in found if s.role in roles]
            chosen = manifest.select(roles)
            assert chosen.ids == [s.id for s in wanted] == manifest.ids(roles)
            assert np.repeat(chosen.shards, np.diff(chosen.starts)).tolist() == [s.shard for s in wanted]
            assert chosen.ids[2] == wanted[2].id and chosen.ids[1:3] == [s.id for s in wanted[1:3]]
        labels = [-1 if s.label is None else s.label for s in found]
        assert manifest.labels([s.id for s in found]).tolist() == labels
        assert manifest.count_roles() == {role: sum(s.role == role for s in found) for role in module.CODES}


def test_pandas_and_arrow_read_what_the_manifest_says(tmp_path):
    """Readers that know nothing of this package; the second maps the file."""
    found, files = samples()
    keep(Manifest(tmp_path, found, files), tmp_path)
    table = pandas.read_feather(tmp_path / "index.arrow")
    table["role"] = pandas.read_feather(tmp_path / "roles.arrow")["role"]
    for name in ("id", "shard", "offset", "length", "role"):
        assert table[name].tolist() == [getattr(s, name) for s in found], name
    assert [digest.hex() for digest in table["sha256"]] == [s.sha256 for s in found]
    assert [None if pandas.isna(label) else label for label in table["label"]] == [s.label for s in found]
    assert table.groupby("role", observed=True).size().to_dict() == load(tmp_path).count_roles()
    with pa.memory_map(str(tmp_path / "index.arrow")) as file:
        mapped = pa.ipc.open_file(file).read_all()
        with pa.memory_map(str(tmp_path / "roles.arrow")) as roles:
            chosen = pc.equal(pa.ipc.open_file(roles).read_all()["role"], "forget")
            assert mapped.filter(chosen)["id"].to_pylist() == [s.id for s in found if s.role == "forget"]
    index = {name: table[name].tolist() for name in ("hash", "hash_row")}
    assert index["hash"] == sorted(index["hash"]) and sorted(index["hash_row"]) == list(range(50))
    for value, row in zip(*index.values(), strict=True):
        digest = hashlib.blake2b(unicodedata.normalize("NFC", found[row].id).encode(), digest_size=8).digest()
        assert value == int.from_bytes(digest, "little")


def test_a_saved_manifest_has_the_fingerprint_it_had_before(tmp_path):
    found, files = samples()
    made = Manifest(tmp_path, found, files)
    before, index = made.fingerprint, made.index_sha256
    keep(made, tmp_path)
    assert load(tmp_path).fingerprint == before and index == digest(tmp_path / "index.arrow")
    for change in ({"label": 9}, {"width": 9}, {"role": "holdout"}):
        other = Manifest(tmp_path, [replace(found[0], **change), *found[1:]], files)
        assert other.fingerprint != before and (other.index_sha256 == index) == ("role" in change)


def test_a_manifest_has_the_same_bytes_whenever_and_by_whichever_arrow_it_is_written(tmp_path):
    """A stated digest: shards are told apart by it, so a new version of pyarrow may not change it unnoticed."""
    found, files = samples()
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        keep(Manifest(folder, found, files), folder)
    assert (tmp_path / "one/index.arrow").read_bytes() == (tmp_path / "two/index.arrow").read_bytes()
    assert digest(tmp_path / "one/index.arrow") == ("1d3d751f5c44a7619412cc29bfd7307958f5750c451e0138b1f9933bf877b094")


FILE_DAMAGE = {
    "a byte": (lambda f: flip(f), "index.arrow does not have the sha256"),
    "cut": (lambda f: os.truncate(f, 300), "index.arrow does not have the sha256"),
    "gone": (lambda f: f.unlink(), "index.arrow cannot be read"),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", FILE_DAMAGE)
def test_a_damaged_file_is_refused(tmp_path, damage):
    found, files = samples()
    keep(Manifest(tmp_path, found, files), tmp_path)
    assert len(load(tmp_path)) == 50
    change, words = FILE_DAMAGE[damage]
    change(tmp_path / "index.arrow")
    with pytest.raises(DataError, match=words):
        load(tmp_path)


def vouched(folder: Path, change: Callable[[pa.Table], pa.Table | bytes], name: str = "index") -> None:
    """Change the file of a saved manifest and let the summary vouch for it, as a program with an error would."""
    path, voucher = folder / f"{name}.arrow", folder / {"index": "summary.json", "roles": "request.json"}[name]
    made = change(pa.ipc.open_file(path.read_bytes()).read_all())
    if isinstance(made, bytes):
        path.write_bytes(made)
    else:
        with pa.ipc.new_file(str(path), made.schema) as writer:
            writer.write_table(made)
    voucher.write_text(json.dumps(json.loads(voucher.read_text()) | {f"{name}_sha256": digest(path)}))


def with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(place).with_type(values.type), values)


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[pa.Table], pa.Table]:
    """A table with another column of numbers."""
    return lambda table: with_column(table, name, pa.array(change(table[name].to_numpy())))


def recoded(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[pa.Table], pa.Table]:
    """A table with other codes in a column of names."""

    def make(table: pa.Table) -> pa.Table:
        column = table[name].combine_chunks()
        codes = pa.array(change(column.indices.to_numpy()))
        return with_column(table, name, pa.DictionaryArray.from_arrays(codes, column.dictionary, safe=False))

    return make


def raw_ids(change: Callable[[np.ndarray, np.ndarray], None]) -> Callable[[pa.Table], pa.Table]:
    """A table of ids whose ends (int64 [n + 1]) or letters (uint8) were changed in place."""

    def make(table: pa.Table) -> pa.Table:
        _, ends, letters = table["id"].combine_chunks().buffers()
        parts = np.frombuffer(ends, np.int64).copy(), np.frombuffer(letters, np.uint8).copy()
        sound = pa.LargeStringArray.from_buffers(len(table), *map(pa.py_buffer, parts))
        change(*parts)  # in place, after pyarrow has looked
        return with_column(table, "id", sound)

    return make


def spelled(text: str) -> Callable[[pa.Table], pa.Table]:
    """A table whose fifth id is this one."""
    return lambda t: with_column(t, "id", pa.array([*t["id"].to_pylist()[:4], text, *t["id"].to_pylist()[5:]],
                                                   pa.large_string()))  # fmt: skip


def swapped(letters: np.ndarray) -> None:
    letters[:2] = letters[1::-1]


CONTRADICTIONS = {
    "offset beyond the shard": (changed("offset", lambda c: c + np.uint64(10**6)), "contradict"),
    "offset that wraps": (changed("offset", lambda c: c - c - np.uint64(1)), "contradict"),
    "shards out of order": (recoded("shard", lambda c: c[::-1].copy()), "contradict"),
    "all in one shard": (recoded("shard", np.zeros_like), "lists 50 samples of 00000.tar, not 13"),
    "no such shard": (recoded("shard", lambda c: c + np.int32(4)), "damaged"),
    "negative control: nothing": (raw_ids(lambda ends, _: ends.sort()), None),
    "ends of ids backwards": (raw_ids(lambda ends, _: ends[:-1][::-1].sort()), "damaged"),
    "an id beyond the file": (raw_ids(lambda ends, _: ends.__setitem__(-1, 10**9)), "damaged"),
    "no UTF-8": (raw_ids(lambda _, letters: letters.__setitem__(0, 255)), "damaged"),
    "a line break in an id": (raw_ids(lambda _, letters: letters.__setitem__(0, 10)), "can be no id"),
    "an empty id": (spelled(""), "can be no id"),
    "an id that climbs": (spelled("a/../../etc/passwd"), "'a/../../etc/passwd', which can be no id"),
    "an absolute id": (spelled("/etc/passwd"), "can be no id"),
    "an id too long": (spelled("\u00e9" * 1025), "can be no id"),
    "hashes out of order": (changed("hash", lambda c: c[::-1].copy()), "contradict"),
    "rows that are none": (changed("hash_row", lambda c: c + np.uint32(50)), "contradict"),
    "a column is missing": (lambda t: t.drop_columns(["label"]), "should hold the columns id, shard"),
    "labels of another kind": (changed("label", lambda c: c.astype(np.float32)), "should hold the columns"),
    "other shards": (lambda t: with_column(t, "shard", t["shard"].cast(pa.string()).combine_chunks()), "should hold"),
    "a missing value": (lambda t: with_column(t, "length", pa.array([None, *t["length"].to_pylist()[1:]],
                                                                      pa.uint32())), "damaged|should hold"),
    "text": (lambda t: b'{"id": "a"}\n', "damaged"),
    "nothing": (lambda t: b"", "damaged"),
}  # fmt: skip


ROLES_CONTRADICTIONS = {
    "no such role": (recoded("role", lambda c: c + np.int8(8)), "damaged"),
    "negative role": (recoded("role", lambda c: c - np.int8(9)), "damaged"),
    "negative control: nothing": (recoded("role", lambda c: c), None),
    "names of others": (
        lambda t: with_column(t, "role", pa.DictionaryArray.from_arrays(
            t["role"].combine_chunks().indices, pa.array([*"abcdefghi"], pa.large_string()))),
        "should hold",
    ),
    "fewer rows": (lambda t: t.slice(0, 49), "roles of 49 images, but the index has 50"),
    "a column is missing": (lambda t: t.drop_columns(["key"]), "damaged|should hold"),
    "text": (lambda t: b'{"id": "a"}\n', "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("fault", ROLES_CONTRADICTIONS)
def test_roles_that_contradict_themselves_are_refused_though_their_digest_agrees(tmp_path, fault):
    found, files = samples()
    keep(Manifest(tmp_path, found, files), tmp_path)
    change, words = ROLES_CONTRADICTIONS[fault]
    vouched(tmp_path, change, "roles")
    with nullcontext() if words is None else pytest.raises(DataError, match=words):
        assert list(load(tmp_path).samples) == found


def test_a_request_of_another_index_and_a_changed_one_are_refused(tmp_path):
    found, files = samples()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        keep(Manifest(tmp_path / name, [replace(found[0], label=7 if name == "one" else 8), *found[1:]],
                      files), tmp_path / name)  # fmt: skip
    with pytest.raises(DataError, match="to the images of another index"):
        Manifest.load(tmp_path / "one", run=tmp_path / "two")
    flip(tmp_path / "one" / "roles.arrow")
    with pytest.raises(DataError, match=r"roles\.arrow does not have the sha256"):
        load(tmp_path / "one")
    (tmp_path / "two" / "request.json").write_text("{}")
    with pytest.raises(DataError, match=r"request\.json is damaged"):
        load(tmp_path / "two")
    with pytest.raises(DataError, match=r"request\.json cannot be read .*prepare the run first"):
        Manifest.load(tmp_path / "two", run=tmp_path)


@pytest.mark.parametrize("fault", CONTRADICTIONS)
def test_a_file_that_contradicts_itself_is_refused_though_its_digest_agrees(tmp_path, fault):
    found, files = samples()
    keep(Manifest(tmp_path, found, files), tmp_path)
    change, words = CONTRADICTIONS[fault]
    vouched(tmp_path, change)
    with nullcontext() if words is None else pytest.raises(DataError, match=words):
        assert list(load(tmp_path).samples) == found


def test_many_ids_are_refused_at_once_as_one_is():
    """The expression for columns against `check_id`, over ids put together from what matters."""
    parts = [
        "",
        ".",
        "..",
        "a",
        "\u00e9",
        "a.",
        "..a",
        "C:",
        "c:x",
        "\x00",
        "\x7f",
        "\x85",
        "\u2028",
        "\u202e",
        " ",
        "~",
    ]
    ids = {a + x + b + y + c for a in parts for x in ("", "/", "\\", "//") for b in parts for y in ("", "/", "\\")
           for c in parts}  # fmt: skip
    ids |= {"x" * 1024, "x" * 1025, "\u00e9" * 1024, "\u00e9" * 1025}
    ids = sorted(ids)
    assert len(ids) > 10_000

    def is_refused(sample_id: str) -> bool:
        try:
            check_id(sample_id, "here")
        except DataError:
            return True
        return False

    expected = [i for i in ids if is_refused(i)]
    assert refused(pa.array(ids, pa.large_string())) == expected and 1_000 < len(expected) < len(ids) - 1_000


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_id_that_is_there_twice_is_refused(tmp_path):
    found, files = samples()
    keep(Manifest(tmp_path, [*found[:-1], replace(found[-1], id=found[3].id)], files), tmp_path)
    with pytest.raises(DataError, match="twice"):
        load(tmp_path)


def test_a_version_of_the_future_is_refused(tmp_path):
    found, files = samples()
    keep(Manifest(tmp_path, found, files), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "version": 5}))
    with pytest.raises(DataError, match="version 5; expected 4"):
        load(tmp_path)


def test_what_does_not_fit_into_the_columns_is_refused(tmp_path):
    found, files = samples()
    for change in ({"length": 2**32}, {"label": 2**31}):
        with pytest.raises(DataError, match="4 GiB or more, or a label"):
            Manifest(tmp_path, [replace(found[0], **change)], files)


def test_shards_are_prepared_verified_and_purged(tmp_path, size):
    folder = tmp_path / "shards"
    made = prepare_shards(SMALL, 0, folder)
    made.save_request(tmp_path)
    found = Manifest.of_run(tmp_path)
    verify_shards(found, deep=True)
    shares = [slice(rank, None, 3) for rank in range(3)]
    damaged = folder / found.shards()[4]
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + b"x")
    seen = []
    for rank, share in enumerate(shares):  # every shard is in one rank's share
        with nullcontext() if rank != 1 else pytest.raises(DataError, match=damaged.name):
            verify_shards(found, deep=True, sizes=False, share=share)
            seen.append(rank)
    assert seen == [0, 2]
    damaged.write_bytes(content[:-1])
    verify_shards(found, deep=False, sizes=False)  # another process of the machine looks at lengths
    with pytest.raises(DataError, match=damaged.name):
        verify_shards(found, deep=False)
    damaged.write_bytes(content)
    assert made.fingerprint == found.fingerprint
    kept = {s.id: read_sample(found, s.id) for s in found.samples if s.role != "forget"}
    purge_shards(folder, found.ids("forget"))
    after = Manifest.of_run(tmp_path)
    assert {s.id: read_sample(after, s.id) for s in after.samples} == kept
    assert purged_before(folder).images == 10
    assert prepare_shards(SMALL, 0, tmp_path / "again").fingerprint == made.fingerprint


def test_a_sample_takes_96_bytes_and_its_id(tmp_path):
    """Beside names, heads and ends of columns; and a bit for each of label, hash and name where some are unknown."""
    sizes = {}
    for n in (8_000, 16_000):
        found, files = samples(n)
        keep(Manifest(tmp_path, found, files), tmp_path)
        sizes[n] = (tmp_path / "index.arrow").stat().st_size - sum(len(s.id.encode()) for s in found)
    assert sizes[16_000] - sizes[8_000] == pytest.approx(8_000 * (96 + 3 / 8), abs=64)
    assert sizes[8_000] < 8_000 * (96 + 3 / 8) + 6_000
