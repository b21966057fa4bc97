"""One tiny run as two people make it: committed to, countersigned, run, certified; and what a verifier holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny

from distunlearn.verify import envelope
from distunlearn.verify.check import Given, Verified, verify
from distunlearn.verify.keys import load_key, make_key, read_trust

PASSPHRASE = "correct horse"
REFERENCE = "ticket 17"
KEYS = ("operator", "officer", "stranger")
TRUSTED = (("operator", "operator"), ("officer", "officer"))


class Case:
    """folder: of keys, trust file, register and commitment. run: the run directory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        self.path = self.run / "evidence" / "certificate.json"
        self.register, self.asked = folder / "register.jsonl", folder / "commitment.json"
        self.commitment = self.run / "evidence" / "commitment.json"  # with both signatures

    def make(self, *extra: str) -> Case:
        for name in KEYS:
            make_key(self.folder / name, PASSPHRASE)
        self.trust = self.trusting(*TRUSTED)
        self.ask(*extra)
        self.command("run", "digits", "--out", self.run, *tiny.settings(*extra, *self.declared()), codes=(0, 6, 7))
        self.command("certify", self.run, "--key", self.folder / "operator")
        return self

    def ask(self, *extra: str) -> None:
        """Commit, and have it countersigned in the officer's folder."""
        self.command("commit", "digits", "--out", self.run, *tiny.settings(*extra))
        shutil.copy(self.run / "evidence/commitment.request.json", self.folder)
        self.command("countersign", self.folder / "commitment.request.json", "--key", self.folder / "officer",
                     "--register", self.register, "--reference", REFERENCE)  # fmt: skip

    def declared(self) -> tuple[str, ...]:
        return f"evidence.commitment={self.asked}", f"evidence.key={self.folder / 'operator'}", "evidence.keep=all"

    def command(self, *args: object, codes: tuple[int, ...] = (0,)) -> Any:
        done = tiny.command(*map(str, args), DISTUNLEARN_PASSPHRASE=PASSPHRASE)
        assert done.returncode in codes, done.stderr[-3000:]
        return done

    def key(self, name: str = "operator") -> Any:
        return load_key(self.folder / name, PASSPHRASE)

    def trusting(self, *holders: tuple[str, str]) -> Path:
        path = self.folder / f"trust-{'-'.join(name for name, _ in holders)}.json"
        keys = [{"pem": (self.folder / f"{name}.pub").read_text(), "role": role} for name, role in holders]
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

    def copy(self, place: Path) -> Path:
        return shutil.copytree(self.run, place / "run")

    def check(self, data: bytes | None = None, **more: Any) -> Verified:
        """With everything that a verifier has for levels 0 to 2, but for what is given as None."""
        run = more.get("run") or self.run
        given = {"trust": read_trust(self.trust), "export": run / "export", "run": run, "commitment": self.commitment,
                 "register": self.register} | more  # fmt: skip
        return verify(data if data is not None else self.path.read_bytes(), Given(**given))

    def statement_alone(self, data: bytes | None = None, **more: Any) -> Verified:
        """Level 0."""
        return self.check(data, **{"export": None, "run": None} | more)
