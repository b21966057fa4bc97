"""Parts by name: tables, entry points, installed packages and files; the current folder is never searched."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distunlearn.common import plugins
from distunlearn.common.plugins import loaded, names, resolve
from distunlearn.config.load import load_config
from distunlearn.engine.ledger import Ledger
from distunlearn.engine.provenance import code_digest, require_same_code
from distunlearn.engine.session import load_own_parts
from distunlearn.errors import ConfigError
from distunlearn.verify.ledger import read_ledger

GROUP = "distunlearn.tests"
TABLE = {"decoder": "json.decoder:JSONDecoder", "encoder": "json.encoder:JSONEncoder"}
BASE = "json.decoder:JSONDecoder"
OWN = "from json.decoder import JSONDecoder\n\nclass Own(JSONDecoder):\n    pass\n\nclass Other:\n    pass\n"
ASK = (
    "from distunlearn.common.plugins import resolve, loaded\n"
    "print(resolve('{name}', {{}}, 'json.decoder:JSONDecoder', 'distunlearn.tests').__module__)"
)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing that a test loads stays."""
    before = set(sys.modules)
    monkeypatch.setattr(plugins, "_OUTSIDE", {})
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages with `plugged` 1.0 and its entry point `pointed`."""
    folder = tmp_path / "site"
    (folder / "plugged").mkdir(parents=True)
    (folder / "plugged" / "__init__.py").touch()
    (folder / "plugged" / "part.py").write_text(OWN)
    info = folder / "plugged-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\npointed = plugged.part:Own\n")
    monkeypatch.syspath_prepend(str(folder))
    return folder


def find(name: str, base: str | None = BASE) -> type:
    return resolve(name, TABLE, base, GROUP, "part.name")


def refusal(name: str, base: str | None = BASE) -> str:
    with pytest.raises(ConfigError) as caught:
        find(name, base)
    return str(caught.value)


def test_a_built_in_part_is_imported_by_its_own_module_alone() -> None:
    import json

    assert find("decoder") is json.JSONDecoder and loaded() == []


def test_an_unknown_name_gets_the_nearest() -> None:
    assert refusal("decodr") == "part.name=decodr is not known; did you mean decoder?"
    assert "expected one of decoder, encoder, or package.module:Name or path/to/file.py:Name" in refusal("zzz")


def test_wrong_base_class() -> None:
    assert "part.name=encoder is no subclass of json.decoder.JSONDecoder" in refusal("encoder")
    assert "is no subclass" in refusal("math:sqrt")
    assert find("math:sqrt", None)(9) == 3
    assert "expected a class or a function" in refusal("math:pi", None)


def test_an_abstract_class_is_refused_with_what_it_lacks() -> None:
    assert "does not define __len__" in refusal("collections.abc:Sized", "collections.abc:Sized")


def test_installed_package_and_entry_point(site: Path) -> None:
    own = find("plugged.part:Own")
    assert own is find("pointed") and names(TABLE, GROUP) == ["decoder", "encoder", "pointed"]
    [(name, file, sha)] = loaded()
    assert (name, file) == ("plugged", str(site / "plugged"))
    (site / "plugged" / "other.py").write_text("x = 1\n")  # what the part imports belongs to it
    assert loaded()[0].sha256 != sha
    assert "does not have; did you mean Own?" in refusal("plugged.part:Owm")
    assert "which is not installed" in refusal("plugge.part:Own")
    assert "cannot be imported: ModuleNotFoundError" in refusal("plugged.prt:Own")
    assert "is no subclass" in refusal("plugged.part:Other")


def test_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    own = find(f"{path}:Own")
    assert own.__name__ == "Own" and find(f"{path}:Own") is own
    assert loaded() == [(str(path), str(path), hashlib.sha256(OWN.encode()).hexdigest())]
    monkeypatch.chdir(tmp_path)
    assert find("mine.py:Own") is own  # a file that is named is no search
    assert "does not exist; check the path" in refusal("elsewhere/mine.py:Own")
    (tmp_path / "broken.py").write_text("1/0\n")
    assert "cannot be imported: ZeroDivisionError: division by zero" in refusal("broken.py:Own")


def test_ledger_and_code_digest_have_what_came_from_outside(tmp_path: Path) -> None:
    own = code_digest()
    ledger = Ledger(tmp_path / "ledger.jsonl")
    require_same_code(ledger, accept=False)
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    find(f"{path}:Own")
    assert code_digest() != own
    with pytest.raises(ConfigError, match="this run began under"):
        require_same_code(ledger, accept=False)
    require_same_code(ledger, accept=True)
    ledger.close()
    first, second = read_ledger(tmp_path / "ledger.jsonl")
    assert "outside" not in first and first["digest"] == own
    assert second["outside"] == [
        {"name": str(path), "file": str(path), "sha256": hashlib.sha256(OWN.encode()).hexdigest()}
    ]


def test_the_code_of_a_run_is_without_what_another_run_of_the_process_took(tmp_path: Path) -> None:
    """Or the second run could not be continued by a process that does not know the first."""
    path = tmp_path / "mine.py"
    path.write_text("from distunlearn.methods.training import Finetune\n\nclass Own(Finetune):\n    name = 'own'\n")
    plain, other = (load_config("digits", None, [f"method.name={name}"]) for name in ("finetune", f"{path}:Own"))
    load_own_parts(plain)
    own = code_digest()
    load_own_parts(other)
    assert [part.file for part in loaded()] == [str(path)] and code_digest() != own  # control
    load_own_parts(plain)
    assert loaded() == [] and code_digest() == own


@pytest.mark.parametrize("name", [":", "a:", ":B", "../x:B", "a b:C", "", "os;x:y"])
def test_what_is_no_name_is_refused(name: str) -> None:
    assert refusal(name)


def asked(folder: Path, name: str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`resolve` in a process of its own whose current folder is `folder`."""
    command = [sys.executable, *options, *([] if options else ["-c", ASK.format(name=name)])]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PATH": "/bin", **variables})


def test_the_current_folder_is_never_searched(tmp_path: Path, site: Path) -> None:
    (tmp_path / "lying.py").write_text(OWN)
    (tmp_path / "ask.py").write_text(ASK.format(name="lying:Own"))
    for options in ((), ("-m", "ask"), ("ask.py",)):
        done = asked(tmp_path, "lying:Own", *options)
        assert done.returncode == 1 and "which is not installed" in done.stderr, done.stderr
    (tmp_path / "ask.py").write_text("import lying\n" + ASK.format(name="lying:Own"))
    done = asked(tmp_path, "", "-m", "ask")  # it was imported by the program, and would not be by another one
    assert done.returncode == 1 and "which is not installed" in done.stderr, done.stderr

    (tmp_path / "plugged.py").write_text("raise SystemExit(9)\n")  # in the place of an installed package
    control = subprocess.run([sys.executable, "-c", "import plugged"], cwd=tmp_path, env={"PYTHONPATH": str(site)})
    assert control.returncode == 9
    done = asked(tmp_path, "plugged.part:Own", PYTHONPATH=str(site))
    assert done.stdout == "plugged.part\n", done.stderr
    done = asked(site, "plugged.part:Own")  # and it is not found in its own folder if that is the current one
    assert done.returncode == 1 and "which is not installed" in done.stderr
