"""Lists of images as people write them: read right, or refused with all their faults in one answer."""

from __future__ import annotations

import hashlib
import re
import time
import unicodedata

import pytest

from distunlearn.data.manifest.ids import IdTable
from distunlearn.data.prepare import forget_list
from distunlearn.data.prepare.forget_list import resolve_list
from distunlearn.errors import DataError

CAFE = "a/caf\u00e9.png"
IDS = ["a/1.png", "a/2.png", "b/1.png", "b/3.png", "#sun/1.png", CAFE, "b/x y.png", "a/4,5.png"]


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, ids=IDS, **how):
    table = IdTable.of(ids)
    found = resolve_list(path, table, **how)
    return {role: table.at(rows) for role, rows in found.rows.items() if len(rows)}, found


# name of the file, its content, settings, what is to be forgotten (or all roles), a part of what was understood
FORMS = {
    "lines": ("l.txt", "a/1.png\nb/3.png\n", {}, ["a/1.png", "b/3.png"], "one id a line, UTF-8"),
    "no last line end, blank lines, spaces": ("l.TXT", "\n  a/1.png\t\n\nb/3.png", {}, ["a/1.png", "b/3.png"], "line"),
    "mark and CRLF": ("l.txt", "\ufeffa/1.png\r\nb/3.png\r\n", {}, ["a/1.png", "b/3.png"], "UTF-8"),
    "old Mac line ends": ("l.txt", "a/1.png\rb/3.png\r", {}, ["a/1.png", "b/3.png"], "line"),
    "UTF-16 by its mark": ("l.txt", "a/1.png\nb/3.png\n".encode("utf-16"), {}, ["a/1.png", "b/3.png"], "UTF-16"),
    "UTF-16 big-endian, no mark": ("l.txt", "a/1.png\n".encode("utf-16-be"), {}, ["a/1.png"], "UTF-16-BE"),
    "UTF-16 little-endian, no mark": ("l.txt", "a/1.png\n".encode("utf-16-le"), {}, ["a/1.png"], "UTF-16-LE"),
    "UTF-32": ("l.txt", "a/1.png\n".encode("utf-32"), {}, ["a/1.png"], "UTF-32"),
    "comment, and an image that begins with #": (
        "l.txt", "# wishes of May\n#sun/1.png\na/1.png\n", {}, ["#sun/1.png", "a/1.png"], "1 comment lines skipped"),
    "twice": ("l.txt", "a/1.png\na/1.png\n./a//1.png\n", {}, ["a/1.png"], "line"),
    "backslashes": ("l.txt", "a\\1.png\nb\\3.png\n", {}, ["a/1.png", "b/3.png"], "line"),
    "leading ./": ("l.txt", "./a/1.png\n", {}, ["a/1.png"], "line"),
    "NFD": ("l.txt", unicodedata.normalize("NFD", CAFE), {}, [CAFE], "line"),
    "NFC": ("l.txt", unicodedata.normalize("NFC", CAFE), {}, [CAFE], "line"),
    "absolute, below the root": ("l.txt", "/data/p/a/1.png\n", {"root": "/data/p"}, ["a/1.png"], "root taken off 1"),
    "absolute and not": ("l.txt", "/data/p/a/1.png\nb/3.png", {"root": "/data/p/"}, ["a/1.png", "b/3.png"], "root"),
    "file URLs": ("l.txt", "file:///data/p/b/x%20y.png\n", {"root": "/data/p"}, ["b/x y.png"], "root taken off 1"),
    "Windows, below the root": ("l.txt", "C:\\p\\a\\1.png\n", {"root": "C:\\p"}, ["a/1.png"], "root taken off 1"),
    "a folder before all": ("l.txt", "photos/a/1.png\nphotos/b/3.png\n", {}, ["a/1.png", "b/3.png"], "'photos/' taken"),
    "several folders before all": ("l.txt", "/mnt/nas/photos/a/1.png\n", {}, ["a/1.png"], "'mnt/nas/photos/' taken"),
    "a drive before all": ("l.txt", "D:\\pics\\a\\1.png\n", {}, ["a/1.png"], "'D:/pics/' taken off 1"),
    "names of files alone": ("l.txt", "2.png\n3.png\n", {}, ["a/2.png", "b/3.png"], "names of files alone, for 2"),
    "comma": ("l.csv", "id,role\na/1.png,forget\nb/3.png,\n", {}, ["a/1.png", "b/3.png"], "comma-separated, UTF-8"),
    "semicolon": ("l.csv", "Name;File\nx;a/1.png\ny;b/3.png\n", {}, ["a/1.png", "b/3.png"], "semicolon"),
    "tab": ("l.csv", "name\tpath\nx\ta/1.png\n", {}, ["a/1.png"], "tab-separated, UTF-8, column 'path'"),
    "tsv": ("l.tsv", "image_path\tage\na/1.png\t7\n", {}, ["a/1.png"], "tab"),
    "tab in a txt": ("l.txt", "name\tFile Name\nx\ta/1.png\n", {}, ["a/1.png"], "column 'File Name'"),
    "bar": ("l.csv", "name|image\nx|a/1.png\n", {}, ["a/1.png"], "bar-separated"),
    "sep= of spreadsheets": ("l.csv", "sep=;\nfile;n\na/1.png;1,5\n", {}, ["a/1.png"], "semicolon"),
    "UTF-16 with tabs, as spreadsheets export": (
        "l.txt", "File\tn\r\na/1.png\t1\r\n".encode("utf-16"), {}, ["a/1.png"], "tab-separated, UTF-16"),
    "quotes and commas": ("l.csv", 'n,id\n"y, z","a/4,5.png"\n', {}, ["a/4,5.png"], "comma"),
    "trailing empty cells and rows": ("l.csv", "id,n\na/1.png,1,,\n,\n\n", {}, ["a/1.png"], "comma"),
    "no header": ("l.csv", "a/1.png\nb/3.png\n", {}, ["a/1.png", "b/3.png"], "column 1 (there is no header)"),
    "no header, second column": ("l.csv", "7;a/1.png\n8;b/3.png\n", {}, ["a/1.png", "b/3.png"], "column 2"),
    "number and file": ("l.csv", "id,file\n1,a/1.png\n2,b/3.png\n", {}, ["a/1.png", "b/3.png"], "column 'file'"),
    "named column": (
        "l.csv", "id,who\nb/3.png,a/1.png\n", {"column": "who"}, ["a/1.png"], "column 'who'"),
    "named column, otherwise spelt": (
        "l.csv", "n;Mein Bild\n1;a/1.png\n", {"column": "mein bild"}, ["a/1.png"], "Mein Bild"),
    "roles": (
        "l.csv", "id,role\na/1.png,forget\na/2.png,retain\nb/1.png,non-member\nb/3.png,Holdout\n", {},
        {"forget": ["a/1.png"], "retain": ["a/2.png"], "non_member": ["b/1.png"], "holdout": ["b/3.png"]}, "roles"),
    "objects": (
        "l.jsonl", '{"id": "a/1.png"}\n\n{"id": "b/3.png", "role": null}\n', {}, ["a/1.png", "b/3.png"], "'id'"),
    "objects of Hugging Face": ("l.jsonl", '{"file_name": "a/1.png", "n": 1}\n', {}, ["a/1.png"], "'file_name'"),
    "markup and formulas": ("l.txt", "a/1.png\n", {"ids": ["=cmd()", "a/1.png"]}, ["a/1.png"], "line"),
    "gone, which is allowed": ("l.txt", "a/1.png\ngone.png\n", {"allow_missing": True}, ["a/1.png"], "line"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_list_is_read_right(tmp_path, form):
    name, content, how, expected, understood = FORMS[form]
    roles, found = read(write(tmp_path, name, content), **how)
    assert roles == ({"forget": expected} if isinstance(expected, list) else expected)
    assert understood in found.understood and found.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_as_many_forms_as_were_promised():
    assert len(FORMS) >= 40


@pytest.mark.parametrize(
    ("by", "content", "expected"),
    [
        ("url", "url;who\nhttps://x.org/1.jpg?a=1;me\n", ["p0", "p2"]),  # two images came from one address
        ("url", "https://x.org/3.jpg\n", ["p3"]),
        ("key", "000000003\n", ["p3"]),
        ("sha256", f"{'ab' * 32}\n{'cd' * 32}\n", ["p1", "p3"]),
    ],
)
def test_images_named_by_url_key_or_digest(tmp_path, by, content, expected):
    names = {
        "url": [["https://x.org/1.jpg?a=1"], [], ["https://x.org/1.jpg?a=1"], ["https://x.org/3.jpg"]],
        "key": [["000000000"], ["000000001"], ["000000002"], ["000000003"]],
        "sha256": [["00" * 32], ["ab" * 32], ["11" * 32], ["22" * 32, "cd" * 32]],
    }[by]
    path = write(tmp_path, "l.csv" if ";" in content else "l.txt", content)
    roles, _ = read(path, [f"p{n}" for n in range(4)], by=by, names=names)
    assert roles == {"forget": expected}
    with pytest.raises(DataError, match="1 id .'https://x.org/gone'. which the source does not have"):
        read(write(tmp_path, "g.txt", "https://x.org/gone\n"), [f"p{n}" for n in range(4)], by=by, names=names)


REFUSED = {
    "nothing": ("a.txt", "", "nothing to forget"),
    "a comment": ("a.txt", "# only a comment\n\n", "nothing to forget"),
    "a header": ("a.csv", "id\n", "nothing to forget"),
    "an empty csv": ("a.csv", "", "nothing to forget"),
    "an ending": ("a.json", "[]", "expected a .txt, .csv, .tsv or .jsonl"),
    "a spreadsheet": ("a.xlsx", b"PK", "save a spreadsheet as CSV"),
    "bytes": ("a.txt", b"ab\ncd\xffe\n", "byte 5"),
    "bytes after a mark": ("a.txt", b"\xef\xbb\xbfa\n\xfe", "byte 5"),
    "bytes far away": ("a.txt", b"a/1.png\n" * 50_000 + b"\xfe", "byte 400000"),
    "zero": ("a.txt", "a\x00b", "control character"),
    "escape": ("a.txt", "a\x1b[31mred", "control character"),
    "separator": ("a.txt", "a\u2028b", "control character"),
    "absolute": ("a.txt", "/etc/passwd", "absolute or climbs"),
    "climbs": ("a.txt", "x/../../etc/passwd", "absolute or climbs"),
    "drive": ("a.txt", "C:\\x", "absolute or climbs"),
    "host": ("a.txt", "\\\\host\\x", "absolute or climbs"),
    "long id": ("a.txt", "a" * 2000, "2000 characters"),
    "long line": ("a.txt", "a" * 100_000, "longer than"),
    "long line later": ("a.txt", "a/1.png\n" * 100 + "a" * 100_000, "line 101 is longer than"),
    "no column": ("a.csv", "name\nx\n", "expected one column named id"),
    "column twice": ("a.csv", "id,id\nx,y\n", "several columns may name the image"),
    "two columns of images": ("a.csv", "id,file\na/1.png,b/1.png\n", "data.forget_column"),
    "short row": ("a.csv", "id,role\nx\n", "line 2 has 1 fields"),
    "long row": ("a.csv", "id,role\nx,forget,y\n", "line 2 has 3 fields"),
    "role": ("a.csv", "id,role\nx,keep\n", "'keep'"),
    "quote": ("a.csv", 'id\n"x\n', "line 2 is not valid csv"),
    "empty id": ("a.csv", "id,role\n,forget\n", "0 characters"),
    "no JSON": ("a.jsonl", "{id: 1}\n", "line 1 is not valid JSON"),
    "deep JSON": ("a.jsonl", "[" * 30_000, "line 1 is not valid JSON"),
    "number": ("a.jsonl", '{"id": 1}\n', 'no text "id"'),
    "array": ("a.jsonl", '["x"]\n', 'no text "id"'),
    "role that is none": ("a.jsonl", '{"id": "x", "role": 3}\n', 'no text "id"'),
    "name of two images": ("a.txt", "1.png\n", "'1.png' is the name of several images"),
    "folders before some only": ("a.txt", "a/1.png\nphotos/b/3.png\n", "1 id ('photos/b/3.png') which"),
    "two folders": ("a.txt", "p/a/1.png\nq/b/3.png\n", "2 ids"),
    "case": ("a.txt", "A/1.PNG\n", "'a/1.png' differs only in case"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_refuses_with_one_sentence(tmp_path, fault):
    name, content, message = REFUSED[fault]
    with pytest.raises(DataError) as caught:
        read(write(tmp_path, name, content))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_all_faults_in_one_answer(tmp_path):
    content = "id;role\na/1.png;forget\nb/3.png\ngone.png;forget\n../x;forget\na/2.png;keep\na/1.png;retain\n;forget\n"
    with pytest.raises(DataError) as caught:
        read(write(tmp_path, "a.csv", content))
    said = str(caught.value)
    for part in ("line 3 has 1 fields", "1 id ('gone.png')", "data.allow_missing=true", "line 5: the id '../x'",
                 "line 6: role is 'keep'", "1 id ('a/1.png') both to forget and to retain",
                 "line 8: an id of 0"):  # fmt: skip
        assert part in said, part
    with pytest.raises(DataError, match="line 2 .*; and 80 more"):
        read(write(tmp_path, "b.csv", "id,n\n" + "x\n" * 100))


def test_refuses_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "folder.txt")


@pytest.mark.parametrize("together", [4096, 2])
def test_rows_keep_the_order_of_the_list_and_come_once(tmp_path, monkeypatch, together):
    """Also where a long list is looked up a part at a time."""
    monkeypatch.setattr(forget_list, "LOOKED_UP", together)
    path = write(tmp_path, "a.txt", "".join(f"digits/{i}\n" for i in (7, 2, 9, 2, 0, 7, 5)))
    roles, found = read(path, [f"digits/{i}" for i in range(10)])
    assert roles == {"forget": [f"digits/{i}" for i in (7, 2, 9, 0, 5)]}
    assert (found.entries, found.facts()["duplicates"]) == (7, 2)


def test_a_deleted_image_is_not_taken_for_another_of_its_name(tmp_path):
    """`old/2.png` is gone, and `a/2.png` is another image: as long as other entries are ids, nothing is guessed."""
    with pytest.raises(DataError, match=re.escape("2 ids ('2.png', 'old/2.png') which the source does not have")):
        read(write(tmp_path, "a.txt", "a/1.png\nold/2.png\n2.png\n"))


def test_a_spreadsheet_of_many_rows_is_quick(tmp_path):
    """A tenth of a million rows; the whole million is measured in benchmarks/results."""
    ids = [f"class{i % 50}/IMG_{i:07d}.jpg" for i in range(100_000)]
    rows = "".join(f"{i};photos/{name};someone@example.org;2024-01-01\r\n" for i, name in enumerate(ids))
    path = write(tmp_path, "a.csv", ("no;File;mail;date\r\n" + rows).encode("utf-16"))
    table = IdTable.of(ids)
    began = time.process_time()
    assert len(resolve_list(path, table).forget) == 100_000
    assert time.process_time() - began < 15
