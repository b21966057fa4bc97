"""Certificates: signed, read strictly, and checked level by level; one case a row of the threats that is in reach."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rfc8785
import test_contradictions as forgeries

from distunlearn.cli.main import main
from distunlearn.verify import envelope
from distunlearn.verify.certificate import LIMITS, read_predicate
from distunlearn.verify.check import EXIT, FAILS, HOLDS, OPEN, verify
from distunlearn.verify.errors import ConfigError, EvidenceError
from distunlearn.verify.keys import load_key, make_key, read_trust

PASSPHRASE = "correct horse"


class Case:
    """A certified run, and what a verifier holds."""

    def __init__(self, folder: Path, run: Path) -> None:
        self.folder, self.run = folder, run
        make_key(folder / "operator", PASSPHRASE)
        make_key(folder / "stranger", PASSPHRASE)
        self.trust = self.trusting("operator")
        self.path = run / "evidence" / "certificate.json"

    def key(self, name: str = "operator"):
        return load_key(self.folder / name, PASSPHRASE)

    def trusting(self, *names: str) -> Path:
        path = self.folder / f"trust-{'-'.join(names)}.json"
        keys = [{"pem": (self.folder / f"{name}.pub").read_text(), "role": "operator"} for name in names]
        path.write_text(json.dumps({"version": 1, "keys": keys}))
        return path

    def statement(self) -> dict[str, Any]:
        return envelope.read(self.path.read_bytes(), "certificate").statement

    def signed(self, edit: Callable[[dict], object], key: str = "operator") -> bytes:
        """The certificate with an edited predicate, signed again."""
        statement = self.statement()
        edit(statement["predicate"])
        subject = {entry["name"]: entry["digest"]["sha256"] for entry in statement["subject"]}
        return envelope.sign("certificate", subject, statement["predicate"], self.key(key))

    def check(self, data: bytes | None = None, run: Path | None = None, **more: Any):
        run = run or self.run
        more = {"trust": read_trust(self.trust), "export": run / "export", "run": run} | more
        return verify(data if data is not None else self.path.read_bytes(), **more)


@pytest.fixture(scope="session")
def case(finished_run, tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("evidence")
    made = Case(folder, shutil.copytree(finished_run()[0], folder / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTUNLEARN_PASSPHRASE", PASSPHRASE)
        assert main(["certify", str(made.run), "--key", str(folder / "operator")]) == 0
    return made


def words(found) -> list[str]:
    return [check.word for check in found.checks]


def test_an_honest_certificate_holds_and_keeps_its_verdict(case, capsys):
    found = case.check()
    assert words(found) == [HOLDS, HOLDS, HOLDS, OPEN, OPEN], str(found)
    assert found.exit_code == EXIT[found.verdict] and LIMITS[1] in str(found) and LIMITS[4] in str(found)
    assert case.path.stat().st_size <= 8192
    argv = ["verify", str(case.path), "--trust", str(case.trust), "--run", str(case.run)]
    assert main(argv) == found.exit_code and main([*argv, "--json"]) == found.exit_code
    said = capsys.readouterr().out
    assert json.loads(said[said.index("{") :])["exit_code"] == found.exit_code and "not checked: give --export" in said


def test_without_trust_nothing_is_a_pass(case):
    found = case.check(trust=None)
    assert words(found)[0] == OPEN and found.exit_code != 0 and "nobody vouches for" in str(found)


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_every_byte_of_the_envelope_counts(case):
    data = case.path.read_bytes()
    for at in range(0, len(data), 7):
        found = case.check(flip(data, at), export=None, run=None)
        assert found.exit_code == 8 and words(found)[0] == FAILS, at


# -- threats ---------------------------------------------------------------------------------------------------------


def rewritten(case: Case, edit: Callable[[dict], object]) -> bytes:
    outer = json.loads(case.path.read_bytes())
    edit(outer)
    return rfc8785.dumps(outer)


SIGNED = {  # row of the threats -> (edit of the predicate, level that notices, sentence)
    "4 wider margin in the gate alone": (
        lambda p: p["figures"]["gates"]["bank_loss"].update(margin=0.5), 0, "and 0.08 was declared"),
    "4 wider margins in both": (
        lambda p: (p["rules"].update(attack=0.5), [g.update(margin=0.5) for name, g in p["figures"]["gates"].items()
                   if name not in ("view_agreement", "knn", "linear_probe")]), 2, "audit/summary.json differs"),
    "4 an attack is dropped": (
        lambda p: p["figures"]["gates"].pop("bank_loss"), 0, "was declared and is not there"),
    "6 a verdict that the scores do not give": (lambda p: p.update(verdict="pass"), 2, "verdict: the run directory"),
    "6 a figure": (lambda p: p["figures"]["aucs"]["bank_loss"].update(unlearned=0.5), 2, "figures.aucs.bank_loss"),
    "7 fewer attempts": (lambda p: p["ledger"]["attempts"].update(unlearn=0), 2, "ledger.attempts.unlearn"),
    "8 another manifest": (
        lambda p: p["private"].update({"shards/index.arrow": "0" * 64}), 2, "shards/index.arrow"),
    "9 more images": (lambda p: p["coverage"].update(consumed_min=9), 2, "coverage.consumed_min"),
    "12 another original": (lambda p: p["states"].update(original="0" * 64), 2, "states.original"),
    "a broken chain": (lambda p: p.update(sequence=2), 0, "its chain was changed"),
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNED)
def test_the_operator_signs_something_else(case, name):
    edit, level, sentence = SIGNED[name]
    found = case.check(case.signed(edit))
    assert found.exit_code == 8 and words(found)[level] == FAILS and HOLDS in [*words(found), HOLDS][:level] + [HOLDS]
    assert sentence in found.checks[level].why and "Do not rely on this certificate." in str(found), str(found)


def test_1_an_outsider_edits_the_envelope(case):
    for edit in (
        lambda o: o.update(comment="hello"), lambda o: o.update(payloadType="text/plain"),
        lambda o: o.update(signatures=[]), lambda o: o.update(signatures=o["signatures"] * 2),
    ):  # fmt: skip
        found = case.check(rewritten(case, edit), export=None, run=None)
        assert found.exit_code == 8 and words(found)[0] == FAILS
    spaced = json.dumps(json.loads(case.path.read_bytes())).encode()
    assert case.check(spaced, export=None, run=None).exit_code == 8


def test_2_another_key_and_one_key_twice(case):
    found = case.check(case.signed(lambda p: None, "stranger"))
    assert found.exit_code == 8 and "no trusted operator's key" in found.checks[0].why
    with pytest.raises(ConfigError, match="one key twice"):
        read_trust(case.trusting("operator", "operator"))


def test_5_another_encoder_is_deployed(case, tmp_path):
    export = shutil.copytree(case.run / "export", tmp_path / "export")
    shutil.copy(case.run / "original/export/model.safetensors", export)
    found = case.check(export=export)
    assert found.exit_code == 8 and "is not the certified file" in found.checks[1].why


@pytest.mark.parametrize("forge", forgeries.FORGERIES, ids=lambda forge: forge.__name__)
def test_6_7_10_12_files_of_the_run_were_changed(case, tmp_path, forge):
    run = shutil.copytree(case.run, tmp_path / "run")
    forge(run)
    found = case.check(run=run, export=None)
    assert found.exit_code == 8 and words(found)[2] == FAILS


@pytest.mark.parametrize("forge", forgeries.FORGERIES, ids=lambda forge: forge.__name__)
def test_what_was_changed_before_is_not_certified(case, tmp_path, monkeypatch, capsys, forge):
    monkeypatch.setenv("DISTUNLEARN_PASSPHRASE", PASSPHRASE)
    run = shutil.copytree(case.run, tmp_path / "run")
    (run / "evidence" / "certificate.json").unlink()
    forge(run)
    assert main(["certify", str(run), "--key", str(case.folder / "operator")]) == 3
    assert forgeries.FORGERIES[forge] in capsys.readouterr().err
    assert not (run / "evidence" / "certificate.json").exists()


def test_11_made_up_scores_hold_here_and_the_certificate_says_so(case):
    """Never caught below level 3: the sentence stands in every answer."""
    assert "Below level 3 the raw scores themselves are the operator's word." in str(case.check())


def test_20_nothing_in_the_certificate_names_an_image_or_a_place(case):
    text = json.dumps(case.statement())
    ids = json.loads((case.run / "audit/scores-original.json").read_text())["samples"]
    for name in [*ids, str(case.run), str(case.folder), "digits/"]:
        assert name not in text, name


def test_every_field_of_the_predicate_counts(case):
    """Removed, or of another type, or not a number: refused."""
    predicate = case.statement()["predicate"]
    read_predicate({"predicate": predicate})

    def places(value: Any, at: tuple = ()) -> list[tuple]:
        inner = value.items() if isinstance(value, dict) else ()
        return [(*at, key) for key, _ in inner] + [place for key, v in inner for place in places(v, (*at, key))]

    free = {"gates", "aucs", "private", "states", "attempts", "steps"}  # keys may be fewer there; level 2 compares
    for place in places(predicate):
        for value in (..., [1], float("nan")):
            if value is ... and len(place) > 1 and (set(place[:-1]) & free):
                continue
            edited = json.loads(json.dumps(predicate))
            inner = edited
            for key in place[:-1]:
                inner = inner[key]
            if value is ...:
                del inner[place[-1]]
            else:
                inner[place[-1]] = value
            if edited != predicate:
                with pytest.raises(EvidenceError):
                    read_predicate({"predicate": edited})


def test_the_verifier_works_alone_without_torch_network_and_home(case, tmp_path):
    """As the package of its own wheel: a copy of the folder under its other name."""
    shutil.copytree(Path(envelope.__file__).parent, tmp_path / "distunlearn_verify")
    script = tmp_path / "check.py"
    script.write_text(
        "import socket, sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('torch', 'distunlearn', 'timm', 'pandas'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "socket.socket.connect = socket.getaddrinfo = None\n"
        "from distunlearn_verify.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    argv = [str(case.path), "--trust", str(case.trust), "--run", str(case.run), "--export", str(case.run / "export")]
    done = subprocess.run(
        [sys.executable, str(script), *argv], capture_output=True, text=True,
        env={"HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == case.check().exit_code, done.stderr
    assert "every gate from the raw scores       holds" in done.stdout


def test_a_key_has_a_passphrase_and_is_its_owner_s(case, tmp_path):
    with pytest.raises(ConfigError, match="passphrase is empty"):
        make_key(tmp_path / "open", "")
    with pytest.raises(ConfigError, match="does not open"):
        load_key(case.folder / "operator", "wrong")
    with pytest.raises(ConfigError, match="choose another name"):
        make_key(case.folder / "operator", PASSPHRASE)
    assert (case.folder / "operator").stat().st_mode & 0o777 == 0o600
