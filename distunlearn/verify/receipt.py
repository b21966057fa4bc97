"""Receipts: for one person, that an image was in the request and entered the loss, without naming anybody else.

Two trees (`merkle`) over the images of the request: `request`, made before the run, and `outcome`, made after it. A
leaf is canonical JSON: salt, id and the SHA-256 of the image's file, in the outcome also how often it entered the loss
and whether it entered it as a retained image. Leaves are sorted by their hash, so that places tell nothing; salts
follow from the run secret, so that one tells nothing about another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rfc8785

from .envelope import canonical
from .errors import ConfigError, EvidenceError
from .forms import Count, Digest, Form, read_form
from .ledger import coverage, effective_steps
from .merkle import inclusion, is_included, leaf_hash, root
from .records import read_plain
from .secret import leaf_salt

ROWS = Path("evidence") / "requested.json"  # {id: SHA-256 of the image}, in the run directory, of the operator alone
LARGEST = 1 << 16  # bytes of a receipt


class Leaf(Form):
    """Of the outcome; that of the request has the first three."""

    salt: Digest
    id: str
    image: Digest
    consumed: Count
    misused: bool


class Place(Form):
    """index: among the leaves. path: proof of inclusion."""

    index: Count
    path: list[Digest]


class Receipt(Form):
    """certificate, commitment: their digests. size: images of the request."""

    certificate: Digest
    commitment: Digest | None
    leaf: Leaf
    request: Place
    outcome: Place
    size: Count


def read_rows(folder: Path) -> dict[str, str]:
    """The request of a run directory: {id: SHA-256 of the image}.

    Raises:
        EvidenceError: it is not there, or none.
    """
    path = Path(folder) / ROWS
    try:
        found = json.loads(read_plain(path))
        if isinstance(found, dict) and found and all(isinstance(value, str) for value in found.values()):
            return found
    except (OSError, ValueError, RecursionError):
        pass
    raise EvidenceError(f"{path} is not there or is no request; restore it.")


def outcomes(rows: Mapping[str, str], secret: bytes, lines: Sequence[dict]) -> list[dict[str, Any]]:
    """The outcome's leaf of every image, by id. lines: of the ledger."""
    counts = coverage(lines, list(rows)).counts
    steps = [line for phase in ("unlearn", "retrain") for line in effective_steps(lines, phase).values()]
    misused = {i for line in steps for i in line.get("misused", ())}
    return [
        {"salt": leaf_salt(secret, i), "id": i, "image": rows[i], "consumed": counts[i], "misused": i in misused}
        for i in sorted(rows)
    ]


def request_leaves(rows: Mapping[str, str], secret: bytes) -> list[dict[str, Any]]:
    """The request's leaf of every image, by id."""
    return [{"salt": leaf_salt(secret, i), "id": i, "image": rows[i]} for i in sorted(rows)]


def hashes(leaves: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """Their hashes in the order of the tree."""
    return sorted(map(_hash, leaves))


def tree(leaves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`forms.Tree` of these leaves."""
    return {"size": len(leaves), "root": root(hashes(leaves)).hex()}


def make_receipt(
    sample_id: str,
    rows: Mapping[str, str],
    secret: bytes,
    lines: Sequence[dict],
    certificate: str,
    commitment: str | None,
) -> bytes:
    """The receipt for one image. certificate, commitment: digests.

    Raises:
        ConfigError: it was not in the request.
    """
    if sample_id not in rows:
        raise ConfigError("--id is not in the request of this run; give the id of an image that was to be forgotten.")
    after = outcomes(rows, secret, lines)
    [leaf] = [found for found in after if found["id"] == sample_id]
    content = {
        "certificate": certificate, "commitment": commitment, "leaf": leaf, "size": len(rows),
        "request": _place(_before(leaf), request_leaves(rows, secret)), "outcome": _place(leaf, after),
    }  # fmt: skip
    return rfc8785.dumps(content)


def check_receipt(data: bytes, digest: str, certificate: Any, image: bytes | None) -> str:
    """A receipt against a certificate: a sentence about what it shows.

    Args:
        digest: of the certificate. certificate: `certificate.Predicate`. image: bytes of the person's own file.

    Raises:
        EvidenceError: it does not hold.
    """
    if len(data) > LARGEST:
        raise EvidenceError(f"the receipt has {len(data)} bytes; expected at most {LARGEST}; it is none of ours.")
    found = read_form(Receipt, canonical(data, "the receipt"), "the receipt")
    if (found.certificate, found.commitment) != (digest, certificate.commitment):
        raise EvidenceError("the receipt is for another certificate; ask the operator for the one that belongs to it.")
    leaf = found.leaf.model_dump()
    for name, content, place in (("request", _before(leaf), found.request), ("outcome", leaf, found.outcome)):
        expected = getattr(certificate, name)
        path = [bytes.fromhex(part) for part in place.path]
        held = is_included(_hash(content), place.index, found.size, path, bytes.fromhex(expected.root))
        if found.size != expected.size or not held:
            raise EvidenceError(
                f"the image of the receipt is not in the {name} that was certified; the receipt was made up or "
                "changed; ask the operator."
            )
    if image is not None and hashlib.sha256(image).hexdigest() != found.leaf.image:
        raise EvidenceError(
            "the image is not the file of the receipt, byte for byte; it may be another copy of the same picture; "
            "check without it, or ask the operator which file it was."
        )
    told = "" if image is not None else "; whether the id is your image was not checked: give --image"
    bad = " It was also used as an image to keep." if found.leaf.misused else ""
    return f"the image was in the request and entered the loss {found.leaf.consumed} times{told}.{bad}"


def _before(leaf: Mapping[str, Any]) -> dict[str, Any]:
    return {name: leaf[name] for name in ("salt", "id", "image")}


def _hash(leaf: Mapping[str, Any]) -> bytes:
    return leaf_hash(rfc8785.dumps(dict(leaf)))


def _place(leaf: Mapping[str, Any], leaves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ordered = hashes(leaves)
    index = ordered.index(_hash(leaf))
    return {"index": index, "path": [part.hex() for part in inclusion(ordered, index)]}
