"""The run secret, and commitments of what names images: nobody without the secret can confirm a guess about them."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from .errors import EvidenceError
from .records import read_plain

SECRET = Path("evidence") / "secret"  # in the run directory, of the operator alone
BYTES = 32


def make_secret(folder: Path) -> bytes:
    """The secret of a run directory, drawn where there is none yet."""
    path = Path(folder) / SECRET
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        return read_secret(path)
    with open(handle, "wb") as file:
        file.write(secrets.token_bytes(BYTES))
        file.flush()
        os.fsync(file.fileno())
    return read_secret(path)


def read_secret(path: Path) -> bytes:
    """The secret in a file.

    Raises:
        EvidenceError: it is not there, or no secret.
    """
    try:
        found = read_plain(path, 1 << 20)
    except OSError as error:
        raise EvidenceError(f"{path} cannot be read ({error.strerror or error}); expected the run secret.") from None
    if len(found) != BYTES:
        raise EvidenceError(f"{path} has {len(found)} bytes; expected the {BYTES} of a run secret; restore it.")
    return found


def commitment(secret: bytes, name: str, content: bytes) -> str:
    """Salted digest (hex) of the file `name`; equal for equal content, and tells nothing without the secret."""
    salt = hmac.digest(secret, b"file\x00" + name.encode(), "sha256")
    return hashlib.sha256(b"distunlearn-commit-v1\x00" + salt + name.encode() + b"\x00" + content).hexdigest()


def leaf_salt(secret: bytes, sample_id: str) -> str:
    """Salt (hex) of one image's leaf in a tree."""
    return hmac.digest(secret, b"leaf\x00" + sample_id.encode(), "sha256").hex()
