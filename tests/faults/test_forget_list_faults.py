"""Broken, contradictory, hostile and huge lists of images to forget, and copies that would keep the forgotten alive.

Every refusal is one sentence with exit code 3, and leaves nothing behind.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hostile_tars import heard, img2dataset, jpeg
from PIL import Image

from distunlearn.cli.main import main
from distunlearn.config.schema import DataConfig
from distunlearn.data.loading.verify import verify_shards
from distunlearn.data.manifest.ids import IdTable, normal_id
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.prepare.duplicates import near_copies, perceptual_hash
from distunlearn.data.prepare.forget_list import resolve_list
from distunlearn.data.prepare.write_shards import prepare_shards
from distunlearn.errors import DataError

TINY = ["data.members=40", "data.holdout=6", "data.calibration=4", "data.third_party=4", "data.third_party_audit=4",
        "data.samples_per_shard=20", "unlearn.retain_batch=8", "unlearn.forget_batch=4", "unlearn.third_party_batch=4",
        "unlearn.steps=20", "pretrain.batch=16", "runtime.threads=1"]  # fmt: skip
FOLDER = DataConfig(
    source="imagefolder", members=None, forget=8, holdout=6, calibration=4, third_party=4, third_party_audit=4,
    samples_per_shard=20,
)  # fmt: skip


def arguments(verb: str, out: Path, *extra: str, source: str = "digits") -> list[str]:
    return [verb, source, "--out", str(out), *[part for value in (*TINY, *extra) for part in ("--set", value)]]


def tree(folder: Path) -> list[str]:
    return sorted(str(p) for p in folder.rglob("*"))


def refusal(capsys, words: list[str], folder: Path, code: int = 3) -> str:
    """The one line of a refusal that ran nothing and wrote nothing below `folder`."""
    capsys.readouterr()
    before = tree(folder)
    with heard() as done:
        found = main(words)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert found == code, captured.err
    assert len(lines) == 1 and lines[0].startswith("error: ") and lines[0].isprintable(), captured.err
    assert captured.out == "" and not done and tree(folder) == before
    return lines[0]


def plan(capsys, words: list[str]) -> dict:
    capsys.readouterr()
    assert main(words) == 0
    return json.loads(capsys.readouterr().out)


def digits(*numbers: int) -> list[str]:
    return [f"digits/{number:06d}" for number in numbers]


def listed(folder: Path, ids: list[str], name: str = "list.txt") -> str:
    (folder / name).write_text("\n".join(ids) + "\n", encoding="utf-8")
    return f"data.forget={folder / name}"


def pictures(root: Path, count: int = 60) -> Path:
    for number in range(count):
        path = root / f"class{number % 2}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number, (64, 48)))
    return root


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
    summary = json.loads((out / "shards" / "summary.json").read_text())
    found = summary["info"]["forget_list"]
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


# -- copies ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def twins(tmp_path) -> tuple[Path, str]:
    """Pictures, of which the listed one has a copy under another name."""
    root = pictures(tmp_path / "images")
    shutil.copy(root / "class0" / "000.jpg", root / "class1" / "copy.jpg")
    return root, listed(tmp_path, ["class0/000.jpg", "class0/002.jpg"])


def of_folder(verb: str, out: Path, root: Path, *extra: str) -> list[str]:
    return [*arguments(verb, out, f"data.root={root}", "data.members=null", *extra), "--set", "data.source=imagefolder"]


def role_of(out: Path, sample_id: str) -> str:
    return Manifest.load(out / "shards").by_id[sample_id].role


def listed_ids(*ids: str) -> str:
    return "id,role\n" + "".join(f"{i}\n" for i in ids)


def test_f06_exact_copies_of_a_forgotten_image(twins, tmp_path, capsys):
    """The list itself says to retain the copy."""
    root, _ = twins
    path = tmp_path / "both.csv"
    path.write_text("id,role\nclass0/000.jpg,forget\nclass0/002.jpg,forget\nclass1/copy.jpg,retain\n")
    setting = f"data.forget={path}"
    message = refusal(capsys, of_folder("prepare", tmp_path / "run", root, setting), tmp_path)
    assert "'class0/000.jpg'" in message and "'class1/copy.jpg'" in message and "data.copies=forget" in message
    for policy, role in (("forget", "forget"), ("keep", "retain")):
        out = tmp_path / policy
        assert main(of_folder("prepare", out, root, setting, f"data.copies={policy}")) == 0
        assert "1 retained exact copies" in capsys.readouterr().out
        assert role_of(out, "class1/copy.jpg") == role and role_of(out, "class0/000.jpg") == "forget"
        assert role_of(out, "class0/004.jpg") != "forget"
        request = plan(capsys, of_folder("plan", out, root, setting, f"data.copies={policy}"))["request"]
        assert request["copies_in_retain"] == request["forget_with_copy_in_retain"] == 1
        assert request["copies_policy"] == policy
        assert main(of_folder("prepare", out, root, setting, f"data.copies={policy}")) == 0  # taken as they are
        message = refusal(capsys, of_folder("prepare", out, root, setting), tmp_path)
        assert "another selection" in message  # but not for a run that would have refused them


def test_f07_near_copies_are_counted(tmp_path, capsys):
    """Re-encoded and resized, of two of three forgotten pictures; the third has none."""
    root = pictures(tmp_path / "images")
    kept = ["class1/small.png", "class1/again.jpg"]
    for name, source, size in zip(kept, ("000", "002"), ((90, 70), (180, 140)), strict=True):
        photo(int(source)).save(root / "class0" / f"{source}.jpg", quality=90)
        Image.open(root / "class0" / f"{source}.jpg").resize(size).save(root / name)
    path = tmp_path / "near.csv"
    gone = "class0/000.jpg,forget\nclass0/002.jpg,forget\nclass0/004.jpg,forget\n"
    path.write_text("id,role\n" + gone + "".join(f"{name},retain\n" for name in kept))
    assert len({(root / name).read_bytes() for name in (*kept, "class0/000.jpg", "class0/002.jpg")}) == 4  # no copies
    out = tmp_path / "run"
    assert main(of_folder("prepare", out, root, f"data.forget={path}")) == 0
    assert "2 retained near-copies of 2 images to forget" in capsys.readouterr().out
    request = plan(capsys, of_folder("plan", out, root, f"data.forget={path}"))["request"]
    assert request["near_copies"] == {"distance": 4, "forget": 2, "retain": 2} and request["copies_in_retain"] == 0
    other = tmp_path / "none"
    assert main(of_folder("prepare", other, root, f"data.forget={path}", "data.near_distance=null")) == 0
    assert "near-copies" not in capsys.readouterr().out


def photo(seed: int) -> Image.Image:
    """Smooth areas, edges and a little grain, another for every seed."""
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    smooth = np.asarray(blocks.resize((180, 140), Image.Resampling.BICUBIC))
    return Image.fromarray(np.clip(smooth + rng.normal(0, 6, (140, 180, 3)), 0, 255).astype(np.uint8))


def hashed(image: Image.Image, kind: str = "PNG", **how) -> int:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return perceptual_hash(buffer.getvalue(), "x", 10**7)


def test_perceptual_hashes_stay_for_copies_and_differ_for_others():
    """Over 40 pictures: a copy is nearly always within 4 bits, another picture never within 10."""
    first = [hashed(photo(seed)) for seed in range(40)]
    changed = {
        "jpeg": lambda image: hashed(image, "JPEG", quality=75),
        "webp": lambda image: hashed(image, "WEBP", quality=75),
        "half": lambda image: hashed(image.resize((90, 70))),
        "brighter": lambda image: hashed(image.point(lambda value: value * 0.9 + 20)),
    }
    for name, change in changed.items():
        bits = [bin(a ^ change(photo(seed))).count("1") for seed, a in enumerate(first)]
        assert sum(b <= 4 for b in bits) >= 36, (name, bits)
    apart = [bin(a ^ b).count("1") for k, a in enumerate(first) for b in first[:k]]
    assert min(apart) > 10 and 28 < np.mean(apart) < 36
    assert hashed(Image.new("RGB", (50, 50), (9, 9, 9))) == hashed(Image.new("L", (30, 20), 200))  # flat: no bits drawn


@pytest.mark.parametrize("distance", [0, 1, 4, 16])
def test_near_copies_equal_a_comparison_of_all_pairs(distance):
    rng = np.random.default_rng(distance)
    forget = rng.integers(0, 2**63, 60, dtype=np.uint64)
    retain = np.concatenate([forget[:30], rng.integers(0, 2**63, 200, dtype=np.uint64)])
    for row in range(30):  # up to 20 bits changed
        for bit in rng.choice(64, row * 2 // 3, replace=False):
            retain[row] ^= np.uint64(1) << np.uint64(bit)
    apart = np.array([[bin(int(a) ^ int(b)).count("1") for b in retain] for a in forget])
    near_forget, near_retain = near_copies(forget, retain, distance)
    assert (near_forget == (apart <= distance).any(1)).all() and (near_retain == (apart <= distance).any(0)).all()
    assert 0 < near_forget.sum() < 60
    assert near_copies(forget[:0], retain, distance)[1].sum() == 0 == near_copies(forget, retain[:0], distance)[0].sum()


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
        assert "has changed since the shards" in message and "list.txt" in message
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
    assert not done and set(Manifest.load(out / "shards").ids("forget")) == set(names)
    assert not any(name.encode() in (out / "shards" / "summary.json").read_bytes() for name in names)
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
    assert set(Manifest.load(out / "shards").ids("forget")) == {name, "class0/000.jpg"}
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
    words = ["index", str(folder), *arguments("", Path(), setting)[4:]]
    assert "nobody" in refusal(capsys, words, tmp_path)
    assert main([*words, "--set", "data.allow_missing=true"]) == 0
    assert [path.read_bytes() for path in paths] == before
    manifest = Manifest.load(folder)
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
