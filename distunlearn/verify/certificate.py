"""The certificate: what it states, how it is made of a finished run, and its strict form.

What it says: this code, with these settings, turned these weights into those weights, while every image of the request
entered the loss; these attacks then gave these figures. It names no image, no path, no host and no person.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from .commitment import kept_commitment, require_ledger
from .dose import DosePart, dose_facts
from .errors import DataError, EvidenceError
from .figures import Rules
from .forms import Count, Digest, Form, Number, RulesPart, Share, Tree, Word, read_form, rules_part
from .gates import MIN_IMAGES
from .ledger import effective_states, effective_steps, next_link, read_ledger
from .receipt import ROWS, outcomes, read_rows, request_leaves, tree
from .records import parse_record, read_plain, read_record
from .run import DONE, PHASES, SUMMARY_FIELDS, check_run
from .scores import read_scores
from .secret import commitment, make_secret
from .states import export_digests

Encoder = Literal["original", "unlearned", "retrained", "retrained_2", "retrained_3", "retrained_4"]
Verdict = Literal["pass", "fail", "inconclusive"]
Phase = Literal["pretrain", "unlearn", "retrain"]
LIMITS = {
    1: "Below level 3 the raw scores themselves are the operator's word.",
    2: "The settings were declared by the operator's word: no commitment was made before the run.",
    3: "Attacks outside the battery, and single people above the average, are not covered.",
    4: "Copies of images, weights or ids outside this program are not covered.",
    5: "That the request was complete, the holdout never trained on, and the original the encoder in use, is the "
       "operator's word.",
    6: "An officer and an operator who act together, and a verifier's machine that others control, are not covered.",
    7: "Forgotten images that return under other bytes are not found.",
    8: "On a GPU no step is repeated: weights within rounding of honest ones are not told apart.",
    9: "No encoder was trained without the images: gates compare them with held-out ones, which is weaker evidence.",
    10: "This run trained no encoder without the images: that what it was given never saw them is the operator's word.",
}  # fmt: skip
CERTIFICATE = Path("evidence") / "certificate.json"  # in the run directory
SCORED = [f"audit/scores-{encoder}.json" for encoder in get_args(Encoder)]
PRIVATE = ("run.yaml", "ledger.jsonl", *SCORED, "dose/scores.npz", "request.json", "roles.arrow", "chain.json",
           str(ROWS))  # fmt: skip


class LedgerPart(Form):
    """lines: of the file, torn ones too. head: SHA-256 of the last one. attempts, steps: by phase."""

    lines: Count
    head: Digest
    attempts: dict[Phase, Count]
    steps: dict[Phase, Count]
    codes: list[Digest]


class SegmentsPart(Form):
    """first, last: state digests that a training began and ended with; first is null for fresh weights. segments:
    between two states of the ledger."""

    first: Digest | None
    last: Digest
    segments: Count


class CoveragePart(Form):
    """As in `audit/summary.json`."""

    requested: Count
    consumed_min: Count
    consumed_max: Count
    consumed_mean: Number
    used_as_retain: Count


class GatePart(Form):
    """value, low, high: None where they were not evaluated, or left out because of too few images."""

    verdict: Literal["pass", "fail", "inconclusive", "not_evaluated"]
    value: Share | None
    low: Share | None
    high: Share | None
    margin: Number


class FiguresPart(Form):
    """Gates by name, and the AUC of every judged attack by encoder; without AUCs below 20 images."""

    gates: dict[Word, GatePart]
    aucs: dict[Word, dict[Encoder, Share | None]]


class ToolPart(Form):
    """Who made the certificate: version and digest of the code."""

    version: Word
    code: Digest


class Predicate(Form):
    """See the names. private: salted commitments of files that name images. request, outcome: see `receipt`."""

    commitment: Digest | None
    run: Digest
    sequence: Annotated[int, Field(ge=1, lt=2**53)]
    previous: Digest | None
    rules: RulesPart
    ledger: LedgerPart
    states: dict[Encoder, Digest]
    segments: dict[Phase, SegmentsPart]
    request: Tree
    outcome: Tree
    coverage: CoveragePart
    dose: DosePart | None
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
    found = read_form(Predicate, statement["predicate"], "the certificate")
    if found.limits != limits(found.commitment, found.states, found.rules.references):
        raise EvidenceError("the certificate leaves out sentences about what it does not cover; it is none.")
    return found


def limits(committed: str | None, encoders: Collection[str], references: int) -> list[int]:
    """Numbers of the sentences that a certificate has. encoders: those that were audited. references: see `Rules`."""
    left_out = {2} if committed is not None else set()
    left_out |= ({9} if "retrained" in encoders else set()) | (set() if references else {10})
    return sorted(set(LIMITS) - left_out)


def make_predicate(
    folder: Path, rules: Rules, tool: Mapping[str, str], chain: tuple[int, str | None] = (1, None)
) -> dict[str, Any]:
    """What a certificate states about a finished run, which is checked before.

    Args:
        rules: of its settings.
        tool: version and code digest of the program.
        chain: number of the certificate, and digest of the one before; a commitment's go before.

    Raises:
        DataError: something that a certificate needs is missing. EvidenceError: files contradict each other.
    """
    folder = Path(folder)
    found = check_run(folder, rules)
    if found.gaps or not (folder / "audit" / "summary.json").exists() or "unlearned" not in found.states:
        lacking = " ".join(found.gaps) or "The audit or the weights are not there."
        raise DataError(f"{folder} cannot be certified. {lacking} Finish the run first.")
    secret, kept = make_secret(folder), kept_commitment(folder)
    digest = kept[0].digest if kept else None
    sequence, previous = (kept[1].sequence, kept[1].previous) if kept else chain
    require_ledger(digest, kept[1] if kept else None, read_ledger(folder / "ledger.jsonl"))
    predicate = {
        "commitment": digest, "run": commitment(secret, "run", b""), "sequence": sequence, "previous": previous,
        "rules": rules_part(rules), **state_facts(folder, found.judged, secret), "private": private(folder, secret),
        "limits": [], "tool": dict(tool),
    }  # fmt: skip
    predicate["limits"] = limits(digest, predicate["states"], rules.references)
    read_predicate({"predicate": predicate})
    return predicate


def subject(folder: Path) -> dict[str, str]:
    """The files that a certificate is about: those of `export/`, with their SHA-256."""
    return export_digests(folder)


def private(folder: Path, secret: bytes) -> dict[str, str]:
    """Salted commitments of the files that name images, where they are there."""
    return {name: commitment(secret, name, read_plain(folder / name)) for name in PRIVATE if (folder / name).exists()}


def state_facts(folder: Path, judged: Mapping[str, Any], secret: bytes) -> dict[str, Any]:
    """`ledger`, `states`, `segments`, `request`, `outcome`, `coverage`, `dose`, `summary`, `figures` and `verdict` from
    the files of a checked run, and what `check_run` judged of its raw scores."""
    lines, rows = read_ledger(folder / "ledger.jsonl"), read_rows(folder)
    count, head = next_link(folder / "ledger.jsonl")
    text = read_plain(folder / "audit" / "summary.json")
    summary = parse_record(text, str(folder / "audit" / "summary.json"), SUMMARY_FIELDS, EvidenceError)
    files = read_scores(folder / "audit")
    states = {encoder: content["state"] for encoder, content in files.items()}
    phases = [phase for phase in PHASES.values() if any(line.get("phase") == phase for line in lines)]
    return {
        "ledger": {
            "lines": count,
            "head": head,
            "attempts": {p: sum(x["event"] == "start" and x["phase"] == p for x in lines) for p in phases},
            "steps": {phase: len(effective_steps(lines, phase)) for phase in phases},
            "codes": sorted({line["digest"] for line in lines if line["event"] == "code"}),
        },
        "states": states,
        "segments": {phase: segments(lines, phase) for phase in phases},
        "request": tree(request_leaves(rows, secret)),
        "outcome": tree(outcomes(rows, secret, lines)),
        "coverage": summary["coverage"],
        "dose": dose_facts(folder, lines, _done(folder), set(_audited(files)), rows),
        "summary": hashlib.sha256(text).hexdigest(),
        "figures": figures(judged, sum(row["role"] == "forget" for row in files["unlearned"]["samples"].values())),
        "verdict": judged["gates"]["verdict"],
    }


def _done(folder: Path) -> dict[str, Any]:
    return read_record(folder / DONE, None, EvidenceError)


def _audited(files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Ids of the non-members that the audit shows to the encoders."""
    return [i for i, row in files["unlearned"]["samples"].items() if row["role"] not in ("retain", "forget")]


def segments(lines: Sequence[dict], phase: str) -> dict[str, Any]:
    """`SegmentsPart` of a finished training."""
    states = [state["digest"] for _, state in sorted(effective_states(lines, phase).items())]
    return {"first": states[0], "last": states[-1], "segments": len(states) - 1}


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
