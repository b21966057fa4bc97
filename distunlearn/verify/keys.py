"""Keys: Ed25519 in PEM, and the trust file, in which a verifier says whose they are.

The trust file comes by another way than what it judges; no key that a statement brings along is believed.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import sys
from pathlib import Path
from typing import Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from .errors import ConfigError
from .records import read_plain

PASSPHRASE = "DISTUNLEARN_PASSPHRASE"
Role = Literal["operator", "officer", "auditor"]


class TrustedKey(BaseModel):
    """pem: public key. role: of its holder. since, until: when its signatures count, by a time stamp; None: always."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    pem: str
    role: Role
    name: str = ""
    since: AwareDatetime | None = None
    until: AwareDatetime | None = None


class Trust(BaseModel):
    """The keys that a verifier trusts."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    version: Literal[1]
    keys: list[TrustedKey]

    def of(self, role: Role) -> dict[str, Ed25519PublicKey]:
        """Public keys of a role, by id."""
        return {key_id(key): key for key in (public_key(k.pem.encode()) for k in self.keys if k.role == role)}

    def periods(self) -> dict[str, TrustedKey]:
        """Keys that have a period, by id."""
        return {key_id(public_key(k.pem.encode())): k for k in self.keys if k.since or k.until}


def read_trust(path: Path) -> Trust:
    """A trust file.

    Raises:
        ConfigError: it is none, or a key is in it twice: one holder must not count as two.
    """
    try:
        trust = Trust.model_validate_json(read_plain(path, 1 << 20))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error}); give a trust file.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"{path} is no trust file: {where}: {first['msg']}; correct it.") from None
    ids = [key_id(public_key(key.pem.encode())) for key in trust.keys]
    if len(set(ids)) < len(ids):
        raise ConfigError(f"{path} has one key twice; expected each once; take one out.")
    return trust


def key_id(key: Ed25519PublicKey) -> str:
    """SHA-256 (hex) of the public key's DER."""
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(key.public_bytes(*form)).hexdigest()


def make_key(path: Path, passphrase: str) -> str:
    """A new key: `path`, PKCS #8 PEM under the passphrase, of its owner alone, and `path`.pub. Returns its id.

    Raises:
        ConfigError: no passphrase, or there is such a file.
    """
    if not passphrase:
        raise ConfigError("the passphrase is empty; a key lies on a disk, so give one.")
    key, path = Ed25519PrivateKey.generate(), Path(path)
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(passphrase.encode()),
    )
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    try:
        for place, content, mode in (
            (path, private, 0o600),
            (path.with_name(f"{path.name}.pub"), key.public_key().public_bytes(*form), 0o644),
        ):
            with open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be made ({error.strerror}); choose another name.") from None
    return key_id(key.public_key())


def load_key(path: Path, passphrase: str) -> Ed25519PrivateKey:
    """A private key.

    Raises:
        ConfigError: the file or the passphrase is wrong, or it is a key in the place of a file's name.
    """
    if "PRIVATE KEY" in str(path):
        raise ConfigError("a key was given on the command line, where others see it; give the name of its file.")
    try:
        key = serialization.load_pem_private_key(read_plain(path, 1 << 20), passphrase.encode() or None)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error}); give the file of a key.") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{path} does not open with this passphrase, or is no key; try again.") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} is no Ed25519 key; make one by `distunlearn keygen`.")
    return key


def public_key(pem: bytes) -> Ed25519PublicKey:
    """A public key.

    Raises:
        ConfigError: it is none.
    """
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError("a key in the trust file is no Ed25519 public key in PEM; take the .pub file of `keygen`.")
    return key


def passphrase(*, twice: bool = False) -> str:
    """The passphrase of a key: of the variable, or typed; twice: asked for again.

    Raises:
        ConfigError: there is neither, or the two differ.
    """
    found = os.environ.get(PASSPHRASE)
    if found is not None:
        return found
    if not sys.stdin.isatty():
        raise ConfigError(f"no passphrase; set {PASSPHRASE}, or call this from a terminal.")
    found = getpass.getpass("passphrase: ")
    if twice and getpass.getpass("again: ") != found:
        raise ConfigError("the passphrases differ; try again.")
    return found


def main() -> int:
    """`distunlearn-keygen FILE` of the wheel."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: distunlearn-keygen FILE", file=sys.stderr)
        return 2
    try:
        print(f"key {make_key(Path(sys.argv[1]), passphrase(twice=True))}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
