"""The certificate: what it states, how it is made of a finished run, and its strict form.

What it says: this code, with these settings, turned these weights into those weights, while every image of the request
entered the loss; these attacks then gave these figures. It names no image, no path, no host and no person.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import DataError, EvidenceError
from .figures import Rules, judge, plain
from .gates import MIN_IMAGES
from .ledger import effective_steps, read_ledger
from .records import parse_record, read_plain
from .run import PHASES, SUMMARY_FIELDS, check_run
from .scores import raw_scores, read_scores
from .secret import commitment, make_secret
from .states import export_digests

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=-1, le=1)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:+ -]{1,80}$")]
Encoder = Literal["original", "unlearned", "retrained"]
Verdict = Literal["pass", "fail", "inconclusive"]
LIMITS = {
    1: "Below level 3 the raw scores themselves are the operator's word.",
    2: "The settings were declared by the operator's word: no commitment was made before the run.",
    3: "Attacks outside the battery, and single people above the average, are not covered.",
    4: "Copies of images, weights or ids outside this program are not covered.",
    5: "That the request was complete, the holdout never trained on, and the original the encoder in use, is the "
       "operator's word.",
}  # fmt: skip
PRIVATE = ("run.yaml", "ledger.jsonl", "audit/scores-original.json", "audit/scores-unlearned.json",
           "audit/scores-retrained.json", "dose/scores.npz", "request.json", "roles.arrow")  # fmt: skip


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class RulesPart(_Model):
    """`figures.Rules`."""

    seed: Count
    bootstrap: Count
    confidence: Number
    view_agreement: Number
    attack: Number
    utility_points: Number
    gates: list[Word]
    method: Word

    def rules(self) -> Rules:
        """The same for `judge`."""
        return Rules(**{**self.model_dump(), "gates": tuple(self.gates)})


class LedgerPart(_Model):
    """lines: of the file. attempts, steps: by phase."""

    lines: Count
    attempts: dict[Literal["pretrain", "unlearn", "retrain"], Count]
    steps: dict[Literal["pretrain", "unlearn", "retrain"], Count]
    codes: list[Digest]


class CoveragePart(_Model):
    """As in `audit/summary.json`."""

    requested: Count
    consumed_min: Count
    consumed_max: Count
    consumed_mean: Number
    used_as_retain: Count


class GatePart(_Model):
    """value, low, high: None where they were not evaluated, or left out because of too few images."""

    verdict: Literal["pass", "fail", "inconclusive", "not_evaluated"]
    value: Share | None
    low: Share | None
    high: Share | None
    margin: Number


class FiguresPart(_Model):
    """Gates by name, and the AUC of every judged attack by encoder; without AUCs below 20 images."""

    gates: dict[Word, GatePart]
    aucs: dict[Word, dict[Encoder, Share | None]]


class ToolPart(_Model):
    """Who made the certificate: version and digest of the code."""

    version: Word
    code: Digest


class Predicate(_Model):
    """See the names. private: salted commitments of files that name images."""

    commitment: Digest | None
    run: Digest
    sequence: Annotated[int, Field(ge=1, lt=2**53)]
    previous: Digest | None
    rules: RulesPart
    ledger: LedgerPart
    states: dict[Encoder, Digest]
    coverage: CoveragePart
    private: dict[str, Digest]
    summary: Digest
    figures: FiguresPart
    verdict: Verdict
    limits: list[int]
    tool: ToolPart


def read_predicate(statement: Mapping[str, Any]) -> Predicate:
    """The predicate of a statement.

    Raises:
        EvidenceError: it has not the form of a certificate, version 1.
    """
    try:
        found = Predicate.model_validate(statement["predicate"])
        if found.limits != sorted(LIMITS):
            raise EvidenceError("the certificate leaves out sentences about what it does not cover; it is none.")
        return found
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise EvidenceError(f"the certificate has {where!r} in another form ({first['msg']}); it is none.") from None


def make_predicate(folder: Path, rules: Rules, tool: Mapping[str, str]) -> dict[str, Any]:
    """What a certificate states about a finished run, which is checked before.

    Args:
        rules: of its settings.
        tool: version and code digest of the program.

    Raises:
        DataError: something that a certificate needs is missing. EvidenceError: files contradict each other.
    """
    folder = Path(folder)
    found = check_run(folder, rules)
    if found.gaps or not (folder / "audit" / "summary.json").exists() or "unlearned" not in found.states:
        lacking = " ".join(found.gaps) or "The audit or the weights are not there."
        raise DataError(f"{folder} cannot be certified. {lacking} Finish the run first.")
    secret = make_secret(folder)
    part = {**vars(rules), "gates": list(rules.gates)}
    predicate = {
        "commitment": None, "run": commitment(secret, "run", b""), "sequence": 1, "previous": None,
        "rules": part, **state_facts(folder, rules), "private": private(folder, secret),
        "limits": sorted(LIMITS), "tool": dict(tool),
    }  # fmt: skip
    read_predicate({"predicate": predicate})
    return predicate


def subject(folder: Path) -> dict[str, str]:
    """The files that a certificate is about: those of `export/`, with their SHA-256."""
    return export_digests(folder)


def private(folder: Path, secret: bytes) -> dict[str, str]:
    """Salted commitments of the files that name images, where they are there."""
    return {name: commitment(secret, name, read_plain(folder / name)) for name in PRIVATE if (folder / name).exists()}


def state_facts(folder: Path, rules: Rules) -> dict[str, Any]:
    """`ledger`, `states`, `coverage`, `summary`, `figures` and `verdict` from the files of a checked run."""
    lines = read_ledger(folder / "ledger.jsonl")
    text = read_plain(folder / "audit" / "summary.json")
    summary = parse_record(text, str(folder / "audit" / "summary.json"), SUMMARY_FIELDS, EvidenceError)
    files = read_scores(folder / "audit")
    states = {encoder: content["state"] for encoder, content in files.items()}
    judged = plain(judge(raw_scores(files), rules, unchanged=states["original"] == states["unlearned"]))
    phases = [phase for phase in PHASES.values() if any(line.get("phase") == phase for line in lines)]
    return {
        "ledger": {
            "lines": len(lines),
            "attempts": {p: sum(x["event"] == "start" and x["phase"] == p for x in lines) for p in phases},
            "steps": {phase: len(effective_steps(lines, phase)) for phase in phases},
            "codes": sorted({line["digest"] for line in lines if line["event"] == "code"}),
        },
        "states": states,
        "coverage": summary["coverage"],
        "summary": hashlib.sha256(text).hexdigest(),
        "figures": figures(judged, raw_scores(files).forget),
        "verdict": judged["gates"]["verdict"],
    }


def figures(judged: Mapping[str, Any], images: int) -> dict[str, Any]:
    """What the certificate shows of `judge`'s figures. Of few images only verdicts: their AUCs would rank people."""
    shown = images >= MIN_IMAGES
    gates = {}
    for name, gate in judged["gates"].items():
        if name == "verdict":
            continue
        value = gate.get("auc", gate.get("change"))
        ends = {"value": value, "low": gate["low"], "high": gate["high"]} if shown else {}
        gates[name] = {"value": None, "low": None, "high": None, **ends, "verdict": gate["verdict"],
                       "margin": gate["margin"]}  # fmt: skip
    aucs = {name: {e: attack[e]["auc"] for e in PHASES} for name, attack in judged["attacks"].items()}
    return {"gates": gates, "aucs": aucs if shown else {}}
