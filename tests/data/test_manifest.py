"""The manifest says what it was made of, refuses what contradicts itself, is searched in place; others can read it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
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
            rng.bytes(32).hex(), module.CODES[k % len(module.CODES)], None if k % 3 else k,
        )
        for k in range(n)
    ]  # fmt: skip
    counts = [sum(s.shard == name for s in found) for name in names]
    return found, {name: Shard(10**6, "ab" * 32, count) for name, count in zip(names, counts, strict=True)}


@pytest.fixture(params=["objects", "views"])
def size(request, monkeypatch) -> str:
    """How samples are handed out: as objects that are kept, or, as a large manifest does, made when asked for."""
    monkeypatch.setattr(module, "SMALL", 10**6 if request.param == "objects" else 0)
    return request.param


def test_a_manifest_says_what_it_was_made_of(tmp_path, size):
    found, files = samples()
    Manifest(tmp_path, found, files, {"a": 1}).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.arrow", "summary.json"}
    for manifest in (Manifest(tmp_path, found, files), Manifest.load(tmp_path)):
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
            assert [chosen.shards[k] for k in chosen.shard_of] == [s.shard for s in wanted]
            assert chosen.ids[2] == wanted[2].id and chosen.ids[1:3] == [s.id for s in wanted[1:3]]
        labels = [-1 if s.label is None else s.label for s in found]
        assert manifest.labels([s.id for s in found]).tolist() == labels
        assert manifest.count_roles() == {role: sum(s.role == role for s in found) for role in module.CODES}


def test_pandas_and_arrow_read_what_the_manifest_says(tmp_path):
    """Readers that know nothing of this package; the second maps the file."""
    found, files = samples()
    Manifest(tmp_path, found, files).save(tmp_path)
    table = pandas.read_feather(tmp_path / "manifest.arrow")
    for name in ("id", "shard", "offset", "length", "role"):
        assert table[name].tolist() == [getattr(s, name) for s in found], name
    assert [digest.hex() for digest in table["sha256"]] == [s.sha256 for s in found]
    assert [None if pandas.isna(label) else label for label in table["label"]] == [s.label for s in found]
    assert table.groupby("role", observed=True).size().to_dict() == Manifest.load(tmp_path).count_roles()
    with pa.memory_map(str(tmp_path / "manifest.arrow")) as file:
        mapped = pa.ipc.open_file(file).read_all()
        assert mapped.filter(pc.equal(mapped["role"], "forget"))["id"].to_pylist() == [
            s.id for s in found if s.role == "forget"
        ]
    index = {name: table[name].tolist() for name in ("hash", "hash_row")}
    assert index["hash"] == sorted(index["hash"]) and sorted(index["hash_row"]) == list(range(50))
    for value, row in zip(*index.values(), strict=True):
        digest = hashlib.blake2b(unicodedata.normalize("NFC", found[row].id).encode(), digest_size=8).digest()
        assert value == int.from_bytes(digest, "little")


def test_a_saved_manifest_has_the_fingerprint_it_had_before(tmp_path):
    found, files = samples()
    made = Manifest(tmp_path, found, files)
    before = made.fingerprint
    made.save(tmp_path)
    assert Manifest.load(tmp_path).fingerprint == before == digest(tmp_path / "manifest.arrow")
    assert Manifest(tmp_path, [replace(found[0], label=9), *found[1:]], files).fingerprint != before


def test_a_manifest_has_the_same_bytes_whenever_and_by_whichever_arrow_it_is_written(tmp_path):
    """A stated digest: shards are told apart by it, so a new version of pyarrow may not change it unnoticed."""
    found, files = samples()
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        Manifest(folder, found, files).save(folder)
    assert (tmp_path / "one/manifest.arrow").read_bytes() == (tmp_path / "two/manifest.arrow").read_bytes()
    assert digest(tmp_path / "one/manifest.arrow") == (
        "58aba01d59d274896f7557ccd47be0ffb60106631d129ee18e1bb82307cdcf4a"
    )


FILE_DAMAGE = {
    "a byte": (lambda f: flip(f), "manifest.arrow does not have the sha256"),
    "cut": (lambda f: os.truncate(f, 300), "manifest.arrow does not have the sha256"),
    "gone": (lambda f: f.unlink(), "manifest.arrow cannot be read"),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", FILE_DAMAGE)
def test_a_damaged_file_is_refused(tmp_path, damage):
    found, files = samples()
    Manifest(tmp_path, found, files).save(tmp_path)
    assert len(Manifest.load(tmp_path)) == 50
    change, words = FILE_DAMAGE[damage]
    change(tmp_path / "manifest.arrow")
    with pytest.raises(DataError, match=words):
        Manifest.load(tmp_path)


def vouched(folder: Path, change: Callable[[pa.Table], pa.Table | bytes]) -> None:
    """Change the file of a saved manifest and let the summary vouch for it, as a program with an error would."""
    path = folder / "manifest.arrow"
    made = change(pa.ipc.open_file(path.read_bytes()).read_all())
    if isinstance(made, bytes):
        path.write_bytes(made)
    else:
        with pa.ipc.new_file(str(path), made.schema) as writer:
            writer.write_table(made)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"manifest_sha256": digest(path)}))


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
    "no such role": (recoded("role", lambda c: c + np.int8(7)), "damaged"),
    "negative role": (recoded("role", lambda c: c - np.int8(9)), "damaged"),
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
    "names of others": (
        lambda t: with_column(t, "role", pa.DictionaryArray.from_arrays(
            t["role"].combine_chunks().indices, pa.array([*"abcdefgh"], pa.large_string()))),
        "other shards or roles",
    ),
    "a missing value": (lambda t: with_column(t, "length", pa.array([None, *t["length"].to_pylist()[1:]],
                                                                      pa.uint32())), "damaged|should hold"),
    "text": (lambda t: b'{"id": "a"}\n', "damaged"),
    "nothing": (lambda t: b"", "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("fault", CONTRADICTIONS)
def test_a_file_that_contradicts_itself_is_refused_though_its_digest_agrees(tmp_path, fault):
    found, files = samples()
    Manifest(tmp_path, found, files).save(tmp_path)
    change, words = CONTRADICTIONS[fault]
    vouched(tmp_path, change)
    with nullcontext() if words is None else pytest.raises(DataError, match=words):
        assert list(Manifest.load(tmp_path).samples) == found


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
    Manifest(tmp_path, [*found[:-1], replace(found[-1], id=found[3].id)], files).save(tmp_path)
    with pytest.raises(DataError, match="twice"):
        Manifest.load(tmp_path)


def test_a_version_of_the_future_is_refused(tmp_path):
    found, files = samples()
    Manifest(tmp_path, found, files).save(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "version": 4}))
    with pytest.raises(DataError, match="version 4; expected 3"):
        Manifest.load(tmp_path)


def test_what_does_not_fit_into_the_columns_is_refused(tmp_path):
    found, files = samples()
    for change in ({"length": 2**32}, {"label": 2**31}):
        with pytest.raises(DataError, match="4 GiB or more, or a label"):
            Manifest(tmp_path, [replace(found[0], **change)], files)


def test_shards_are_prepared_verified_and_purged(tmp_path, size):
    folder = tmp_path / "shards"
    made = prepare_shards(SMALL, 0, folder)
    found = Manifest.load(folder)
    verify_shards(found, deep=True)
    assert made.fingerprint == found.fingerprint
    kept = {s.id: read_sample(found, s.id) for s in found.samples if s.role != "forget"}
    purge_shards(folder, found.ids("forget"))
    after = Manifest.load(folder)
    assert {s.id: read_sample(after, s.id) for s in after.samples} == kept
    assert purged_before(folder).images == 10
    assert prepare_shards(SMALL, 0, tmp_path / "again").fingerprint == made.fingerprint


def test_a_sample_takes_73_bytes_and_its_id(tmp_path):
    """Beside names, heads and ends of columns; and a bit where labels are unknown."""
    sizes = {}
    for n in (8_000, 16_000):
        found, files = samples(n)
        Manifest(tmp_path, found, files).save(tmp_path)
        sizes[n] = (tmp_path / "manifest.arrow").stat().st_size - sum(len(s.id.encode()) for s in found)
    assert sizes[16_000] - sizes[8_000] == pytest.approx(8_000 * (73 + 1 / 8), abs=64)
    assert sizes[8_000] < 8_000 * (73 + 1 / 8) + 6_000


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
