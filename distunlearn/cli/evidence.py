"""The verbs of evidence: keygen, certify, verify."""

from __future__ import annotations

import getpass
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from distunlearn import __version__
from distunlearn.cli.arguments import RunDir
from distunlearn.errors import ConfigError

PASSPHRASE = "DISTUNLEARN_PASSPHRASE"
File = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
Key = Annotated[Path, tyro.conf.arg(metavar="FILE", help="private key, as keygen makes it")]


TrustFile = Annotated[
    Path | None, tyro.conf.arg(metavar="FILE", help="your own file of the keys that you trust", help_behavior_hint="")
]
Export = Annotated[
    Path | None, tyro.conf.arg(metavar="DIR", help="folder of the encoder that is deployed", help_behavior_hint="")
]
Run = Annotated[Path | None, tyro.conf.arg(metavar="DIR", help="run directory", help_behavior_hint="")]
SecretFile = Annotated[
    Path | None,
    tyro.conf.arg(metavar="FILE", help="its run secret, where it is not in the run directory", help_behavior_hint=""),
]


@dataclass(frozen=True)
class Keygen:
    """Make an Ed25519 key under a passphrase: FILE, and FILE.pub for those who are to trust it."""

    file: File

    def __call__(self) -> int:
        from distunlearn.verify.keys import make_key

        print(f"key {make_key(self.file, _passphrase(twice=True))}")
        return 0


@dataclass(frozen=True)
class Certify:
    """Check a finished run against itself, and sign what it shows as evidence/certificate.json."""

    out: RunDir
    key: Key = tyro.MISSING

    def __call__(self) -> int:
        from distunlearn.run.certify import certify

        path = certify(self.out, self.key, _passphrase(), __version__)
        print(f"{path}: {path.stat().st_size} bytes")
        return 0


@dataclass(frozen=True)
class Verify:
    """Check a certificate as far as the inputs allow; needs no network and trains nothing."""

    certificate: File
    trust: TrustFile = None
    export: Export = None
    run: Run = None
    secret: SecretFile = None
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="plain data in place of words")] = False

    def __call__(self) -> int:
        from distunlearn.verify import cli

        return cli.run(
            self.certificate, trust=self.trust, export=self.export, run_dir=self.run, secret=self.secret,
            as_json=self.json,
        )  # fmt: skip


def _passphrase(*, twice: bool = False) -> str:
    """Of the variable, or typed."""
    found = os.environ.get(PASSPHRASE)
    if found is not None:
        return found
    if not sys.stdin.isatty():
        raise ConfigError(f"no passphrase; set {PASSPHRASE}, or call this from a terminal.")
    found = getpass.getpass("passphrase: ")
    if twice and getpass.getpass("again: ") != found:
        raise ConfigError("the passphrases differ; try again.")
    return found
