"""Signed statements: in-toto Statement v1 in a DSSE envelope, canonical JSON (RFC 8785), read strictly.

A reader verifies the bytes of the payload, parses those bytes, writes them canonically again and requires equality, so
that a key that occurs twice, or another spelling of the same content, is refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from .errors import EvidenceError
from .keys import key_id
from .records import read_plain

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATES = "tag:distunlearn,2026:attestation/"  # names, never fetched
LARGEST = 4 << 20  # bytes of an envelope


@dataclass(frozen=True)
class Envelope:
    """A statement, the bytes that are signed, and signatures by key id."""

    statement: dict[str, Any]
    payload: bytes
    signatures: dict[str, bytes]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the statement: what other statements name it by, whoever signs it later."""
        return hashlib.sha256(self.payload).hexdigest()

    def also_signed(self, key: Ed25519PrivateKey) -> bytes:
        """The bytes of the envelope with the signature of one more key."""
        return _envelope(self.payload, {**self.signatures, key_id(key.public_key()): key.sign(_encoded(self.payload))})

    def signed_by(self, keys: Mapping[str, Ed25519PublicKey]) -> list[str]:
        """Ids of those keys whose signature holds."""
        found = []
        for name, signature in self.signatures.items():
            if name in keys and _holds(keys[name], signature, self.payload):
                found.append(name)
        return found


def predicate_type(kind: str) -> str:
    """The predicate type of `certificate` and so on."""
    return f"{PREDICATES}{kind}/v1"


def sign(kind: str, subject: Mapping[str, str], predicate: Mapping[str, Any], key: Ed25519PrivateKey) -> bytes:
    """The envelope of a statement about the files of `subject` {name: SHA-256}."""
    statement: dict[str, Any] = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(subject.items())],
        "predicateType": predicate_type(kind),
        "predicate": dict(predicate),
    }
    payload = rfc8785.dumps(statement)
    return _envelope(payload, {key_id(key.public_key()): key.sign(_encoded(payload))})


def _envelope(payload: bytes, signatures: Mapping[str, bytes]) -> bytes:
    listed = [{"keyid": name, "sig": _base64(signature)} for name, signature in sorted(signatures.items())]
    return rfc8785.dumps({"payload": _base64(payload), "payloadType": PAYLOAD_TYPE, "signatures": listed})


def read(data: bytes, kind: str) -> Envelope:
    """An envelope of a statement of this kind.

    Raises:
        EvidenceError: it is none, or not in the one form that a writer gives it.
    """
    if len(data) > LARGEST:
        raise EvidenceError(f"the statement has {len(data)} bytes; expected at most {LARGEST}; it is none of ours.")
    outer = canonical(data, "the envelope")
    if not isinstance(outer, dict) or outer.keys() != {"payload", "payloadType", "signatures"}:
        raise EvidenceError("the envelope has other fields than payload, payloadType and signatures; it was changed.")
    if outer["payloadType"] != PAYLOAD_TYPE:
        raise EvidenceError(f"the payload type is {str(outer['payloadType'])[:60]!r}; expected {PAYLOAD_TYPE}.")
    payload = _bytes(outer["payload"])
    statement = canonical(payload, "the statement")
    if not isinstance(statement, dict) or statement.keys() != {"_type", "subject", "predicateType", "predicate"}:
        raise EvidenceError("the payload is no in-toto statement; it was changed, or is of another program.")
    if (statement["_type"], statement["predicateType"]) != (STATEMENT, predicate_type(kind)):
        raise EvidenceError(f"the statement is no {kind} of version 1; give one, or use the version that wrote it.")
    return Envelope(statement, payload, _signatures(outer["signatures"]))


def load(path: Path) -> bytes:
    """The bytes of a statement or a receipt in a file.

    Raises:
        EvidenceError: it is no plain file, cannot be read, or is larger than any of ours.
    """
    try:
        return read_plain(path, LARGEST)
    except OSError as error:
        raise EvidenceError(
            f"{path} cannot be read ({error.strerror or error}); give the file as it was signed."
        ) from None


def canonical(data: bytes, what: str) -> Any:
    """Parse JSON that is in canonical form.

    Raises:
        EvidenceError: it is not.
    """
    try:
        found = json.loads(data)
        same = rfc8785.dumps(found) == data
    except (ValueError, RecursionError, rfc8785.CanonicalizationError):
        same = False
    if not same:
        raise EvidenceError(f"{what} is not canonical JSON (RFC 8785); it was changed after it was signed.")
    return found


def _signatures(listed: Any) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for entry in listed if isinstance(listed, Sequence) and not isinstance(listed, str) else [None]:
        if not isinstance(entry, dict) or entry.keys() != {"keyid", "sig"} or not isinstance(entry["keyid"], str):
            raise EvidenceError("a signature has other fields than keyid and sig; the envelope was changed.")
        if entry["keyid"] in found:
            raise EvidenceError("two signatures are by one key; expected one of each; the envelope was changed.")
        found[entry["keyid"]] = _bytes(entry["sig"])
    return found


def _holds(key: Ed25519PublicKey, signature: bytes, payload: bytes) -> bool:
    try:
        key.verify(signature, _encoded(payload))
    except InvalidSignature:
        return False
    return True


def _encoded(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: Any) -> bytes:
    try:
        found = base64.b64decode(text, validate=True)
        if _base64(found) == text:
            return found
    except (TypeError, ValueError, binascii.Error):
        pass
    raise EvidenceError("a part of the envelope is not base64 in its one form; it was changed.")
