"""The commitment: what an operator declares before the first step, and an officer countersigns.

The officer draws the nonce. Seeds of `unlearn`, `retrain` and the audit follow from it, so that the operator can try no
seeds and choose no mini-batches; roles and `pretrain`, which come before, keep the plain seed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .dose import DoseRules
from .envelope import Envelope, load, read
from .errors import EvidenceError
from .figures import Rules
from .forms import Count, Digest, Form, RulesPart, Text, Tree, Word, read_form, rules_part, same
from .keys import Trust
from .records import read_plain

COMMITMENT = Path("evidence") / "commitment.json"  # in the run directory
REQUEST = Path("evidence") / "commitment.request.json"
UNSIGNED = "no trusted {role}'s key signed the commitment; it was not made, or not by who is trusted for it"


class Commitment(Form):
    """reference: the officer's own word for the request. settings, images: salted commitments of run.yaml and of
    request.json, which has the digests of the index of all images and of their roles. tier: of the audit. dose: how it
    is chosen; null: it is given. original: digest of a foreign checkpoint; null: this run trains it. references: of
    the encoders that stand in the place of one that is trained again. numerics: what rounding depends on. nonce,
    reference: null in a request.
    """

    run: Digest
    sequence: Count
    previous: Digest | None
    reference: Word | None
    settings: Digest
    rules: RulesPart
    tier: Count
    dose: DoseRules | None
    request: Tree
    images: Digest
    original: Digest | None
    references: list[Digest]
    version: Word
    code: Digest
    packages: Digest
    numerics: dict[Word, Text | Count]
    nonce: Digest | None

    def audit_rules(self) -> Rules:
        """The rules that the audit goes by: with the seed that follows from the nonce."""
        rules = self.rules.rules()
        return dataclasses.replace(rules, seed=phase_seed(rules.seed, self.nonce, "audit"))


def read_commitment(data: bytes) -> tuple[Envelope, Commitment]:
    """A countersigned commitment.

    Raises:
        EvidenceError: it is none.
    """
    envelope = read(data, "commitment")
    found = read_form(Commitment, envelope.statement["predicate"], "the commitment")
    if found.nonce is None or found.reference is None:
        raise EvidenceError("the commitment has no nonce or no reference of an officer; have it countersigned.")
    return envelope, found


def kept_commitment(folder: Path) -> tuple[Envelope, Commitment] | None:
    """The commitment of a run directory; None: it has none."""
    path = Path(folder) / COMMITMENT
    return read_commitment(load(path)) if path.exists() else None


def phase_seed(seed: int, nonce: str | None, phase: str) -> int:
    """The seed of `unlearn`, `retrain` or the `audit`; without a nonce the plain one."""
    if nonce is None:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}\x00{nonce}\x00{phase}".encode()).digest()[:4], "big")


def run_rules(settings: Mapping[str, Any], folder: Path) -> Rules:
    """The rules that the audit of a run directory goes by. settings: plain data; errors as of `Rules.of`."""
    rules, kept = Rules.of(settings), kept_commitment(folder)
    return dataclasses.replace(rules, seed=phase_seed(rules.seed, kept[1].nonce if kept else None, "audit"))


def unsigned(envelope: Envelope, trust: Trust) -> str | None:
    """Whose signature is missing, in a sentence; None: operator and officer have signed."""
    for role in ("operator", "officer"):
        if not envelope.signed_by(trust.of(role)):
            return UNSIGNED.format(role=role)
    return None


def require_followed(envelope: Envelope, commitment: Commitment, certificate: Any) -> None:
    """A certificate is of the run that was committed to, and is judged by the rules that were.

    certificate: `certificate.Predicate`.

    Raises:
        EvidenceError: it is not.
    """
    if envelope.digest != certificate.commitment:
        raise EvidenceError(
            f"the certificate goes back to commitment {str(certificate.commitment)[:12]}, and this is "
            f"{envelope.digest[:12]}; it is of another run; ask the operator for the one that belongs to it."
        )
    sentence = "the run did not follow what was declared before it; do not rely on its figures."
    names = ("run", "sequence", "previous")
    found = {name: getattr(certificate, name) for name in names}
    same("the certificate", found, {name: getattr(commitment, name) for name in names}, sentence)
    same("the rules", certificate.rules.model_dump(), rules_part(commitment.audit_rules()), sentence)
    chosen = certificate.dose
    dose = {"rules": chosen.rules, "seed": chosen.seed} if chosen else {"rules": None}
    declared: dict[str, Any] = {"rules": commitment.dose}
    if chosen:
        declared["seed"] = phase_seed(commitment.rules.seed, commitment.nonce, "unlearn")
    same("the dose", dose, declared, sentence)
    same("the request", certificate.request.model_dump(), commitment.request.model_dump(), sentence)
    files = {"run.yaml": commitment.settings, "request.json": commitment.images}
    same("the private files", certificate.private, files, sentence)
    same("the ledger", {"codes": certificate.ledger.codes}, {"codes": [commitment.code]}, sentence)


def require_ledger(digest: str | None, commitment: Commitment | None, lines: Sequence[Mapping[str, Any]]) -> None:
    """A ledger began under a commitment (None: under none) and every attempt worked with its numerics.

    Raises:
        EvidenceError: it did not.
    """
    if lines and lines[0].get("prev") != digest:
        raise EvidenceError(
            f"the ledger goes back to commitment {str(lines[0].get('prev'))[:12]}, and expected is {str(digest)[:12]}; "
            "the run began before it was committed to, or the ledger is of another run."
        )
    for line in lines if commitment else ():
        if line["event"] == "start" and commitment is not None:
            expected = commitment.numerics
            same(f"an attempt at {line['phase']}", line.get("numerics", {}), expected, "other numerics were declared.")


# -- register --------------------------------------------------------------------------------------------------------


def register_lines(path: Path) -> list[dict[str, Any]]:
    """Every entry of an officer's register: {"n", "prev", "commitment", "reference", "run", "time"}.

    Raises:
        EvidenceError: it is none, or its chain is broken.
    """
    found: list[dict[str, Any]] = []
    prev = None
    try:
        for number, text in enumerate(read_plain(path).splitlines()):
            line = json.loads(text)
            if (line["n"], line["prev"]) != (number, prev) or not {"commitment", "reference"} <= line.keys():
                raise ValueError
            found.append(line)
            prev = hashlib.sha256(text).hexdigest()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise EvidenceError(f"{path} is no register, or was changed (line {len(found) + 1}); restore it.") from None
    return found


def add_to_register(path: Path, **entry: Any) -> None:
    """Append an entry; the register is made where there is none.

    Raises:
        EvidenceError: what is there is no register.
    """
    path = Path(path)
    lines = register_lines(path) if path.exists() else []
    raw = read_plain(path).splitlines() if lines else []
    line = {"n": len(lines), "prev": hashlib.sha256(raw[-1]).hexdigest() if raw else None, **entry}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, separators=(",", ":")) + "\n")


def tries(path: Path, digest: str, reference: str) -> list[str]:
    """Digests of the other commitments for the same request, the register's order.

    Raises:
        EvidenceError: this one is not in the register.
    """
    lines = register_lines(path)
    if digest not in {line["commitment"] for line in lines}:
        raise EvidenceError(
            f"commitment {digest[:12]} is not in the register; it was never countersigned there; ask the officer."
        )
    return [line["commitment"] for line in lines if line["reference"] == reference and line["commitment"] != digest]
