"""The scripts of launch/: an installation that fails ends with what to look at, room on the disk among it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIP = '#!/bin/sh\ncase "$*" in *--version*) exit 0 ;; esac\necho "ERROR: of pip" >&2\nexit 1\n'


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def install(folder: Path, free_gib: int) -> subprocess.CompletedProcess[str]:
    """Installs into an environment whose pip fails, on a disk of which `df` says that `free_gib` are free."""
    executable(folder / "venv" / "bin" / "python", PIP)
    (folder / "venv" / "pyvenv.cfg").touch()
    blocks = free_gib * 1024**2
    executable(folder / "bin" / "df", f"#!/bin/sh\necho header\necho disk {blocks} 0 {blocks} 0% /\n")
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    command = f'set -euo pipefail; . "{ROOT}/launch/_venv.sh"; use_venv "{folder}/venv" something'
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("free", "said"), [(2, True), (40, False)])
def test_a_failed_installation_says_how_little_was_free(tmp_path, free, said):
    ended = install(tmp_path, free)
    assert ended.returncode == 70
    assert "ERROR: of pip" in ended.stderr and "the same command tries again" in ended.stderr
    assert (f"only {free} GiB were free" in ended.stderr) is said
