"""What signed evidence a run has, and what is to be done next: rows for the page, from the run's `evidence/`."""

from __future__ import annotations

from pathlib import Path

from distunlearn.errors import DataError
from distunlearn.verify.commitment import kept_commitment
from distunlearn.verify.disposal import Disposal
from distunlearn.verify.envelope import load, read
from distunlearn.verify.forms import read_form

UNDECLARED = "none was made before the run: settings and margins were declared by the operator's word"
NEXT = (
    "Sign what this run shows: `distunlearn certify RUN --key KEY`.",
    "Let somebody who does not depend on you check it: `distunlearn verify CERTIFICATE --trust FILE --run RUN "
    "--shards DIR --replay 3`. Then delete what still holds the images: `distunlearn dispose RUN`.",
    "Keep certificate, commitment and disposal; levels 0 and 1 and receipts can be checked with them.",
)


def assurance(folder: Path) -> tuple[list[tuple[str, str]], str]:
    """Rows (name, value), and the next step in a sentence."""
    kept = kept_commitment(folder)
    rows = [("Commitment", UNDECLARED)]
    if kept is not None:
        rows = [("Request", str(kept[1].reference)), ("Commitment", kept[0].digest)]
    certificate, disposal = (_digest(folder, name) for name in ("certificate", "disposal"))
    if certificate is not None:
        rows.append(("Certificate", certificate))
    if disposal is None:
        rows.append(("Deleted", "nothing by this program, as far as it has signed"))
    else:
        content = read(load(folder / "evidence/disposal.json"), "disposal").statement["predicate"]
        found = read_form(Disposal, content, "the disposal")
        rows.append(("Deleted from the file system", ", ".join(found.absent)))
        rows.append(("Only claimed, checked by nobody", ", ".join(found.claimed)))
    return rows, NEXT[0 if certificate is None else 1 if disposal is None else 2]


def _digest(folder: Path, kind: str) -> str | None:
    """Of a signed statement; None: there is none, or it is damaged, which `verify` says."""
    try:
        return read(load(folder / "evidence" / f"{kind}.json"), kind).digest
    except (OSError, DataError):
        return None
