"""A folder of shards, and the same in an object store."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from object_server import bare, serving
from pictures import pictures

from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.storage import retry


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Manifest:
    return pictures(tmp_path_factory.mktemp("pictures") / "shards")


@pytest.fixture
def objects(local, tmp_path) -> Path:
    """A copy of the shards that a test may spoil."""
    folder = tmp_path / "objects of 100% ours"
    folder.mkdir()
    for name in local.shards():
        shutil.copy(local.shard_path(name), folder)
    return folder


@pytest.fixture
def server(objects):
    with serving(objects) as found:
        yield found


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The pauses before requests are repeated, none of which is made."""
    found: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", found.append)
    return found


@pytest.fixture
def remote(local, tmp_path, server) -> Manifest:
    return bare(local, tmp_path, server.url)
