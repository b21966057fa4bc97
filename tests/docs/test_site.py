"""The documents build as a site without a warning, and a link that leads nowhere is one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.site, pytest.mark.slow]


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_the_site_builds_without_a_warning(tmp_path):
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert 'src="picture.svg"' in home and 'href="results/2026-11-27-gpu.html"' in home
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert 'id="distunlearn.api.unlearn"' in api and 'id="distunlearn.methods.base.Method.loss"' in api
    fetched = [
        line for line in home.splitlines() if '<script src="http' in line or '<link rel="stylesheet" href="http' in line
    ]
    assert not fetched


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path):
    for name in ("docs", "benchmarks", "examples", "launch", "slurm", "distunlearn"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("forgetting-*", "__pycache__"))
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "docs" / "faq.md").write_text("# Questions\n\n[nothing](limits.md#nothing)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0 and "limits.md#nothing" in done.stderr
