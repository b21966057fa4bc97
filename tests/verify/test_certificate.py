"""Certificates: signed, read strictly, checked level by level; light, offline, and in their own wheel."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from evidence_case import PASSPHRASE

from distunlearn.cli.main import main
from distunlearn.verify import countersign, envelope
from distunlearn.verify.certificate import LIMITS, read_predicate
from distunlearn.verify.check import EXIT, FAILS, HOLDS, OPEN
from distunlearn.verify.commitment import Commitment, read_commitment, register_lines
from distunlearn.verify.errors import ConfigError, EvidenceError
from distunlearn.verify.forms import read_form
from distunlearn.verify.keys import load_key, make_key, read_trust
from distunlearn.verify.keys import main as keys_main
from distunlearn.verify.receipt import read_rows


def words(found) -> list[str]:
    return [check.word for check in found.checks]


def test_an_honest_certificate_holds_and_keeps_its_verdict(case, capsys):
    found = case.check()
    assert words(found) == [HOLDS, HOLDS, HOLDS, OPEN, OPEN], str(found)
    assert found.exit_code == EXIT[found.verdict] and LIMITS[1] in str(found) and LIMITS[4] in str(found)
    assert "countersigned before the run, for request ticket 17; 1 try" in str(found) or "1 try" in str(found)
    assert LIMITS[2] not in str(found), "there was a commitment"
    assert case.path.stat().st_size <= 8192
    argv = ["verify", str(case.path), "--trust", str(case.trust), "--run", str(case.run)]
    assert main(argv) == found.exit_code and main([*argv, "--json"]) == found.exit_code
    said = capsys.readouterr().out
    assert json.loads(said[said.index("{") :])["exit_code"] == found.exit_code and "not checked: give --export" in said


def test_what_is_not_given_is_never_a_pass(case):
    alone = read_trust(case.trusting(("operator", "operator")))
    for lacking, sentence in (
        ({"trust": None}, "nobody vouches for"), ({"commitment": None}, "give --commitment"),
        ({"trust": alone}, "officer's key"),
    ):  # fmt: skip
        found = case.statement_alone(**lacking)
        assert words(found)[0] == OPEN and found.exit_code != 0 and sentence in str(found)


def keys(trust) -> list[list[str]]:
    return [sorted(trust.of(role)) for role in ("operator", "officer")]


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_every_byte_of_the_envelope_counts(case):
    """None is read as what the operator signed; 300 of them, drawn by the seed 0, by `verify` as a whole."""
    data, trusted = case.path.read_bytes(), read_trust(case.trust).of("operator")
    assert envelope.read(data, "certificate").signed_by(trusted)
    for at in range(len(data)):
        try:
            signers = envelope.read(flip(data, at), "certificate").signed_by(trusted)
        except EvidenceError:
            continue
        assert not signers, at
    for at in random.Random(0).sample(range(len(data)), 300):
        found = case.statement_alone(flip(data, at), register=None)
        assert found.exit_code == 8 and words(found)[0] == FAILS, at


def test_bytes_of_the_trust_file_and_the_commitment_count(case, tmp_path):
    """All of the trust file, 500 of the commitment, drawn by the seed 0: refused, or never believed as before."""
    honest = case.statement_alone()
    drawn = random.Random(0)
    for path, name in ((case.trust, "trust"), (case.commitment, "commitment")):
        data, changed = path.read_bytes(), tmp_path / name
        for at in range(len(data)) if name == "trust" else drawn.sample(range(len(data)), 500):
            changed.write_bytes(flip(data, at))
            try:
                given = read_trust(changed) if name == "trust" else changed
            except ConfigError:
                continue
            if name == "trust" and keys(given) == keys(read_trust(case.trust)):
                continue  # the very keys in another spelling
            found = case.statement_alone(**{name: given})
            assert found.exit_code == 8 or words(found)[0] == OPEN, (name, at)
    assert words(honest)[0] == HOLDS


def test_every_field_of_the_predicate_counts(case):
    """Removed, of another type, not a number, too large: refused."""
    content = envelope.read(case.commitment.read_bytes(), "commitment").statement["predicate"]
    free = {"gates", "aucs", "private", "states", "attempts", "steps", "segments", "numerics"}  # level 2 compares keys
    numbers = {"consumed_mean", "confidence", "view_agreement", "attack", "utility_points", "margin"}  # of any size
    for predicate, read in (
        (case.statement()["predicate"], lambda p: read_predicate({"predicate": p})),
        (content, lambda p: read_form(Commitment, p, "it")),
    ):
        read(predicate)
        for place in places(predicate):
            for value in (..., [1], float("nan"), 2**53):
                if value is ... and len(place) > 1 and set(place[:-1]) & free:
                    continue
                edited = edit(predicate, place, value)
                if edited != predicate and not (value == 2**53 and place[-1] in numbers):
                    with pytest.raises(EvidenceError):
                        read(edited)


def at(value: Any, place: tuple) -> Any:
    for key in place:
        value = value[key]
    return value


def places(value: Any, before: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else ()
    return [(*before, key) for key, _ in inner] + [place for key, v in inner for place in places(v, (*before, key))]


def edit(content: dict, place: tuple, value: Any) -> dict:
    edited = json.loads(json.dumps(content))
    inner = at(edited, place[:-1])
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return edited


def test_a_key_that_occurs_twice_is_refused(case):
    payload = envelope.read(case.path.read_bytes(), "certificate").payload
    with pytest.raises(EvidenceError, match="canonical"):
        envelope.canonical(payload[:-1] + b',"_type":"x"}', "the statement")


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


def test_the_officer_needs_the_light_wheel_alone(case, tmp_path, monkeypatch, capsys):
    """keygen and countersign of the wheel; a request is signed once, and another file is none."""
    monkeypatch.setenv("DISTUNLEARN_PASSPHRASE", PASSPHRASE)
    monkeypatch.setattr(sys, "argv", ["distunlearn-keygen", str(tmp_path / "key")])
    assert keys_main() == 0 and (tmp_path / "key.pub").exists() and keys_main() == 2
    request = Path(shutil.copy(case.folder / "commitment.request.json", tmp_path))
    argv = [str(request), "--key", str(tmp_path / "key"), "--register", str(tmp_path / "register"), "--reference", "a"]
    assert countersign.main(argv) == 0
    assert "It is asked to forget 24 images" in capsys.readouterr().out
    envelope_, made = read_commitment((tmp_path / "commitment.json").read_bytes())
    assert made.reference == "a" and made.nonce is not None
    assert [line["commitment"] for line in register_lines(tmp_path / "register")] == [envelope_.digest]
    assert countersign.main(argv) == 2 and "countersigned once" in capsys.readouterr().err
    argv[0] = str(tmp_path / "key.pub")
    assert countersign.main(argv) in (2, 3)


def test_no_answer_claims_more_than_was_checked():
    """In messages and templates of verifier and report; a docstring may quote them as little."""
    package = Path(envelope.__file__).parents[1]
    patterns = (
        "verify/*.py",
        "report/**/*.py",
        "report/**/*.j2",
        "cli/evidence.py",
        "run/certify.py",
        "run/dispose.py",
    )
    files = [path for pattern in patterns for path in package.glob(pattern)]
    words = re.compile(r"\b(proven|guaranteed|compliant|erased|certified deletion)\b", re.IGNORECASE)
    assert len(files) > 30 and words.search("was proven")
    assert {path.name: found[0] for path in files if (found := words.search(path.read_text("utf-8")))} == {}


def test_a_key_has_a_passphrase_and_is_its_owner_s(case, tmp_path):
    with pytest.raises(ConfigError, match="passphrase is empty"):
        make_key(tmp_path / "open", "")
    with pytest.raises(ConfigError, match="does not open"):
        load_key(case.folder / "operator", "wrong")
    with pytest.raises(ConfigError, match="choose another name"):
        make_key(case.folder / "operator", PASSPHRASE)
    assert (case.folder / "operator").stat().st_mode & 0o777 == 0o600


def test_a_key_on_the_command_line_is_refused_and_not_shown(case, capsys, monkeypatch):
    monkeypatch.setenv("DISTUNLEARN_PASSPHRASE", PASSPHRASE)
    secret = (case.folder / "operator").read_text()
    assert main(["certify", str(case.run), f"--key={secret}"]) == 2
    said = "".join(capsys.readouterr())
    assert "give the name of its file" in said and secret.splitlines()[1] not in said


@pytest.mark.parametrize("verb", ["certify", "receipt", "dispose", "verify"])
def test_no_verb_of_evidence_works_beside_a_living_owner(case, tmp_path, monkeypatch, capsys, verb):
    """It would sign, or call forged, what another process is changing."""
    monkeypatch.setenv("DISTUNLEARN_PASSPHRASE", PASSPHRASE)
    run, key = case.copy(tmp_path), ["--key", str(case.folder / "operator")]
    arguments = {"certify": [str(run), *key], "dispose": [str(run), *key, "--apply"],
                 "receipt": [str(run), "--id", sorted(read_rows(run))[0], "--out", str(tmp_path / "receipt")],
                 "verify": [str(case.path), "--trust", str(case.trust), "--run", str(run)]}[verb]  # fmt: skip
    alone = (
        "from distunlearn.engine.run_lock import Lease; import sys; Lease(sys.argv[1]); print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", alone, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout.readline() == "1\n"
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        assert main([verb, *arguments]) == 2
        assert f"in use by process {owner.pid} on " in capsys.readouterr().err
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        assert not (tmp_path / "receipt").exists()
        owner.communicate("")
    assert main([verb, *arguments]) in (0, 6, 7)  # control: it has gone


GIVEN = ["commitment", "register", "revocations", "previous", "disposal", "receipt", "image", "timestamps"]


@pytest.mark.parametrize("kind", ["pipe", "device", "sparse"])
@pytest.mark.parametrize("name", GIVEN)
def test_what_a_verifier_is_given_is_no_pipe_and_has_a_size(case, tmp_path, kind, name):
    """It neither waits nor fills the memory, and the evidence does not hold by it."""
    path = tmp_path / ("certificate.tsr" if name == "timestamps" else "a.json")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    given = {name: tmp_path if name in ("revocations", "timestamps") else path}
    if name == "image":
        given["receipt"] = case.path
    if name == "timestamps":
        given["tsa"] = root_of_nobody(tmp_path / "root.pem")
    began = time.monotonic()
    found = case.statement_alone(**given)
    assert found.exit_code == 8 and time.monotonic() - began < 10, str(found)


def root_of_nobody(path: Path) -> Path:
    """A root certificate, by which nothing is signed."""
    command = ["openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", "-subj", "/CN=x", "-keyout", "/dev/null"]
    subprocess.run([*command, "-out", str(path)], check=True, capture_output=True)
    return path
