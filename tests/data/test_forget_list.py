from __future__ import annotations

import pytest

from distunlearn.data.manifest.ids import IdTable
from distunlearn.data.prepare import forget_list
from distunlearn.data.prepare.forget_list import read_ids, resolve_list
from distunlearn.errors import DataError


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "# header\ndigits/1\n\n  digits/2  \ndigits/1\n"),
        ("a.TXT", "\ufeffdigits/1\r\ndigits/2"),
        ("a.csv", "id\ndigits/1\ndigits/2\n"),
        ("a.csv", '\ufeffname,ID,role\r\nx,digits/1,forget\r\n"y, z","digits/2",\r\n'),
        ("a.jsonl", '{"id": "digits/1"}\n\n{"id": "digits/2", "role": "forget"}\n'),
        ("a.jsonl", '{"id": "digits/1", "role": null}\r\n{"id": "digits/2"}\r\n'),
    ],
)
def test_reads_ids_in_order_without_duplicates(tmp_path, name, content):
    assert read_ids(write(tmp_path, name, content)) == {"forget": ["digits/1", "digits/2"], "retain": []}


def test_reads_roles(tmp_path):
    path = write(tmp_path, "a.csv", "id,role\na,retain\nb,forget\nc,\n")
    assert read_ids(path) == {"forget": ["b", "c"], "retain": ["a"]}


def test_ids_with_markup_and_formulas_stay_plain_text(tmp_path):
    path = write(tmp_path, "a.txt", "=cmd()\n<img onerror=x>\nkeiner/grün.png\n")
    assert read_ids(path)["forget"] == ["=cmd()", "<img onerror=x>", "keiner/grün.png"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "nothing to forget"),
        ("a.txt", "# only a comment\n\n", "nothing to forget"),
        ("a.csv", "id\n", "nothing to forget"),
        ("a.csv", "", "nothing to forget"),
        ("a.json", "[]", "expected a .txt, .csv or .jsonl"),
        ("a.txt", b"ab\ncd\xffe\n", "byte 5"),
        ("a.txt", b"\xef\xbb\xbfa\n\xfe", "byte 5"),
        ("a.txt", b"\xff\xfea\x00", "byte 0"),
        ("a.txt", "a\x00b", "control character"),
        ("a.txt", "a\x1b[31mred", "control character"),
        ("a.txt", "a\u2028b", "control character"),
        ("a.txt", "one\rtwo", "control character"),
        ("a.txt", "/etc/passwd", "absolute or climbs"),
        ("a.txt", "x/../../etc/passwd", "absolute or climbs"),
        ("a.txt", "C:\\x", "absolute or climbs"),
        ("a.txt", "\\\\host\\x", "absolute or climbs"),
        ("a.txt", "a" * 2000, "2000 characters"),
        ("a.txt", "a" * 100_000, "longer than"),
        ("a.csv", "name\nx\n", "expected one column named id"),
        ("a.csv", "id,id\nx,y\n", "expected one column named id"),
        ("a.csv", "id,role\nx\n", "line 2 has 1 fields"),
        ("a.csv", "id,role\nx,forget,y\n", "line 2 has 3 fields"),
        ("a.csv", "id,role\nx,keep\n", "'keep'"),
        ("a.csv", 'id\n"x\n', "not valid csv"),
        ("a.csv", "id,role\n,forget\n", "0 characters"),
        ("a.jsonl", "{id: 1}\n", "line 1 is not valid JSON"),
        ("a.jsonl", "[" * 30_000, "line 1 is not valid JSON"),
        ("a.jsonl", '{"id": 1}\n', 'no text "id"'),
        ("a.jsonl", '["x"]\n', 'no text "id"'),
        ("a.jsonl", '{"id": "x", "role": 3}\n', 'no text "id"'),
    ],
)
def test_refuses_with_one_sentence(tmp_path, name, content, message):
    with pytest.raises(DataError) as caught:
        read_ids(write(tmp_path, name, content))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_refuses_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_ids(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_ids(tmp_path / "folder.txt")


def test_a_hundred_thousand_ids_are_quick(tmp_path):
    path = write(tmp_path, "a.txt", "".join(f"digits/{i}\n" for i in range(100_000)))
    assert len(read_ids(path)["forget"]) == 100_000


@pytest.mark.parametrize("together", [4096, 2])
def test_rows_keep_the_order_of_the_list_and_come_once(tmp_path, monkeypatch, together):
    """Also where a long list is looked up a part at a time."""
    monkeypatch.setattr(forget_list, "LOOKED_UP", together)
    table = IdTable.of(f"digits/{i}" for i in range(10))
    path = write(tmp_path, "a.txt", "".join(f"digits/{i}\n" for i in (7, 2, 9, 2, 0, 7, 5)))
    found = resolve_list(path, table)
    assert table.at(found.forget) == [f"digits/{i}" for i in (7, 2, 9, 0, 5)] == read_ids(path)["forget"]
    assert (found.entries, found.facts()["duplicates"]) == (7, 2)


def test_one_id_to_forget_and_to_retain_is_refused(tmp_path):
    path = write(tmp_path, "a.csv", "id,role\na,forget\nb,forget\nb,retain\n")
    with pytest.raises(DataError, match="lists 1 id .'b'. both to forget and to retain"):
        resolve_list(path, IdTable.of(["a", "b"]))
