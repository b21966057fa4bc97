"""The verbs `certify`, `receipt` and `revoke`: what a finished run shows, signed; for all, and for one person."""

from __future__ import annotations

import os
from pathlib import Path

from distunlearn.common.files import write_atomic
from distunlearn.config.shape import plain
from distunlearn.engine.commitment import chain_link, write_rows
from distunlearn.engine.provenance import code_digest
from distunlearn.engine.run_directory import find_manifest, saved_config
from distunlearn.engine.run_lock import owned
from distunlearn.engine.session import load_own_parts
from distunlearn.errors import ConfigError, DataError
from distunlearn.verify.certificate import CERTIFICATE, make_predicate, read_predicate
from distunlearn.verify.commitment import run_rules
from distunlearn.verify.envelope import load, read, sign
from distunlearn.verify.keys import load_key
from distunlearn.verify.ledger import read_ledger
from distunlearn.verify.receipt import make_receipt, read_rows
from distunlearn.verify.revocation import REASONS
from distunlearn.verify.secret import SECRET, read_secret
from distunlearn.verify.states import export_digests
from distunlearn.verify.timestamps import write_query


def certify(run_dir: Path, key: Path, passphrase: str, version: str, previous: Path | None = None) -> Path:
    """Write `evidence/certificate.json` of a finished run, whatever its verdict, and return its path.

    key: file of the operator's private key. version: of this package. previous: certificate of the encoder that this
    run began with; None: that of the run that it went on from.

    Raises:
        ConfigError: the key or its passphrase is wrong, or a process is at work in the run directory.
        DataError: it is not finished, or its files contradict each other.
    """
    folder, private = Path(run_dir), load_key(Path(key), passphrase)
    cfg = saved_config(folder, world=1)
    manifest = find_manifest(cfg, folder)
    if manifest is None:
        raise DataError(f"{folder} has no shards, which say what was requested; certify before they are deleted.")
    load_own_parts(cfg)
    chain = chain_link(cfg)
    if previous is not None:
        before = read(load(previous), "certificate")
        chain = read_predicate(before.statement).sequence + 1, before.digest
    tool = {"version": version, "code": code_digest()}
    with owned(folder):
        write_rows(folder, manifest)
        predicate = make_predicate(folder, run_rules(plain(cfg), folder), tool, chain)
        data = sign("certificate", export_digests(folder / "export"), predicate, private)
        write_atomic(folder / CERTIFICATE, data)
        write_query(folder / CERTIFICATE, read(data, "certificate").digest)
    return folder / CERTIFICATE


def receipt(run_dir: Path, sample_id: str, out: Path) -> Path:
    """Write the receipt for one image of a certified run; it is personal data and goes to that person alone.

    Raises:
        ConfigError: the image was not in the request, or the file is there.
        DataError: the run is not certified, or its evidence was disposed of.
    """
    folder = Path(run_dir)
    if not (folder / CERTIFICATE).exists():
        raise DataError(f"{folder} has no {CERTIFICATE}; certify it first.")
    with owned(folder):
        envelope = read(load(folder / CERTIFICATE), "certificate")
        certificate = read_predicate(envelope.statement)
        secret, lines = read_secret(folder / SECRET), read_ledger(folder / "ledger.jsonl")
        data = make_receipt(sample_id, read_rows(folder), secret, lines, envelope.digest, certificate.commitment)
    try:
        with open(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
    except OSError as error:
        raise ConfigError(f"{out} cannot be made ({error.strerror}); choose another name.") from None
    return out


def revoke(certificate: Path, reason: str, key: Path, passphrase: str, out: Path) -> Path:
    """Sign that a certificate is no longer to be relied on, as operator or officer."""
    if reason not in REASONS:
        raise ConfigError(f"--reason is {reason[:40]!r}; expected one of {', '.join(REASONS)}.")
    digest = read(load(Path(certificate)), "certificate").digest
    content = {"certificate": digest, "reason": reason}
    write_atomic(out, sign("revocation", {"certificate": digest}, content, load_key(key, passphrase)))
    return out
