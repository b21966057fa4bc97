"""Every command of README and the documents is one that the command line takes, and runs in a test or says why not."""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from torch import nn
from torch.utils.data import Dataset

import distunlearn as du
from distunlearn.cli.main import _parse, main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
HERE = "here"  # by a test of this file

LINES = (Path(__file__).with_name("commands.txt")).read_text(encoding="utf-8").splitlines()
RUN_BY = [tuple(line.split(" => ")) for line in LINES if line and not line.startswith("#")]


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line of the blocks of shell commands."""
    found = []
    for page in PAGES:
        for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
            if language not in ("sh", "bash") and (language or not block.startswith("distunlearn")):
                continue  # another language, a drawing
            block = re.sub(r"<<'END'\n.*?\nEND\n", "\n", block, flags=re.DOTALL).replace("\\\n", " ")
            for line in block.splitlines():
                bare = re.sub(r"\s+", " ", re.sub(r"(^|\s)#.*", "", line)).strip()
                found += [(page.name, part) for part in bare.split(" && ") if part and not part.startswith("cd ")]
    return found


def row_of(command: str) -> int:
    """The row of RUN_BY that a command belongs to; -1 for none."""
    return next((n for n, (begins, _) in enumerate(RUN_BY) if re.match(f"(?:{begins})", command)), -1)


def test_every_command_runs_in_a_test_or_says_why_not():
    found = commands()
    assert len(found) > 50
    assert not [pair for pair in found if row_of(pair[1]) < 0]
    unused = set(range(len(RUN_BY))) - {row_of(command) for _, command in found}
    assert not [RUN_BY[n][0] for n in unused], "a row of a command that no page has"
    assert row_of("rm -r runs") == -1


def test_the_tests_that_run_them_exist():
    for _, how in RUN_BY:
        if how != HERE and not how.startswith("because "):
            path, _, name = how.partition("::")
            assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), how


def test_the_command_line_takes_what_the_pages_write(capsys):
    """Every option exists and every argument is in its place; RECIPE and DIR stand for any."""
    seen = 0
    for page, command in commands():
        words = shlex.split(command)
        if "distunlearn" in words and words[0] in ("torchrun", "accelerate"):
            words = words[words.index("distunlearn") :]
        words[0] = words[0].removeprefix(".venv/bin/")
        if words[0] == "distunlearn":
            arguments = [word for word in words[1 : words.index(">") if ">" in words else None]]
            with contextlib.suppress(SystemExit):
                assert _parse(arguments) is not None
                seen += 1
                continue
            pytest.fail(f"{page}: {command}\n{capsys.readouterr()}")
    assert seen > 25
    with pytest.raises(SystemExit):
        _parse(["run", "digits", "--outt", "runs/x"])


def test_commands_that_take_no_time(tmp_path, capsys, monkeypatch, finished_run):
    run, _ = finished_run("digits")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(run)
    shown = {"doctor": "torch", "list": "third_party", "status": '"verdict"', "submit": "#SBATCH --nodes=2"}
    shown["launch-files"] = "launch/zero3.json"
    here = {command for _, command in commands() if RUN_BY[row_of(command)][1] == HERE}
    assert here
    for command in sorted(here):
        assert main(shlex.split(command)[1:]) == 0, command
        [expected] = [text for verb, text in shown.items() if f"distunlearn {verb}" in command]
        assert expected in capsys.readouterr().out, command


class Photos(Dataset):
    """Colour noise, 8 x 8, with labels."""

    def __init__(self, count: int, seed: int) -> None:
        self.images = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], index % 3


def test_the_python_of_readme_runs_as_it_stands(tmp_path, monkeypatch):
    [code] = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 8
    short = {
        "steps": 4, "pretrain": {"epochs": 2, "batch": 16}, "constraint": {"view_pairs": 1},
        "unlearn": {"retain_batch": 16, "forget_batch": 8, "third_party_batch": 8},
        "audit": {"views": 4, "bootstrap": 100, "relearn_steps": 0},
    }  # fmt: skip
    whole = du.unlearn
    monkeypatch.setattr(du, "unlearn", lambda encoder, **given: whole(encoder, **(given | short)))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {
        "encoder": nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 12)),
        "retain_set": Photos(40, 0), "forget_set": Photos(24, 1), "other_set": Photos(30, 2), "test_set": Photos(40, 3),
    }  # fmt: skip
    exec(compile(code, "README.md", "exec"), names)
    run = names["run"]
    assert run.verdict in ("pass", "fail", "inconclusive") and run.report.exists()
    assert isinstance(run.encoder, nn.Module)
