"""`verify`: a certificate against what the verifier has, level by level, in words and as plain data.

level 0   the statement: form, signature by a trusted key, chain, margins; what was committed to before the run
level 1   + the exported encoder: the files are the certified ones
level 2   + the run directory and its secret: ledger, coverage, every gate and the verdict from the raw scores
level 3   + the shards: the verifier's own audit of the encoders   } by the main package, which trains and audits
level 4   + the checkpoints: steps repeated, bit for bit           }
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .certificate import LIMITS, Predicate, private, read_predicate, state_facts
from .commitment import COMMITMENT, Commitment, read_commitment, require_followed, require_ledger, tries, unsigned
from .disposal import disposed
from .envelope import Envelope, load, read
from .errors import ConfigError, DataError, EvidenceError
from .keys import Trust
from .ledger import read_ledger
from .receipt import check_receipt
from .records import read_plain
from .revocation import revoked
from .run import check_run, difference
from .secret import SECRET, read_secret
from .states import export_digests
from .timestamps import Times, in_words, read_times, require_before, undated

HOLDS, FAILS, OPEN, INCOMPARABLE = "holds", "does not hold", "not checked", "cannot be compared"
EXIT = {"pass": 0, "fail": 6, "inconclusive": 7}
EXIT_EVIDENCE = 8
NO_TRUST = "give --trust: the signature is by a key that nobody vouches for"
NO_COMMITMENT = "give --commitment: the certificate goes back to one"
TITLES = {
    0: "signatures, form, chain, margins", 1: "files of the deployed encoder", 2: "every gate from the raw scores",
    3: "own look at the encoders", 4: "steps repeated",
}  # fmt: skip
RECEIPT = "receipt of one image"


class Incomparable(Exception):
    """A check that cannot be made here, and why."""


Further = Callable[[Predicate], str]  # a check of level 3 or 4: what it found, in a few words


@dataclass(frozen=True)
class Check:
    """One level (None: of a receipt). word: holds, does not hold, not checked or cannot be compared. why: a sentence,
    or empty. asked: whether the verifier gave what it needs.
    """

    level: int | None
    title: str
    word: str
    why: str = ""
    asked: bool = True


@dataclass(frozen=True)
class Given:
    """What a verifier has. See `cli` for the meaning of each; levels: further checks, by level."""

    trust: Trust | None = None
    commitment: Path | None = None
    register: Path | None = None
    revocations: Path | None = None
    previous: Path | None = None
    timestamps: Path | None = None
    tsa: Path | None = None
    disposal: Path | None = None
    receipt: Path | None = None
    image: Path | None = None
    export: Path | None = None
    run: Path | None = None
    secret: Path | None = None


@dataclass(frozen=True)
class Verified:
    """checks: one a level, and of a receipt. verdict: the certified one; None where the certificate cannot be read."""

    checks: tuple[Check, ...]
    verdict: str | None
    signer: str | None
    predicate: Predicate | None

    @property
    def exit_code(self) -> int:
        """0 all that was asked for holds and the verdict is pass; 6 it fails; 7 open; 8 something does not hold."""
        if self.verdict is None or any(check.word == FAILS for check in self.checks):
            return EXIT_EVIDENCE
        if self.verdict == "pass" and any(check.asked and check.word != HOLDS for check in self.checks):
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
        encoder = f" for encoder {self.predicate.states['unlearned'][:12]}" if self.predicate else ""
        lines = [f"Certificate {self.predicate.sequence if self.predicate else '?'}{encoder}, {signed}"]
        for check in self.checks:
            shown = f"{check.word}{': ' + check.why if check.why and check.word != FAILS else ''}"
            lines.append(f"  {'' if check.level is None else check.level!s:<2} {check.title:<36} {shown}")
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


def verify(data: bytes, given: Given, further: Mapping[int, Further] | None = None) -> Verified:
    """Check a certificate as far as the inputs allow.

    Args:
        data: bytes of certificate.json.
        further: checks of levels 3 and 4 that were asked for.

    Raises:
        ConfigError: an input is not there.
    """
    for name, place in vars(given).items():
        if isinstance(place, Path) and not place.exists():
            raise ConfigError(f"--{name}: {place} does not exist; give what is to be checked, or leave it out.")
    further = further or {}
    try:
        envelope = read(data, "certificate")
        predicate = read_predicate(envelope.statement)
        committed = _commitment(envelope, predicate, given)
        signer = _signed(envelope, predicate, given)
        times = _times(envelope, committed, given)
        first = _declared(envelope, predicate, signer, committed, given, times)
    except EvidenceError as error:
        rest = (Check(level, TITLES[level], OPEN, "the statement does not hold") for level in range(1, 5))
        return Verified((Check(0, TITLES[0], FAILS, str(error)), *rest), None, None, None)
    checks = [
        first,
        _level(1, "--export", given.export and (lambda _: _export(envelope, given.export))),
        _level(2, "--run", given.run and (lambda _: _run(predicate, envelope, committed, given, times))),
        _level(3, "--run and --shards to the whole package", further.get(3), predicate),
        _level(4, "--run, --shards and --replay to it", further.get(4), predicate),
    ]
    if given.receipt is not None:
        checks.append(_level(None, "", lambda p: _receipt(given, envelope.digest, p), predicate))
    return Verified(tuple(checks), predicate.verdict, signer, predicate)


def _level(level: int | None, name: str, check: Any, predicate: Predicate | None = None) -> Check:
    title = RECEIPT if level is None else TITLES[level]
    if check is None:
        return Check(level, title, OPEN, f"give {name}", asked=False)
    try:
        return Check(level, title, HOLDS, check(predicate) or "")
    except DataError as error:
        return Check(level, title, FAILS, str(error))
    except Incomparable as error:
        return Check(level, title, INCOMPARABLE, str(error))


# -- level 0 ---------------------------------------------------------------------------------------------------------


def _commitment(envelope: Envelope, predicate: Predicate, given: Given) -> tuple[Envelope, Commitment] | None:
    """The commitment that the certificate goes back to, which it followed; None: there is none, or it is not given."""
    place = given.commitment or (given.run and given.run / COMMITMENT)
    if place is None or not place.exists():
        return None
    if predicate.commitment is None:
        raise EvidenceError("the certificate names no commitment, and there is one; it is of another run.")
    found = read_commitment(load(place))
    require_followed(*found, predicate)
    return found


def _signed(envelope: Envelope, predicate: Predicate, given: Given) -> str | None:
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
    if given.trust is None:
        return None
    signers = envelope.signed_by(given.trust.of("operator"))
    if not signers:
        raise EvidenceError(
            "no trusted operator's key signed these bytes; the certificate was changed, or is by somebody else; ask "
            "the operator which key it is."
        )
    return signers[0]


def _declared(
    envelope: Envelope, predicate: Predicate, signer: str | None, committed: tuple[Envelope, Commitment] | None,
    given: Given, times: Times | None,
) -> Check:  # fmt: skip
    """Level 0 as a whole."""
    told: list[str] = []
    if given.revocations is None:
        told.append("revocations: not looked for")
    elif (reason := revoked(given.revocations, envelope.digest, given.trust)) is not None:
        raise EvidenceError(f"the certificate was revoked ({reason}); ask for the one that took its place.")
    if given.previous is not None:
        told.append(_follows(read(load(given.previous), "certificate"), predicate, given.trust))
    if given.disposal is not None:
        told.append(disposed(load(given.disposal), envelope.digest, given.trust))
    lacking = None if signer else NO_TRUST
    if predicate.commitment is None:
        told.insert(0, "declared by the operator's word")
    elif committed is None:
        lacking = lacking or NO_COMMITMENT
    elif given.trust is not None:
        lacking = unsigned(committed[0], given.trust)
        told.insert(0, f"countersigned before the run, for request {committed[1].reference}")
    if given.trust is not None:
        for kind, statement in _statements(envelope, committed).items():
            lacking = lacking or undated(statement, kind, times or {}, given.trust)
    if times is not None:
        told.append(in_words(times))
    if given.register is not None and committed is not None:
        others = tries(given.register, committed[0].digest, str(committed[1].reference))
        if others:
            lacking = lacking or (
                f"{len(others)} other commitments for this request are in the register "
                f"({', '.join(other[:12] for other in others[:5])}); ask for their certificates"
            )
        else:
            told.append("1 try")
    return Check(0, TITLES[0], OPEN if lacking else HOLDS, lacking or "; ".join(told))


def _statements(envelope: Envelope, committed: tuple[Envelope, Commitment] | None) -> dict[str, Envelope]:
    return {"certificate": envelope} | ({"commitment": committed[0]} if committed else {})


def _times(envelope: Envelope, committed: tuple[Envelope, Commitment] | None, given: Given) -> Times | None:
    """When time stamp services saw certificate and commitment; None: not asked for."""
    if (given.timestamps is None) != (given.tsa is None):
        raise ConfigError("--timestamps and --tsa go together; give the answers and whose answers you trust.")
    if given.timestamps is None or given.tsa is None:
        return None
    return read_times(given.timestamps, given.tsa, _statements(envelope, committed))


def _follows(before: Envelope, predicate: Predicate, trust: Trust | None) -> str:
    """The certificate before this one is the one that it names. Whether it is of the same encoder, in words."""
    earlier = read_predicate(before.statement)
    if trust is not None and not before.signed_by(trust.of("operator")):
        raise EvidenceError(
            "no trusted operator's key signed the certificate before this one; ask the operator for it."
        )
    if (before.digest, earlier.sequence + 1) != (predicate.previous, predicate.sequence):
        raise EvidenceError(
            f"the certificate before is number {earlier.sequence} ({before.digest[:12]}), and this one, number "
            f"{predicate.sequence}, follows {str(predicate.previous)[:12]}; the chain is broken."
        )
    same = earlier.states["unlearned"] == predicate.states["original"]
    return f"follows certificate {earlier.sequence}" if same else "new lineage: it began with another encoder"


# -- levels 1 and 2 --------------------------------------------------------------------------------------------------


def _export(envelope: Envelope, folder: Path | None) -> None:
    certified = {entry["name"]: entry["digest"]["sha256"] for entry in envelope.statement["subject"]}
    found = export_digests(Path(folder or "."))
    if found != certified:
        name = min(n for n in {**found, **certified} if found.get(n) != certified.get(n))
        raise EvidenceError(
            f"{name} of the deployed encoder is not the certified file (SHA-256 {found.get(name, 'none')[:12]}, "
            f"certified is {certified.get(name, 'none')[:12]}); another encoder is deployed; ask the operator."
        )


def _run(
    predicate: Predicate, envelope: Envelope, committed: tuple[Envelope, Commitment] | None, given: Given,
    times: Times | None,
) -> None:  # fmt: skip
    folder, rules = Path(given.run or "."), predicate.rules.rules()
    secret = read_secret(given.secret or folder / SECRET)
    _equal("the files", private(folder, secret), predicate.private)
    lines = read_ledger(folder / "ledger.jsonl")
    require_ledger(predicate.commitment, committed[1] if committed else None, lines)
    require_before(times or {}, next((line.get("time") for line in lines), None))
    found = check_run(folder, rules)
    if found.gaps:
        raise EvidenceError(f"The run directory is not whole. {' '.join(found.gaps)}")
    facts = state_facts(folder, found.judged, secret)
    certified = predicate.model_dump()
    for part, value in facts.items():
        _equal(part, value, certified[part])
    if export_digests(folder / "export") != {e["name"]: e["digest"]["sha256"] for e in envelope.statement["subject"]}:
        raise EvidenceError("the certified export is not that of the certified weights; ask the operator.")


def _receipt(given: Given, certificate: str, predicate: Predicate) -> str:
    try:
        image = read_plain(given.image) if given.image else None
    except OSError as error:
        raise EvidenceError(f"{given.image} cannot be read ({error.strerror or error}); give the image.") from None
    return check_receipt(load(Path(given.receipt or "")), certificate, predicate, image)


def _equal(what: str, found: Any, certified: Mapping[str, Any]) -> None:
    at = difference(certified, found, what)
    if at is not None:
        raise EvidenceError(
            f"{at}: the run directory gives another value than the certificate says; one of the two was changed; ask "
            "the operator for the run directory as it was certified."
        )
