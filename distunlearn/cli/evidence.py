"""The verbs of evidence: keygen, commit, countersign, certify, receipt, revoke, verify."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import tyro

from distunlearn import __version__
from distunlearn.cli.arguments import Config, Out, Overrides, Previous, Recipe, RunDir, settings_of
from distunlearn.cli.output import Verb, tell
from distunlearn.common.launcher import is_main
from distunlearn.errors import ConfigError

File = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE", help="certificate.json of a run")]
Key = Annotated[Path, tyro.conf.arg(metavar="FILE", help="private key, as keygen makes it")]
Target = Annotated[Path, tyro.conf.arg(metavar="FILE", help="file to write; it must not be there")]


CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")  # of a processor, as torch calls them


def _module(name: str) -> ModuleType:
    """A module of the package, imported when it is used: `--help` stays quick."""
    return importlib.import_module(f"distunlearn.{name}")


def _passphrase(*, twice: bool = False) -> str:
    return _module("verify.keys").passphrase(twice=twice)


def _file(words: str, metavar: str = "FILE") -> Any:
    """How an optional path is shown."""
    return tyro.conf.arg(metavar=metavar, help=words, help_behavior_hint="")


@dataclass(frozen=True)
class Keygen(Verb):
    """Make an Ed25519 key under a passphrase: FILE, and FILE.pub for those who are to trust it."""

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE", help="key to make; it must not be there")]

    def __call__(self) -> int:
        make_key = _module("verify.keys").make_key
        made = make_key(self.file, _passphrase(twice=True))
        tell(f"key {made}", {"key": made})
        return 0


@dataclass(frozen=True)
class Commit(Verb):
    """Check and prepare everything, train nothing, and write what an officer is to countersign."""

    recipe: Recipe = None
    out: Out = tyro.MISSING
    config: Config = None
    previous: Previous = None
    overrides: Overrides = ()

    def __call__(self) -> int:
        path = _module("run.commit").commit(settings_of(self), self.out)
        tell(str(path), {"file": path})
        return 0


@dataclass(frozen=True)
class Countersign(Verb):
    """Officer: show a commitment in words, draw the nonce, sign, and enter it in the register."""

    request: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="REQUEST", help="what `commit` wrote")]
    key: Key = tyro.MISSING
    register: Annotated[Path, tyro.conf.arg(metavar="FILE", help="your register; made if it is not there")] = (
        tyro.MISSING
    )
    reference: Annotated[str, tyro.conf.arg(metavar="WORD", help="your own word for the request to forget")] = (
        tyro.MISSING
    )

    def __call__(self) -> int:
        verb = _module("verify.countersign")
        words = verb.in_words(self.request)
        print(words, file=sys.stderr if self.json else sys.stdout, flush=True)  # before the key is asked for
        path = verb.countersign(self.request, self.key, _passphrase(), self.register, self.reference)
        tell(str(path), {"file": path, "commitment": words})
        return 0


@dataclass(frozen=True)
class Certify(Verb):
    """Check a finished run against itself, and sign what it shows as evidence/certificate.json."""

    out: RunDir
    key: Key = tyro.MISSING
    previous: Annotated[Path | None, _file("certificate of the encoder that this run began with")] = None

    def __call__(self) -> int:
        certify = _module("run.certify").certify
        path = certify(self.out, self.key, _passphrase(), __version__, self.previous)
        tell(f"{path}: {path.stat().st_size} bytes", {"file": path})
        return 0


@dataclass(frozen=True)
class Receipt(Verb):
    """Write the receipt for one image of a certified run; it goes to that person alone."""

    run_dir: RunDir
    id: Annotated[str, tyro.conf.arg(metavar="ID", help="of the image")] = tyro.MISSING
    out: Target = tyro.MISSING

    def __call__(self) -> int:
        receipt = _module("run.certify").receipt
        path = receipt(self.run_dir, self.id, self.out)
        tell(f"{path}: {path.stat().st_size} bytes", {"file": path})
        return 0


@dataclass(frozen=True)
class Residuals(Verb):
    """Print who still holds images, ids or weights of a run: what `dispose` deletes, and what is out of reach."""

    run_dir: RunDir

    def __call__(self) -> int:
        found = _module("run.dispose").residuals(self.run_dir)
        tell(json.dumps(found, indent=1), found)
        return 0


@dataclass(frozen=True)
class Dispose(Verb):
    """Delete images, ids and weights of a certified run, and sign a record; without --apply only list them."""

    run_dir: RunDir
    key: Key = tyro.MISSING
    apply: Annotated[bool, tyro.conf.arg(help="delete, for good", help_behavior_hint="")] = False

    def __call__(self) -> int:
        if not self.apply:
            return Residuals(self.run_dir)()
        record = _module("run.dispose").dispose(self.run_dir, self.key, _passphrase())
        tell(str(record), {"file": record})
        return 0


@dataclass(frozen=True)
class Revoke(Verb):
    """Sign that a certificate is no longer to be relied on."""

    certificate: File
    reason: Annotated[str, tyro.conf.arg(metavar="WORD", help="refuted, superseded, withdrawn or key-compromise")] = (
        tyro.MISSING
    )
    key: Key = tyro.MISSING
    out: Target = tyro.MISSING

    def __call__(self) -> int:
        revoke = _module("run.certify").revoke
        path = revoke(self.certificate, self.reason, self.key, _passphrase(), self.out)
        tell(str(path), {"file": path})
        return 0


@dataclass(frozen=True)
class Verify:
    """Check a certificate as far as the inputs allow; needs no network."""

    certificate: File
    trust: Annotated[Path | None, _file("your own file of the keys that you trust")] = None
    commitment: Annotated[Path | None, _file("countersigned before the run; else the run directory's")] = None
    register: Annotated[Path | None, _file("the officer's register of commitments")] = None
    revocations: Annotated[Path | None, _file("folder of revocations", "DIR")] = None
    previous: Annotated[Path | None, _file("the certificate before this one")] = None
    timestamps: Annotated[Path | None, _file("folder of commitment.tsr and certificate.tsr", "DIR")] = None
    tsa: Annotated[Path | None, _file("root certificates of the time stamp services that you trust")] = None
    disposal: Annotated[Path | None, _file("what the operator signed about deletion")] = None
    receipt: Annotated[Path | None, _file("receipt of one image")] = None
    image: Annotated[Path | None, _file("the very file of that image")] = None
    export: Annotated[Path | None, _file("folder of the encoder that is deployed", "DIR")] = None
    run: Annotated[Path | None, _file("run directory", "DIR")] = None
    secret: Annotated[Path | None, _file("its run secret; else the run directory's")] = None
    shards: Annotated[Path | None, _file("folder of the shards, for your own audit", "DIR")] = None
    replay: Annotated[
        str | None,
        tyro.conf.arg(metavar="K|all", help="segments to repeat; needs --run and --shards", help_behavior_hint=""),
    ] = None
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="plain data in place of words")] = False

    def __call__(self) -> int:
        cli = _module("verify.cli")
        inputs = {name: getattr(self, name) for name in cli.INPUTS}
        more = {}
        if self.run is not None:  # what is at work changes its files, which would be called forged
            _module("engine.run_lock").refuse_if_owned(self.run)
        if self.replay is not None and (self.run is None or self.shards is None or not _is_count(self.replay)):
            raise ConfigError("--replay takes a number of segments or all, and needs --run and --shards.")
        if self.run is not None and self.shards is not None:
            _compute_as(self.run)
            more = _module("run.replay").further(self.run, self.shards, self.replay)
        return cli.run(self.certificate, inputs, more, as_json=self.json, silent=not is_main())


def _compute_as(run: Path) -> None:
    """Ask torch, before it is imported, for the kernels that a run was made with; they may not be this processor's."""
    lines = _module("verify.ledger").read_ledger(run / "ledger.jsonl")
    device = next((line["numerics"]["device"] for line in lines if line["event"] == "start"), None)
    if device in CAPABILITIES:
        os.environ.setdefault("ATEN_CPU_CAPABILITY", device.lower())


def _is_count(text: str) -> bool:
    return text == "all" or text.isdecimal()


VERBS = (Keygen, Commit, Countersign, Certify, Receipt, Residuals, Dispose, Revoke, Verify)
