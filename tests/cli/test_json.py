"""`--json`: every verb prints one object, and nothing else on standard output."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import distunlearn.cli
from distunlearn.cli.evidence import Verify
from distunlearn.cli.main import NAMES, main
from distunlearn.cli.output import Verb

FOLDER = Path(distunlearn.cli.__file__).parent


def told(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    """The object of a command, whose code is the process's."""
    code = main([*map(str, args), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["command"] == args[0] and found["exit_code"] == code
    return found


def test_commands_that_only_print(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "quickstart" not in told(capsys, "list", "methods")["result"]["methods"]
    assert told(capsys, "schema")["result"]["$schema"]
    assert told(capsys, "doctor", "--out", tmp_path)["result"]["torch"]["version"]
    files = told(capsys, "launch-files", tmp_path / "files")["result"]["files"]
    assert files and all(Path(name).is_file() for name in files)
    planned = told(capsys, "plan", "digits")["result"]
    assert planned["roles"]["forget"] and "digest" in planned


def test_a_run_step_by_step(capsys: pytest.CaptureFixture[str], finished_run: Any) -> None:
    run, code = finished_run()
    assert told(capsys, "status", run)["result"]["next"] is None
    assert told(capsys, "report", run)["result"] == {"report": str(run / "report.html")}
    audited = told(capsys, "audit", run)
    assert audited["exit_code"] == code and audited["result"]["verdict"] in ("pass", "fail", "inconclusive")
    assert audited["result"]["gates"]["knn"]["verdict"] and Path(audited["result"]["figures"]).is_file()
    assert told(capsys, "purge", run)["result"]


def test_an_error_is_in_the_object_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = told(capsys, "report", tmp_path)
    assert found["exit_code"] == 3 and "holds neither run.yaml" in found["error"] and found["result"] is None
    assert main(["report", str(tmp_path)]) == 3
    assert capsys.readouterr().out == "", "nothing is collected any more"


def test_every_verb_has_it() -> None:
    assert [name for name, verb in NAMES.items() if not issubclass(verb, (Verb, Verify))] == []
    assert "json" in Verify.__dataclass_fields__  # whose words and object `distunlearn-verify` has, too


def printing(text: str) -> list[int]:
    """Lines that print to standard output by themselves."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    prints = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    return [call.lineno for call in prints if not any(word.arg == "file" for word in call.keywords)]


def test_no_verb_prints_by_itself() -> None:
    allowed = {"output.py": 2, "main.py": 1}  # the words and the object; the version
    for path in FOLDER.glob("*.py"):
        assert len(printing(path.read_text(encoding="utf-8"))) == allowed.get(path.name, 0), path.name
    assert printing("print(1)") == [1] and printing("print(1, file=x)") == []
