"""`verify`: a certificate against what the verifier has, level by level, in words and as plain data.

level 0   the statement: form, signature by a trusted key, chain, margins
level 1   + the exported encoder: the files are the certified ones
level 2   + the run directory and its secret: ledger, coverage, every gate and the verdict from the raw scores
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .certificate import LIMITS, Predicate, private, read_predicate, state_facts
from .envelope import Envelope, read
from .errors import ConfigError, DataError, EvidenceError
from .keys import Trust
from .run import check_run, difference
from .secret import SECRET, read_secret
from .states import export_digests

HOLDS, FAILS, OPEN = "holds", "does not hold", "not checked"
EXIT = {"pass": 0, "fail": 6, "inconclusive": 7}
EXIT_EVIDENCE = 8
NO_TRUST = "give --trust: the signature is by a key that nobody vouches for"
TITLES = {
    0: "signature, form, chain, margins", 1: "files of the deployed encoder", 2: "every gate from the raw scores",
    3: "own look at the encoders", 4: "steps repeated",
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One level. word: holds, does not hold or not checked. why: a sentence, or empty."""

    level: int
    title: str
    word: str
    why: str = ""


@dataclass(frozen=True)
class Verified:
    """checks: one a level. verdict: the certified one; None where the certificate cannot be read."""

    checks: tuple[Check, ...]
    verdict: str | None
    signer: str | None
    predicate: Predicate | None

    @property
    def exit_code(self) -> int:
        """0 all that was asked for holds and the verdict is pass; 6 it fails; 7 open; 8 something does not hold."""
        words = {check.level: check.word for check in self.checks}
        if FAILS in words.values() or self.verdict is None:
            return EXIT_EVIDENCE
        if self.verdict == "pass" and words[0] != HOLDS:
            return EXIT["inconclusive"]
        return EXIT[self.verdict]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        limits = [LIMITS[number] for number in self.predicate.limits] if self.predicate else []
        return {"checks": [asdict(check) for check in self.checks], "verdict": self.verdict, "signer": self.signer,
                "exit_code": self.exit_code, "limits": limits}  # fmt: skip

    def __str__(self) -> str:
        """For people."""
        signed = f"signed by operator key {self.signer[:12]}" if self.signer else "whose signer is not known"
        lines = [f"Certificate {self.predicate.sequence if self.predicate else '?'}, {signed}"]
        for check in self.checks:
            shown = f"{check.word}{': ' + check.why if check.why and check.word == OPEN else ''}"
            lines.append(f"  {check.level}  {check.title:<36} {shown}")
        lines += [f"{check.why} Do not rely on this certificate." for check in self.checks if check.word == FAILS]
        return "\n".join([*lines, *self._verdict()])

    def _verdict(self) -> list[str]:
        if self.predicate is None or self.exit_code == EXIT_EVIDENCE:
            return ["Verdict: none, for the evidence does not hold."]
        gates = [gate.verdict for gate in self.predicate.figures.gates.values()]
        failed, passed = gates.count("fail"), gates.count("pass")
        counted = f"of {len(gates)} checks {passed} passed, {failed} failed, {len(gates) - passed - failed} are open"
        end = "" if self.exit_code == 0 else " This is not a pass."
        return [f"Verdict {str(self.verdict).upper()}: {counted}.{end}", *(LIMITS[n] for n in self.predicate.limits)]


def verify(
    data: bytes,
    *,
    trust: Trust | None = None,
    export: Path | None = None,
    run: Path | None = None,
    secret: Path | None = None,
) -> Verified:
    """Check a certificate as far as the inputs allow.

    Args:
        data: bytes of certificate.json.
        trust: the verifier's own trust file.
        export: folder of the encoder that is deployed.
        run: run directory. secret: its run secret; None: the one in the run directory.

    Raises:
        ConfigError: an input is not there.
    """
    for name, place in (("--export", export), ("--run", run), ("--secret", secret)):
        if place is not None and not Path(place).exists():
            raise ConfigError(f"{name}: {place} does not exist; give what is to be checked, or leave it out.")
    try:
        envelope = read(data, "certificate")
        predicate = read_predicate(envelope.statement)
        signer = _signed(envelope, predicate, trust)
    except EvidenceError as error:
        rest = (Check(level, TITLES[level], OPEN, "the statement does not hold") for level in range(1, 5))
        return Verified((Check(0, TITLES[0], FAILS, str(error)), *rest), None, None, None)
    checks = [
        Check(0, TITLES[0], HOLDS if signer else OPEN, "" if signer else NO_TRUST),
        _level(1, export, "--export", lambda: _export(envelope, Path(export or "."))),
        _level(2, run, "--run", lambda: _run(predicate, envelope, Path(run or "."), secret)),
        Check(3, TITLES[3], OPEN, "this version has no such check"),
        Check(4, TITLES[4], OPEN, "this version has no such check"),
    ]
    return Verified(tuple(checks), predicate.verdict, signer, predicate)


def _level(level: int, given: Path | None, name: str, check: Callable[[], None]) -> Check:
    if given is None:
        return Check(level, TITLES[level], OPEN, f"give {name}")
    try:
        check()
    except DataError as error:
        return Check(level, TITLES[level], FAILS, str(error))
    return Check(level, TITLES[level], HOLDS)


def _signed(envelope: Envelope, predicate: Predicate, trust: Trust | None) -> str | None:
    """Id of the trusted operator's key that signed; None without a trust file."""
    if (predicate.sequence == 1) != (predicate.previous is None):
        raise EvidenceError(
            f"the certificate is number {predicate.sequence} and names {'no' if predicate.previous is None else 'a'} "
            "certificate before it; its chain was changed."
        )
    rules, found = predicate.rules.rules(), predicate.figures
    for name, gate in found.gates.items():
        margin = rules.margin(name) if name in rules.gates else rules.utility_points / 100
        if gate.margin != margin:
            raise EvidenceError(f"gate {name} has the margin {gate.margin:g}, and {margin:g} was declared.")
    if set(rules.gates) - set(found.gates):
        raise EvidenceError(f"gate {min(set(rules.gates) - set(found.gates))} was declared and is not there.")
    if trust is None:
        return None
    signers = envelope.signed_by(trust.of("operator"))
    if not signers:
        raise EvidenceError(
            "no trusted operator's key signed these bytes; the certificate was changed, or is by somebody else; ask "
            "the operator which key it is."
        )
    return signers[0]


def _export(envelope: Envelope, folder: Path) -> None:
    certified = {entry["name"]: entry["digest"]["sha256"] for entry in envelope.statement["subject"]}
    found = export_digests(folder)
    if found != certified:
        name = min(n for n in {**found, **certified} if found.get(n) != certified.get(n))
        raise EvidenceError(
            f"{name} of the deployed encoder is not the certified file (SHA-256 {found.get(name, 'none')[:12]}, "
            f"certified is {certified.get(name, 'none')[:12]}); another encoder is deployed; ask the operator."
        )


def _run(predicate: Predicate, envelope: Envelope, folder: Path, secret: Path | None) -> None:
    rules = predicate.rules.rules()
    _equal("the files", private(folder, read_secret(secret or folder / SECRET)), predicate.private)
    gaps = check_run(folder, rules).gaps
    if gaps:
        raise EvidenceError(f"The run directory is not whole. {' '.join(gaps)}")
    facts = state_facts(folder, rules)
    certified = predicate.model_dump()
    for part, value in facts.items():
        _equal(part, value, certified[part])
    if export_digests(folder / "export") != {e["name"]: e["digest"]["sha256"] for e in envelope.statement["subject"]}:
        raise EvidenceError("the certified export is not that of the certified weights; ask the operator.")


def _equal(what: str, found: Any, certified: Mapping[str, Any]) -> None:
    at = difference(certified, found, what)
    if at is not None:
        raise EvidenceError(
            f"{at}: the run directory gives another value than the certificate says; one of the two was changed; ask "
            "the operator for the run directory as it was certified."
        )
