"""Records: read by one rule, and appended so that no line is ever half there."""

from __future__ import annotations

import errno
import json
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distunlearn.common import records
from distunlearn.common.files import DISK, disk_trouble, write_atomic
from distunlearn.common.records import LineFile
from distunlearn.errors import DataError, EvidenceError
from distunlearn.verify.records import find_record, open_plain, read_plain, read_record, read_records

BAD = {
    "not UTF-8": b"\xff\xfe{}", "cut": b'{"a": 1', "empty": b"", "a number": b"12", "null": b"null", "list": b"[1]",
    "deep": b"[" * 100_000, "huge number": b'{"a": ' + b"9" * 10_000 + b"}", "two values": b"{} {}",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_record_is_refused_in_one_sentence(tmp_path, name):
    path = tmp_path / "done.json"
    path.write_bytes(BAD[name])
    with pytest.raises(DataError) as caught:
        read_record(path)
    text = str(caught.value)
    assert str(path) in text and text.endswith("restore it or run that part again.") and "\n" not in text


def test_a_record_has_the_fields_it_must_have(tmp_path):
    path = tmp_path / "done.json"
    path.write_text('{"steps": 3, "digest": "x", "ok": true}')
    assert read_record(path, {"steps": int, "digest": str})["steps"] == 3
    for name, kind in (("steps", str), ("ok", int), ("other", int), ("digest", (int, float))):
        with pytest.raises(EvidenceError, match=f"has no {name} "):
            read_record(path, {name: kind}, EvidenceError)
    assert find_record(tmp_path / "nothing") is None


def special(tmp_path, kind):
    path = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(tmp_path / "nowhere")
    return path


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "device", "broken link"])
def test_only_plain_files_are_opened_and_nothing_is_waited_for(tmp_path, kind):
    path = special(tmp_path, kind)
    with pytest.raises(OSError):
        open_plain(path)
    with pytest.raises(DataError, match="cannot be read"):
        find_record(path)  # not "nothing there"
    with pytest.raises(DataError, match="cannot be read"):
        list(read_records(path))


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="more than 1073741824 bytes"):
        read_plain(path)


# -- lines -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=20)), max_size=6), st.data())
def test_whatever_is_cut_off_the_end_the_lines_before_stay_and_the_next_follows(tmp_path_factory, lines, data):
    path = tmp_path_factory.mktemp("lines") / "ledger.jsonl"
    file = LineFile(path)
    for line in lines:
        file.record(line)
    file.close()
    whole = path.read_bytes()
    kept = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:kept])
    before = lines[: whole[:kept].count(b"\n")]
    assert [line for _, line in read_records(path)] == before
    file = LineFile(path)
    assert file.cut == kept - (whole[:kept].rfind(b"\n") + 1)
    file.record({"next": 1})
    file.close()
    assert [line for _, line in read_records(path)] == [*before, {"next": 1}]


def test_a_line_in_the_middle_that_is_no_record_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    for bad in BAD.values():
        path.write_bytes(b"{}\n" + bad.replace(b"\n", b"") + b"\n{}\n")
        with pytest.raises(DataError, match=r"line 2 (is not whole JSON|holds no JSON object)"):
            list(read_records(path))


@pytest.mark.parametrize("allowed", [0, 1, 7])
def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch, allowed):
    """The system takes a few bytes and then no more."""
    file = LineFile(tmp_path / "a")
    file.record({"first": 1})
    write, calls = os.write, []

    def limited(handle, data):
        calls.append(len(data))
        if len(calls) > 1 or not allowed:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data[:allowed])

    monkeypatch.setattr(records.os, "write", limited)
    with pytest.raises(DataError, match=r"a cannot be written \(No space left on device\)"):
        file.record({"second": 2})
    monkeypatch.undo()
    assert calls
    file.record({"third": 3})
    assert [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()] == [{"first": 1}, {"third": 3}]


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "device", "broken link"])
def test_lines_go_into_the_users_own_plain_files_alone(tmp_path, kind):
    with pytest.raises(DataError, match="cannot be written"):
        LineFile(special(tmp_path, kind))
    assert not (tmp_path / "nowhere").exists()


# -- files of others and disks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["link", "hard link", "link to nowhere", "link under the old name"])
def test_a_planted_link_under_a_temporary_name_is_not_followed(tmp_path, kind):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    planted = tmp_path / (".done.json.tmp" if kind == "link under the old name" else f".done.json.{os.getpid()}.tmp")
    if kind == "hard link":
        os.link(victim, planted)
    else:
        planted.symlink_to(tmp_path / "nowhere" if kind == "link to nowhere" else victim)
    write_atomic(tmp_path / "done.json", "{}")
    assert victim.read_text() == "precious" and (tmp_path / "done.json").read_text() == "{}"
    assert not (tmp_path / "done.json").is_symlink() and not (tmp_path / "nowhere").exists()


def test_a_link_that_is_planted_at_the_last_moment_is_refused(tmp_path, monkeypatch):
    """After the name was found free: the file must be made by this process, or not at all."""
    victim, opened = tmp_path / "victim", os.open
    victim.write_text("precious")

    def race(path, flags, *more):
        if str(path).endswith(".tmp"):
            os.symlink(victim, path)
            monkeypatch.undo()
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", race)
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "done.json", "{}")
    assert victim.read_text() == "precious" and not (tmp_path / "done.json").exists()


@pytest.mark.parametrize("number", sorted(DISK))
def test_an_error_of_the_disk_is_one_sentence(number):
    found = disk_trouble(OSError(number, os.strerror(number), "runs/a\nb/ledger.jsonl"))
    assert found.exit_code == 3 and "\n" not in str(found) and os.strerror(number) in str(found)
    assert disk_trouble(ConnectionResetError(errno.ECONNRESET, "reset")) is None
    assert disk_trouble(ValueError("x")) is None
