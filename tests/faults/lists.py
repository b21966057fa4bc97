"""Small runs, their refusals, and lists of images to forget for them."""

from __future__ import annotations

import json
from pathlib import Path

from hostile_tars import heard, jpeg

from distunlearn.cli.main import main
from distunlearn.config.schema import DataConfig

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


def of_folder(verb: str, out: Path, root: Path, *extra: str) -> list[str]:
    return [*arguments(verb, out, f"data.root={root}", "data.members=null", *extra), "--set", "data.source=imagefolder"]
