"""Revocations: signed statements by operator or officer that a certificate is no longer to be relied on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from .envelope import load, read
from .forms import Digest, Form, read_form
from .keys import Trust

REASONS = ("key-compromise", "refuted", "superseded", "withdrawn")
Reason = Literal["key-compromise", "refuted", "superseded", "withdrawn"]


class Revocation(Form):
    """certificate: digest of the one that is revoked."""

    certificate: Digest
    reason: Reason


def revoked(folder: Path, certificate: str, trust: Trust | None) -> str | None:
    """Why this certificate was revoked, by a key that is trusted; None: it was not.

    folder: of revocations; files that are none are refused, for one of them may have been damaged.

    Raises:
        EvidenceError: a file is no revocation.
    """
    for path in sorted(Path(folder).glob("*.json")):
        envelope = read(load(path), "revocation")
        found = read_form(Revocation, envelope.statement["predicate"], f"{path.name}")
        keys = {**trust.of("operator"), **trust.of("officer")} if trust else {}
        if found.certificate == certificate and envelope.signed_by(keys):
            return found.reason
    return None
