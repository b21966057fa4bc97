"""After `dispose` nothing of the run names or holds a forgotten image; levels 0 and 1 and receipts still hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from evidence_case import PASSPHRASE

from distunlearn.cli.main import main
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.run import dispose as module
from distunlearn.run.dispose import PLACES, dispose, residuals
from distunlearn.verify import envelope
from distunlearn.verify.check import FAILS, HOLDS
from distunlearn.verify.receipt import read_rows
from distunlearn.verify.secret import SECRET


class Killed(BaseException):
    pass


@pytest.fixture
def run(case, tmp_path) -> Path:
    return case.copy(tmp_path)


def test_what_is_left_is_listed_before_and_gone_after(case, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DISTUNLEARN_PASSPHRASE", PASSPHRASE)
    rows = read_rows(run)
    assert main(["receipt", str(run), "--id", sorted(rows)[0], "--out", str(tmp_path / "receipt")]) == 0
    key = ["--key", str(case.folder / "operator")]
    assert main(["dispose", str(run), *key]) == 0 and (run / SECRET).exists(), "without --apply nothing goes"
    capsys.readouterr()
    assert main(["residuals", str(run)]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["found"]["images in the shards"] == len(rows) and listed["found"]["run secret"] == 1
    assert listed["claimed"]["source"]
    assert main(["dispose", str(run), *key, "--apply"]) == 0
    assert not any(residuals(run)["found"].values())
    assert not Manifest.of_run(run).ids("forget")
    for path in run.rglob("*"):
        content = path.read_bytes() if path.is_file() and path.suffix != ".tar" else b""
        named = [i for i in rows if f'"{i}"'.encode() in content]
        assert not named, path
    found = case.statement_alone(export=run / "export", commitment=run / "evidence/commitment.json",
                                 receipt=tmp_path / "receipt", disposal=run / "evidence/disposal.json")  # fmt: skip
    assert [found.checks[level].word for level in (0, 1, 5)] == [HOLDS] * 3, str(found)
    assert "8 places deleted from the file system; 4 claimed, none checked" in str(found)
    assert case.check(run=run, export=None).exit_code == 8, "level 2 needs what is gone"
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    shown = page[page.index('id="assurance"') : page.index('id="origin"')]
    for words in ("ticket 17", envelope.read(case.path.read_bytes(), "certificate").digest, "run secret", "derived"):
        assert words in shown, words


def test_a_disposal_of_another_certificate_or_key_does_not_hold(case, run, monkeypatch):
    monkeypatch.setenv("DISTUNLEARN_PASSPHRASE", PASSPHRASE)
    path = dispose(run, case.folder / "stranger", PASSPHRASE)
    found = case.statement_alone(disposal=path)
    assert found.exit_code == 8 and found.checks[0].word == FAILS and "no trusted key signed the disposal" in str(found)


def test_a_disposal_killed_at_every_deletion_goes_on_and_the_secret_goes_last(case, run, tmp_path, monkeypatch):
    """Killed before each deletion in turn, in one and the same directory: it comes to the same end."""
    places = [path for name in PLACES for path in module._paths(run, name)]
    assert places[-1] == run / SECRET and len(places) > 6
    rmtree, unlink = shutil.rmtree, Path.unlink
    left = [1]

    def guarded(original):
        def call(path, *args, **kwargs):
            if Path(path) in places:
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                assert (run / SECRET).exists(), "the secret goes last"
            return original(path, *args, **kwargs)

        return call

    monkeypatch.setattr(module.shutil, "rmtree", guarded(rmtree))
    monkeypatch.setattr(Path, "unlink", guarded(unlink))
    for number in range(len(places) - 1):
        left[0] = 1
        with pytest.raises(Killed):
            dispose(run, case.folder / "operator", PASSPHRASE)
        assert sum(path.exists() for path in places) == len(places) - 1 - number
        assert not (run / "evidence/disposal.json").exists(), "no record before the end"
    left[0] = 1
    dispose(run, case.folder / "operator", PASSPHRASE)
    assert not any(path.exists() for path in places) and (run / "evidence/disposal.json").exists()
    left[0] = 0
    dispose(run, case.folder / "operator", PASSPHRASE)  # again: there is nothing to do


def test_what_is_not_certified_is_not_disposed_of(case, run, capsys, monkeypatch):
    monkeypatch.setenv("DISTUNLEARN_PASSPHRASE", PASSPHRASE)
    (run / "evidence/certificate.json").unlink()
    assert main(["dispose", str(run), "--key", str(case.folder / "operator"), "--apply"]) == 3
    assert "certify it" in capsys.readouterr().err and (run / SECRET).exists()
