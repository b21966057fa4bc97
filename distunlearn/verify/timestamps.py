"""Time stamps of statements (RFC 3161): what is asked of a service, and its answers, checked offline.

A service signs that it saw a digest at a time. `commitment.tsq` and `certificate.tsq` are requests, written beside the
statements; any client fetches the answers (`curl --data-binary @certificate.tsq -H "Content-Type:
application/timestamp-query"`), which are kept as `commitment.tsr` and `certificate.tsr`. What they stamp is the
SHA-256 of the signed payload, so that a signature that is added later changes nothing. Answers need rfc3161-client.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography import x509

from .envelope import Envelope
from .errors import ConfigError, EvidenceError
from .keys import Trust
from .records import read_plain

LARGEST = 1 << 20  # bytes of an answer or of a file of certificates
SLACK = datetime.timedelta(minutes=5)  # by which an operator's clock may be slow
SHA256 = "2.16.840.1.101.3.4.2.1"
# TimeStampReq: version 1, imprint by SHA-256, no nonce (the digest occurs once), the service's certificate wanted.
_BEFORE = bytes.fromhex("30390201013031300d060960864801650304020105000420")
_AFTER = bytes.fromhex("0101ff")

Times = Mapping[str, datetime.datetime]  # "commitment", "certificate" -> when a service saw it


def write_query(statement: Path, digest: str) -> None:
    """The request for a time stamp beside a statement. digest: `Envelope.digest`."""
    statement.with_suffix(".tsq").write_bytes(_BEFORE + bytes.fromhex(digest) + _AFTER)


def read_times(folder: Path, roots: Path, statements: Mapping[str, Envelope]) -> dict[str, datetime.datetime]:
    """When services that the verifier trusts saw the statements, of those whose answer is in the folder.

    roots: PEM file of their root certificates.

    Raises:
        ConfigError: roots is no such file, or rfc3161-client is not installed.
        EvidenceError: an answer is for something else, or not signed by such a service, or the order is wrong.
    """
    verifier = _verifier(roots)
    found = {}
    for kind, envelope in statements.items():
        path = Path(folder) / f"{kind}.tsr"
        if path.exists():
            found[kind] = _time(path, envelope.digest, verifier)
    if len(found) == 2 and found["certificate"] < found["commitment"]:
        raise EvidenceError(
            f"the certificate was time stamped at {_told(found['certificate'])}, before its commitment "
            f"({_told(found['commitment'])}); the commitment was made afterwards."
        )
    return found


def require_before(times: Times, began: float | None) -> None:
    """The commitment was seen before the ledger began (seconds since 1970, by the operator's clock).

    Raises:
        EvidenceError: it was not.
    """
    if began is not None and "commitment" in times:
        start = datetime.datetime.fromtimestamp(began, datetime.timezone.utc)
        if times["commitment"] > start + SLACK:
            raise EvidenceError(
                f"the ledger began at {_told(start)}, and the commitment was time stamped at "
                f"{_told(times['commitment'])}; the run came first, or the operator's clock was slow; ask the operator."
            )


def undated(envelope: Envelope, kind: str, times: Times, trust: Trust) -> str | None:
    """Why it is open whether the keys that signed were valid then, in a sentence; None: they were, or have no period.

    Raises:
        EvidenceError: one was not.
    """
    for key_id, key in trust.periods().items():
        if key_id not in envelope.signatures:
            continue
        time = times.get(kind)
        if time is None:
            return f"give --timestamps and --tsa: the key {key_id[:12]} has a period, and the {kind} no time"
        if (key.since and time < key.since) or (key.until and time > key.until):
            raise EvidenceError(
                f"the {kind} was time stamped at {_told(time)}, when the key {key_id[:12]} that signed it was not "
                "valid by the trust file; ask whoever holds the key."
            )
    return None


def in_words(times: Times) -> str:
    """A clause for people."""
    return "time stamped: " + (", ".join(f"{k} {_told(t)}" for k, t in sorted(times.items())) or "nothing")


def _told(time: datetime.datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC")


def _verifier(roots: Path) -> Any:
    try:
        from rfc3161_client import VerifierBuilder  # optional
    except ImportError:
        raise ConfigError(
            "time stamps need rfc3161-client; pip install rfc3161-client, or leave --timestamps out."
        ) from None
    try:
        certificates = x509.load_pem_x509_certificates(read_plain(roots, LARGEST))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{roots} holds no certificates ({error}); give root certificates in PEM.") from None
    builder = VerifierBuilder()
    for certificate in dict.fromkeys(certificates):
        builder = builder.add_root_certificate(certificate)
    return builder.build()


def _time(path: Path, digest: str, verifier: Any) -> datetime.datetime:
    from rfc3161_client import VerificationError, decode_timestamp_response

    try:
        answer = decode_timestamp_response(read_plain(path, LARGEST))
        verifier.verify(answer, bytes.fromhex(digest))
        info = answer.tst_info
        if info.message_imprint.hash_algorithm.dotted_string != SHA256:
            raise ValueError("its digest is no SHA-256")
        return info.gen_time.astimezone(datetime.timezone.utc)
    except (OSError, ValueError, TypeError, AttributeError, x509.ExtensionNotFound, VerificationError) as error:
        raise EvidenceError(
            f"{path.name} is no time stamp of this statement by a trusted service ({str(error)[:120]}); fetch it anew "
            "from the request beside it."
        ) from None
