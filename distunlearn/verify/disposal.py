"""The disposal statement: what an operator deleted of a certified run, and what he can only claim."""

from __future__ import annotations

from typing import Literal

from .envelope import read
from .errors import EvidenceError
from .forms import Count, Digest, Form, Text, read_form
from .keys import Trust

CLAIMED = {
    "source": "the folder or store that the images came from, its backups and snapshots",
    "parents": "the original encoder elsewhere: runs whose encoder this one took, copies of it before forgetting",
    "derived": "encoders distilled from the original, embeddings of the images in other systems",
}


class Disposal(Form):
    """certificate: its digest. absent: places where nothing was found afterwards. left: files by place. claimed: places
    out of reach."""

    certificate: Digest
    absent: list[Text]
    left: dict[Text, Count]
    claimed: list[Text]
    means: Literal["deleted from the file system"]


def disposed(data: bytes, certificate: str, trust: Trust | None) -> str:
    """A disposal against a certificate: what it says, in words.

    Raises:
        EvidenceError: it does not hold.
    """
    envelope = read(data, "disposal")
    found = read_form(Disposal, envelope.statement["predicate"], "the disposal")
    keys = {**trust.of("operator"), **trust.of("officer")} if trust else {}
    if trust is not None and not envelope.signed_by(keys):
        raise EvidenceError("no trusted key signed the disposal; ask the operator for the one that he signed.")
    if found.certificate != certificate:
        raise EvidenceError("the disposal is of another certificate; ask the operator for the one that belongs to it.")
    left = f", left: {', '.join(found.left)}" if found.left else ""
    return f"{len(found.absent)} places {found.means}{left}; {len(found.claimed)} claimed, none checked"
