"""A file of settings for a test."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path):
    def write(data: str | bytes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return write
