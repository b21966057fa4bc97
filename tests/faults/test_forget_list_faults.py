"""Broken, contradictory, hostile and huge lists of images to forget, and copies that would keep the forgotten alive.

Every refusal is one sentence with exit code 3, and leaves nothing behind.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hostile_tars import heard, img2dataset, jpeg
from lists import FOLDER, arguments, digits, listed, of_folder, pictures, plan, refusal

from distunlearn.cli.main import main
from distunlearn.data.loading.verify import verify_shards
from distunlearn.data.manifest.ids import IdTable, normal_id
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.prepare.forget_list import resolve_list
from distunlearn.data.prepare.write_shards import prepare_shards
from distunlearn.errors import DataError

# -- what a list asks for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "\n\n", "# nobody\n"])
def test_f01_a_list_of_nobody(tmp_path, capsys, content):
    (tmp_path / "list.txt").write_text(content)
    message = refusal(capsys, arguments("run", tmp_path / "run", f"data.forget={tmp_path / 'list.txt'}"), tmp_path)
    assert "nothing to forget" in message and "list.txt" in message


def test_f02_ids_that_no_image_has(tmp_path, capsys):
    missing = [f"nobody/{number}" for number in range(8)]
    setting = listed(tmp_path, [*digits(1, 2, 3), *missing, missing[0]])
    message = refusal(capsys, arguments("run", tmp_path / "run", setting), tmp_path)
    assert "8 ids ('nobody/0', 'nobody/1'" in message and "..." in message and "data.allow_missing=true" in message
    out = tmp_path / "run"
    words = arguments("prepare", out, setting, "data.allow_missing=true")
    capsys.readouterr()
    assert main(words) == 0
    assert "8 listed ids left out" in capsys.readouterr().out
    summary = json.loads((out / "request.json").read_text())
    found = summary["facts"]["forget_list"]
    assert summary["roles"]["forget"] == 3 and found["missing_ids"] == missing
    assert (found["entries"], found["forget"], found["missing"], found["duplicates"]) == (12, 3, 8, 1)
    request = plan(capsys, arguments("plan", out, setting, "data.allow_missing=true"))["request"]
    assert request["forget_list"]["missing"] == 8 and "nobody" not in json.dumps(request)


def test_f03_one_image_listed_in_many_ways_is_one_image(tmp_path, capsys):
    ways = ["digits/000001", "digits/000001", "./digits/000001", "digits//000001", "digits\\000001", "digits/000002"]
    found = plan(capsys, arguments("plan", tmp_path / "run", listed(tmp_path, ways)))
    assert found["roles"]["forget"] == 2
    assert {k: found["request"]["forget_list"][k] for k in ("entries", "forget", "duplicates", "missing")} == {
        "entries": 6, "forget": 2, "duplicates": 4, "missing": 0,
    }  # fmt: skip


def test_f04_a_list_of_nearly_everybody(tmp_path, capsys):
    setting = listed(tmp_path, digits(*range(21)))
    message = refusal(capsys, arguments("run", tmp_path / "run", setting), tmp_path)
    assert "21 of 40 members" in message and "data.max_forget_share" in message
    found = plan(capsys, arguments("plan", tmp_path / "run", setting, "data.max_forget_share=0.6"))
    assert found["roles"]["forget"] == 21 and found["request"]["forget_share"] == 0.525
    message = refusal(
        capsys,
        arguments("run", tmp_path / "run", listed(tmp_path, digits(*range(40))), "data.max_forget_share=1"),
        tmp_path,
    )
    assert "at least 2 must be retained" in message


def test_f04_a_list_that_covers_a_class_is_noted(tmp_path, capsys):
    pictures(tmp_path / "images")
    cfg = [f"data.root={tmp_path / 'images'}", "data.members=null", "data.max_forget_share=0.9"]
    ones = [f"class1/{number:03d}.jpg" for number in range(1, 60, 2)]
    out = tmp_path / "run"
    words = arguments("plan", out, *cfg, listed(tmp_path, ones), source="digits")
    found = plan(capsys, [*words, "--set", "data.source=imagefolder"])
    assert found["request"]["whole_classes"] == ["class1"] and found["roles"]["forget"] == 30
    words = arguments("plan", out, *cfg, listed(tmp_path, ones[1:]), source="digits")
    assert plan(capsys, [*words, "--set", "data.source=imagefolder"])["request"]["whole_classes"] == []


def test_f05_an_id_to_forget_and_to_retain(tmp_path, capsys):
    """Even if it is spelled in two ways."""
    path = tmp_path / "list.csv"
    path.write_text("id,role\ndigits/000001,forget\ndigits/000002,forget\n./digits/000001,retain\n")
    message = refusal(capsys, arguments("run", tmp_path / "run", f"data.forget={path}"), tmp_path)
    assert "1 id ('digits/000001') both to forget and to retain" in message


# -- the list as a file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", ["another id", "a comment"])
def test_f08_a_list_edited_after_the_shards_were_made(tmp_path, capsys, edit):
    """By its digest: an edit that selects the same images is not what was asked for either."""
    out, setting = tmp_path / "run", listed(tmp_path, digits(1, 2, 3))
    assert main(arguments("prepare", out, setting)) == 0
    assert plan(capsys, arguments("plan", out, setting))["roles"]["forget"] == 3
    listed(tmp_path, digits(1, 2, 4) if edit == "another id" else ["# x", *digits(1, 2, 3)])
    for verb in ("plan", "prepare", "pretrain"):
        message = refusal(capsys, arguments(verb, out, setting), tmp_path)
        assert "has changed since the request" in message and "list.txt" in message
    listed(tmp_path, digits(1, 2, 3))
    assert main(arguments("plan", out, setting)) == 0


def test_f09_a_million_ids_in_bounded_memory(tmp_path):
    """Half a million listed twice, one missing: what is kept of the list is less than 40 bytes an id."""
    code = """
import resource, sys, time
from distunlearn.data.prepare.forget_list import resolve_list
from distunlearn.data.prepare.forget_list import LOOKED_UP
from distunlearn.data.manifest.ids import IdTable
n = 500_000
table = IdTable.of(f"train/{i:09d}.jpg" for i in range(n))
table.index()
table.find([f"train/{i:09d}.jpg" for i in range(LOOKED_UP)])  # as much as is looked up at a time
import gc; gc.collect()
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
found = resolve_list(sys.argv[1], table, allow_missing=True)
print(len(found.forget), found.entries, found.num_missing, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before,
      time.monotonic() - began)
"""
    path = tmp_path / "list.txt"
    with path.open("w") as handle:
        for number in range(1_000_000):
            handle.write(f"train/{number % 500_000:09d}.jpg\n")
        handle.write("nobody\n")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    forget, entries, missing, more, seconds = done.stdout.split()
    assert (int(forget), int(entries), int(missing)) == (500_000, 1_000_001, 1)
    assert int(more) < 40_000, "KiB beyond one chunk of look-ups"
    assert float(seconds) < 120


HOSTILE = ["=cmd()|' /C calc'!A0", "<img src=x onerror=alert(1)>", "+1+1", "@SUM(1)", "{{7*7}}", "a\u202egpj.exe"]


def test_f10_ids_that_are_formulas_markup_or_control_stay_text(tmp_path, capsys):
    """As names of files and in the list: kept as they are in the manifest, escaped wherever people look."""
    root = pictures(tmp_path / "images")
    names = [f"class0/{number}{name.replace('/', ' ')}.jpg" for number, name in enumerate(HOSTILE)]
    for number, name in enumerate(names):
        (root / name).write_bytes(jpeg(700 + number))
    setting = listed(tmp_path, names)
    out = tmp_path / "run"
    with heard() as done:
        assert main(of_folder("prepare", out, root, setting)) == 0
    assert not done and set(Manifest.of_run(out).ids("forget")) == set(names)
    assert not any(name.encode() in (out / "request.json").read_bytes() for name in names)
    said = capsys.readouterr()
    assert said.err == "" and (said.out.rstrip("\n")).isprintable()
    for name in [*names, "\x1b[31mred"]:
        setting = listed(tmp_path, [name + "x"])
        message = refusal(capsys, of_folder("prepare", tmp_path / "other", root, setting), tmp_path)
        assert "\u202e" not in message and "\x1b" not in message


@pytest.mark.parametrize(
    "bad", ["../../etc/passwd", "/etc/passwd", "a/../../b", "C:\\x", "\\\\h\\x", "a\x00b", ".", "./"]
)
def test_f11_an_id_that_is_a_path_out_of_the_folder(tmp_path, capsys, bad):
    path = tmp_path / "list.txt"
    path.write_bytes(b"digits/000001\n" + bad.encode() + b"\n")
    message = refusal(capsys, arguments("run", tmp_path / "run", f"data.forget={path}"), tmp_path)
    assert "line 2" in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("list.csv", b"name,role\na,forget\n", "line 1"),
        ("list.csv", b"id,role\ndigits/000001,forget\ndigits/000002\n", "line 3 has 1 fields"),
        ("list.csv", b"id\n" + b"x" * 70_000 + b"\n", "line 2 is longer than"),
        ("list.csv", b'id\n"digits/000001\n', "line 2 is not valid csv"),
        ("list.txt", gzip.compress(b"digits/000001\n" * 100_000), "not UTF-8 at byte 1"),
        ("list.jsonl", b'{"id": "digits/000001"}\n{"id": 5}\n', "line 2"),
    ],
    ids=["no header", "ragged", "huge field", "open quote", "gzip bomb", "number as id"],
)
def test_f12_a_malformed_file_is_refused_with_its_line(tmp_path, capsys, name, content, words):
    (tmp_path / name).write_bytes(content)
    message = refusal(capsys, arguments("run", tmp_path / "run", f"data.forget={tmp_path / name}"), tmp_path)
    assert words in message and name in message


def test_f12_a_file_without_a_line_end_is_never_read_as_a_whole(tmp_path, capsys):
    """Two gigabytes of nothing (a sparse file), refused at its first line; a compressed file is not unpacked."""
    with (tmp_path / "list.txt").open("wb") as handle:
        handle.truncate(2 << 30)
    words = arguments("run", tmp_path / "run", f"data.forget={tmp_path / 'list.txt'}")
    assert "line 1 is longer than 65536 bytes" in refusal(capsys, words, tmp_path)
    (tmp_path / "list.csv.gz").write_bytes(gzip.compress(b"id\n"))
    words = arguments("run", tmp_path / "run", f"data.forget={tmp_path / 'list.csv.gz'}")
    assert ".csv" in refusal(capsys, words, tmp_path, code=2)


# -- one image, many spellings ---------------------------------------------------------------------------------------


def test_f13_unicode_form_and_slashes_do_not_matter_and_case_does(tmp_path, capsys):
    root = pictures(tmp_path / "images")
    name = unicodedata.normalize("NFD", "class0/caf\u00e9 \u1e9b\u0323.jpg")
    (root / name).write_bytes(jpeg(800))
    (root / "class0" / "UPPER.jpg").write_bytes(jpeg(801))
    other = unicodedata.normalize("NFC", name).replace("/", "\\")
    assert other != name  # the fault: a comparison of characters finds nothing
    out = tmp_path / "run"
    setting = listed(tmp_path, [other, "class0/000.jpg"])
    assert main(of_folder("prepare", out, root, setting)) == 0
    assert set(Manifest.of_run(out).ids("forget")) == {name, "class0/000.jpg"}
    setting = listed(tmp_path, ["class0/upper.jpg"])
    message = refusal(capsys, of_folder("prepare", tmp_path / "no", root, setting), tmp_path)
    assert "'class0/UPPER.jpg' differs only in case" in message


def test_f13_a_spelling_that_two_images_share_is_refused(tmp_path, capsys):
    root = pictures(tmp_path / "images")
    forms = [unicodedata.normalize(form, "class0/caf\u00e9.jpg") for form in ("NFC", "NFD")]
    for number, name in enumerate(forms):
        (root / name).write_bytes(jpeg(810 + number))
    out = tmp_path / "run"
    for name in forms:
        message = refusal(capsys, of_folder("prepare", out, root, listed(tmp_path, [name])), tmp_path)
        assert "may mean" in message and "rename one" in message
    assert main(of_folder("prepare", out, root, listed(tmp_path, ["class0/000.jpg"]))) == 0  # nobody asked for either


def test_normal_ids():
    assert normal_id("a\\b//./c/") == "a/b/c" == normal_id("a/b/c")
    assert normal_id("\u212b") == "\u00c5" == normal_id("A\u030a") and normal_id("\ufb01") == "\ufb01"  # NFC, not NFKC
    plain = [f"x/{i}.jpg" for i in range(300)] + ["a b", "..a", "a.", "a/.b", "~x"]
    assert [normal_id(i) for i in plain] == plain


def test_look_ups_agree_with_a_dictionary():
    rng = np.random.default_rng(0)
    ids = list(dict.fromkeys(f"{'é' * (k % 3)}{rng.integers(0, 10**6)}/{k}" for k in range(5_000)))
    table, oracle = IdTable.of(ids), {i: k for k, i in enumerate(ids)}
    asked = [ids[k] for k in rng.integers(0, len(ids), 3_000)] + [f"no/{k}" for k in range(500)]
    assert table.find(asked).tolist() == [oracle.get(i, -1) for i in asked]
    assert table.find([]).tolist() == [] and IdTable.of([]).find(["x"]).tolist() == [-1]


def test_ids_of_one_hash_are_told_apart(tmp_path, monkeypatch):
    """With a hash of two values nearly all of them collide."""
    from distunlearn.data.manifest import ids as module

    names = [f"a/{k}" for k in range(60)]
    monkeypatch.setattr(module, "hash_ids", lambda ids: np.array([len(i) % 2 for i in ids], dtype=np.uint64))
    table = IdTable.of(names)
    assert table.find([*names[::-1], "a/99"]).tolist() == [*range(59, -1, -1), -1]
    (tmp_path / "list.txt").write_text("\n".join(names[10:20]))
    assert resolve_list(tmp_path / "list.txt", table).forget.tolist() == list(range(10, 20))


# -- through an index ------------------------------------------------------------------------------------------------


def test_a_list_decides_the_roles_of_indexed_shards_too(tmp_path, capsys):
    folder = tmp_path / "shards"
    paths = img2dataset(folder)
    before = [path.read_bytes() for path in paths]
    setting = listed(tmp_path, ["000000003", "000010004", "nobody"])
    assert main(["index", str(folder)]) == 0
    use = arguments("", Path(), setting, "data.source=webdataset", f"data.root={folder}", f"data.shards={folder}")
    words = ["prepare", "digits", "--out", str(tmp_path / "run"), *use[4:]]
    assert "nobody" in refusal(capsys, words, tmp_path)
    assert main([*words, "--set", "data.allow_missing=true"]) == 0
    assert [path.read_bytes() for path in paths] == before
    manifest = Manifest.load(folder, run=tmp_path / "run")
    verify_shards(manifest, deep=True)
    assert set(manifest.ids("forget")) == {"000000003", "000010004"} and len(manifest) == 60
    assert manifest.count_roles()["unused"] == 60 - 40 - 18


def test_a_resumed_selection_with_a_list_is_the_same(tmp_path):
    """Negative control of the refusals: what is given again as it was is taken as it is."""
    root = pictures(tmp_path / "images")
    (tmp_path / "list.txt").write_text("class0/000.jpg\n")
    cfg = replace(FOLDER, root=str(root), forget=str(tmp_path / "list.txt"))
    first = prepare_shards(cfg, 0, tmp_path / "shards").fingerprint
    assert prepare_shards(cfg, 0, tmp_path / "shards").fingerprint == first
    (tmp_path / "list.txt").write_text("class0/002.jpg\n")
    with pytest.raises(DataError, match="another selection"):
        prepare_shards(cfg, 0, tmp_path / "shards")
