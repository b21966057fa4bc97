"""The verb `certify`: what a finished run shows, signed."""

from __future__ import annotations

from pathlib import Path

from distunlearn.common.files import write_atomic
from distunlearn.config.shape import plain
from distunlearn.engine.provenance import code_digest
from distunlearn.engine.run_directory import saved_config
from distunlearn.engine.run_lock import owned
from distunlearn.verify.certificate import make_predicate
from distunlearn.verify.envelope import sign
from distunlearn.verify.figures import Rules
from distunlearn.verify.keys import load_key
from distunlearn.verify.states import export_digests


def certify(run_dir: str | Path, key: str | Path, passphrase: str, version: str) -> Path:
    """Write `evidence/certificate.json` of a finished run, whatever its verdict, and return its path.

    key: file of the operator's private key. version: of this package.

    Raises:
        ConfigError: the key or its passphrase is wrong, or a process is at work in the run directory.
        DataError: it is not finished, or its files contradict each other.
    """
    folder, private = Path(run_dir), load_key(Path(key), passphrase)
    rules = Rules.of(plain(saved_config(folder, world=1)))
    path = folder / "evidence" / "certificate.json"
    with owned(folder):
        predicate = make_predicate(folder, rules, {"version": version, "code": code_digest()})
        write_atomic(path, sign("certificate", export_digests(folder / "export"), predicate, private))
    return path
