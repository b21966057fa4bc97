"""Verbs of the command line that must refuse: one line, the right exit code, nothing run, nothing written."""

from __future__ import annotations

from pathlib import Path

import torch  # noqa: F401, whose import starts a program, which is no verb's doing
from hostile_tars import heard, jpeg

from distunlearn.cli.main import main
from distunlearn.common.files import file_sha256
from distunlearn.config.schema import DataConfig

TINY = ["data.members=40", "data.forget=10", "data.holdout=6", "data.calibration=4", "data.third_party=4",
        "data.third_party_audit=4", "data.samples_per_shard=20", "unlearn.retain_batch=16", "unlearn.forget_batch=8",
        "unlearn.third_party_batch=4", "unlearn.steps=4", "pretrain.batch=16", "runtime.threads=1"]  # fmt: skip
SMALL = DataConfig(
    members=40, forget=10, holdout=6, calibration=4, third_party=4, third_party_audit=4, samples_per_shard=20
)


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def refusal(capsys, arguments: list[str], *folders: Path, code: int = 3) -> str:
    """The one line of a refusal that ran nothing and changed none of the folders."""
    capsys.readouterr()
    before = [tree(folder) for folder in folders]
    with heard() as done:
        found = main(arguments)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert found == code, captured.err
    assert len(lines) == 1 and lines[0].startswith("error: ") and "\x1b" not in lines[0], captured.err
    assert captured.out == "" and not done, (captured.out, done)
    assert [tree(folder) for folder in folders] == before
    return lines[0]


def sets(*values: str) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def plan(out: Path, *extra: str) -> list[str]:
    return ["plan", "digits", "--out", str(out), *sets(*TINY, *extra)]


def index(folder: Path | str, *extra: str) -> list[str]:
    return ["index", str(folder), *sets(*TINY, *extra)]


def folder_of(root: Path, data: bytes, name: str = "bad.jpg") -> list[str]:
    """A folder of 60 good images and a bad one; returns the arguments that prepare it."""
    for number in range(60):
        path = root / f"class{number % 2}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    (root / "class0" / name).write_bytes(data)
    settings = (*TINY, "data.members=null", f"data.root={root}")
    return ["prepare", "imagefolder", "--out", str(root.parent / "run"), *sets(*settings)]
