"""The one writer of files: whole or as before, durable, and of one process alone."""

from __future__ import annotations

import json
import os
import stat

import pytest

from distunlearn.common import files
from distunlearn.common.files import replacing, write_atomic, write_json


def test_content_replaces_what_was_there(tmp_path):
    path = tmp_path / "a"
    for content in (b"\x00\xff", "é\n", b""):
        write_atomic(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    write_json(path, {"a": [1.5, "é"]})
    assert json.loads(path.read_text()) == {"a": [1.5, "é"]} and path.read_text().endswith("\n")
    (tmp_path / "beside").write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "beside").stat().st_mode)


@pytest.mark.parametrize("place", ["block", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_alone(tmp_path, monkeypatch, place):
    path = tmp_path / "a"
    write_atomic(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    if place != "block":
        monkeypatch.setattr(files.os, place, fail)
    with pytest.raises(OSError, match="disk full"), replacing(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
        if place == "block":
            fail()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]
    with pytest.raises(ValueError):
        write_json(path, float("nan"))
    assert path.read_bytes() == b"old"


def test_file_and_folder_are_synced_around_the_rename(tmp_path, monkeypatch):
    path, order = tmp_path / "a", []
    sync, replace = files.sync_path, os.replace
    monkeypatch.setattr(files, "sync_path", lambda found: (order.append(("sync", found.name)), sync(found)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (order.append(("replace", b.name)), replace(a, b)))
    write_atomic(path, b"x")
    assert order == [("sync", f".a.{os.getpid()}.tmp"), ("replace", "a"), ("sync", tmp_path.name)]


def test_the_new_file_is_this_process_own(tmp_path, monkeypatch):
    """Neither a link that lies in wait nor what a killed process left is written into."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"kept")
    (tmp_path / f".a.{os.getpid()}.tmp").symlink_to(victim)
    write_atomic(tmp_path / "a", b"x")
    assert victim.read_bytes() == b"kept" and not (tmp_path / "a").is_symlink()
    monkeypatch.setattr(files.Path, "unlink", lambda *_, **__: None)
    (tmp_path / f".a.{os.getpid()}.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "a", b"y")
    assert victim.read_bytes() == b"kept"
