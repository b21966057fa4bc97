"""Time stamps by a service of the test's own (`openssl ts`): asked for, checked offline, and what they date."""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distunlearn.verify import timestamps
from distunlearn.verify.check import FAILS, HOLDS, OPEN
from distunlearn.verify.envelope import read
from distunlearn.verify.errors import ConfigError
from distunlearn.verify.keys import read_trust

CONFIG = """
[tsa]
serial = {folder}/serial
crypto_device = builtin
default_policy = 1.2.3.4
digests = sha256
signer_digest = sha256
ess_cert_id_alg = sha256
[stamp]
basicConstraints = CA:false
extendedKeyUsage = critical,timeStamping
[root]
basicConstraints = critical,CA:true
[req]
distinguished_name = name
[name]
"""


class Service:
    """A root, and a certificate of it that signs time stamps."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.root, self.config = folder, folder / "root.pem", folder / "openssl.cnf"
        self.config.write_text(CONFIG.format(folder=folder))
        (folder / "serial").write_text("01\n")
        new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-config", str(self.config))
        self.openssl("req", "-x509", *new, "-keyout", "root.key", "-out", "root.pem", "-subj", "/CN=root",
                     "-extensions", "root")  # fmt: skip
        self.openssl("req", *new, "-keyout", "tsa.key", "-out", "tsa.csr", "-subj", "/CN=tsa")
        self.openssl("x509", "-req", "-in", "tsa.csr", "-CA", "root.pem", "-CAkey", "root.key", "-CAcreateserial",
                     "-out", "tsa.pem", "-extfile", str(self.config), "-extensions", "stamp")  # fmt: skip

    def openssl(self, *words: str) -> None:
        done = subprocess.run(["openssl", *words], cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def answer(self, query: Path, to: Path) -> None:
        self.openssl("ts", "-reply", "-config", str(self.config), "-section", "tsa", "-queryfile", str(query),
                     "-signer", "tsa.pem", "-inkey", "tsa.key", "-out", str(to))  # fmt: skip


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Service:
    return Service(tmp_path_factory.mktemp("tsa") / "tsa")


@pytest.fixture(scope="module")
def stamps(case, service, tmp_path_factory) -> Path:
    """Answers for both statements, the commitment's first."""
    folder = tmp_path_factory.mktemp("stamps")
    service.answer(case.folder / "commitment.tsq", folder / "commitment.tsr")
    service.answer(case.path.with_suffix(".tsq"), folder / "certificate.tsr")
    return folder


def test_a_request_is_what_openssl_reads_of_the_digest_that_was_signed(case):
    path = case.path.with_suffix(".tsq")
    said = subprocess.run(["openssl", "ts", "-query", "-in", str(path), "-text"], capture_output=True, text=True).stdout
    digest = read(case.path.read_bytes(), "certificate").digest
    shown = "".join(line.partition(" - ")[2].partition("   ")[0] for line in said.splitlines() if " - " in line)
    assert "Hash Algorithm: sha256" in said and "Certificate required: yes" in said and "Version: 1" in said
    assert shown.replace("-", " ").replace(" ", "") == digest


def test_answers_for_both_statements_hold_and_are_told(case, stamps, service):
    found = case.check(timestamps=stamps, tsa=service.root)
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    assert [check.word for check in found.checks[:3]] == [HOLDS] * 3, str(found)
    assert f"time stamped: certificate {today}" in str(found) and f"commitment {today}" in str(found)
    assert "time stamped" not in str(case.check()), "what is not asked for is not said"


@pytest.mark.parametrize("kind", ["swapped", "another root", "cut", "nonsense", "a byte"])
def test_another_answer_does_not_hold(case, stamps, service, tmp_path, kind):
    folder, root = shutil.copytree(stamps, tmp_path / "stamps"), service.root
    path = folder / "certificate.tsr"
    data = path.read_bytes()
    if kind == "swapped":
        shutil.copy(folder / "commitment.tsr", path)
    elif kind == "another root":
        root = Service(tmp_path / "other").root
    else:
        path.write_bytes({"cut": data[:-9], "nonsense": b"0\x03", "a byte": data[:-9] + b"\0" + data[-8:]}[kind])
    found = case.statement_alone(timestamps=folder, tsa=root)
    assert found.exit_code == 8 and found.checks[0].word == FAILS and "is no time stamp" in str(found), str(found)


def test_7_a_certificate_that_was_seen_before_its_commitment(case, service, tmp_path):
    service.answer(case.path.with_suffix(".tsq"), tmp_path / "certificate.tsr")
    time.sleep(1.1)
    service.answer(case.folder / "commitment.tsq", tmp_path / "commitment.tsr")
    found = case.statement_alone(timestamps=tmp_path, tsa=service.root)
    assert found.exit_code == 8 and "before its commitment" in found.checks[0].why


def test_7_a_run_that_began_before_its_commitment_was_seen(case, stamps, service, monkeypatch):
    """The tiny run is seconds older than its time stamp: without the slack for clocks that is refused."""
    monkeypatch.setattr(timestamps, "SLACK", datetime.timedelta(0))
    found = case.check(timestamps=stamps, tsa=service.root, export=None)
    assert found.exit_code == 8 and found.checks[2].word == FAILS and "the run came first" in found.checks[2].why


def test_21_a_key_counts_in_its_period_alone(case, stamps, service, tmp_path):
    now = datetime.datetime.now(datetime.timezone.utc)

    def trusting(**period: datetime.timedelta):
        trust = json.loads(case.trust.read_text())
        trust["keys"][0] |= {name: (now + delta).isoformat() for name, delta in period.items()}
        (tmp_path / "trust.json").write_text(json.dumps(trust))
        return read_trust(tmp_path / "trust.json")

    day = datetime.timedelta(days=1)
    given = {"timestamps": stamps, "tsa": service.root}
    assert case.statement_alone(trust=trusting(since=-day, until=day), **given).checks[0].word == HOLDS
    for period in ({"until": -day}, {"since": day}):
        found = case.statement_alone(trust=trusting(**period), **given)
        assert found.exit_code == 8 and "not valid by the trust file" in found.checks[0].why, str(found)
    found = case.statement_alone(trust=trusting(since=-day))
    assert found.checks[0].word == OPEN and "give --timestamps" in found.checks[0].why and found.exit_code != 0
    (tmp_path / "none").mkdir()
    found = case.statement_alone(trust=trusting(since=-day), timestamps=tmp_path / "none", tsa=service.root)
    assert found.checks[0].word == OPEN and "no time" in found.checks[0].why


def test_what_cannot_be_checked_is_said(case, stamps, service, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="go together"):
        case.statement_alone(timestamps=stamps)
    (tmp_path / "roots").write_text("none")
    with pytest.raises(ConfigError, match="give root certificates in PEM"):
        case.statement_alone(timestamps=stamps, tsa=tmp_path / "roots")
    monkeypatch.setitem(sys.modules, "rfc3161_client", None)
    with pytest.raises(ConfigError, match="pip install rfc3161-client"):
        case.statement_alone(timestamps=stamps, tsa=service.root)
