"""A run directory as a whole: settings, ledger, weights, exports, raw scores and summary agree with each other.

What disagrees is an error; what is not there cannot be checked and is named as a gap. Digests show that files belong
together. They do not show who wrote them: whoever can write the directory can write all of it anew.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import EvidenceError
from .figures import REFERENCES, Rules, judge, plain
from .ledger import coverage, effective_states, effective_steps, read_ledger
from .records import find_record, read_plain
from .scores import raw_scores, read_scores
from .states import export_digests, read_tensors, require_same_backbone, state_digest

DONE = "done.json"
STATE = "training_state.safetensors"
FOLDERS = {"original": "original", "unlearned": ".", **{name: name for name in REFERENCES}}
PHASES = {"original": "pretrain", "unlearned": "unlearn", "retrained": "retrain"}
BROUGHT = {name: name.replace("retrained", "retrain") for name in REFERENCES[1:]}  # phases of further references
MAY_BE_ONE = {"none": {"original", "unlearned"}, "retrain": {"unlearned", "retrained"}}  # by method
# What else `done.json` may hold: sentences about what was taken of a file, its digest; what shows that an encoder which
# another run trained fits.
CHECKPOINT, CHECKPOINT_SHA256, REFERENCE = "checkpoint", "checkpoint_sha256", "reference"
DONE_FIELDS = {"phase": str, "digest": str, "state": str, "export": dict, "steps": int}
SUMMARY_FIELDS = {"attacks": dict, "utility": dict, "gates": dict, "coverage": dict}
CLOSE = 1e-9  # figures of another machine may differ by rounding


@dataclass(frozen=True)
class Checked:
    """What `check_run` found.

    states: digest of each encoder whose weights are there. gaps: what a pass needs and could not be checked. notes:
    what a reader must know. Both a sentence each. judged: what `judge` gives of the raw scores, as plain data; empty
    where there are none.
    """

    states: dict[str, str] = field(default_factory=dict)
    gaps: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    judged: dict[str, Any] = field(default_factory=dict)


def check_run(folder: Path, rules: Rules | None) -> Checked:
    """Check a finished run against itself.

    Args:
        rules: that it was declared to be judged by; None: they are not known.

    Raises:
        DataError: a file is damaged. EvidenceError: two files contradict each other.
    """
    folder, found = Path(folder), Checked()
    lines = read_ledger(folder / "ledger.jsonl") if os.path.lexists(folder / "ledger.jsonl") else []
    if lines:
        require_settings(folder, lines)
        found.notes.extend(_notes(lines))
    else:
        found.gaps.append("The ledger is not there, so nothing shows what was processed.")
    named, dose = {}, None
    for encoder, place in FOLDERS.items():
        done = find_record(folder / place / DONE, DONE_FIELDS, EvidenceError)
        if done is None:
            continue
        named[encoder] = done.get("state")
        dose = done.get("dose") if encoder == "unlearned" else dose
        if (folder / place / STATE).exists():
            require_encoder(folder / place, done)
            found.states[encoder] = done["state"]
        else:
            found.notes.append(f"The weights of the {encoder} encoder are not there, so their digest is not checked.")
        if lines:
            phase = {**PHASES, **BROUGHT}[encoder]
            _require_steps(lines, phase, done)
            _require_states(lines, phase, done, named.get("original"))
    summary = find_record(folder / "audit" / "summary.json", None, EvidenceError)
    if summary is not None:
        _require_summary(folder, summary, named, dose, rules, lines, found)
    return found


def require_settings(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Every attempt began with the settings that are there now.

    Raises:
        EvidenceError: one did not.
    """
    path = folder / "run.yaml"
    now = hashlib.sha256(read_plain(path)).hexdigest() if path.exists() else None
    for line in lines:
        if line["event"] == "start" and line.get("settings") != now:
            raise EvidenceError(
                f"run.yaml is not the one that {line.get('phase')} began with (digest {str(now)[:12]}, the ledger has "
                f"{str(line.get('settings'))[:12]}); the settings were changed after the run began; restore them."
            )


def require_encoder(folder: Path, done: Mapping[str, Any]) -> None:
    """The weights beside done.json have the digest that it names, and `export` holds their backbone.

    Raises:
        EvidenceError: not so.
    """
    state = read_tensors(folder / STATE)
    if state_digest(state) != done.get("state"):
        raise EvidenceError(f"{folder / STATE} differs from the digest in {DONE}; restore the file or train it again.")
    if export_digests(folder / "export") != done.get("export"):
        raise EvidenceError(
            f"{folder / 'export'} differs from the digests in {DONE}; what is exported is not what was trained and "
            "audited; restore the files or train it again."
        )
    require_same_backbone(state, folder / "export")


def require_distinct(states: Mapping[str, str | None], method: str, dose: float | None = None) -> None:
    """No two encoders of a run are the same weights, but for methods that mean them to be.

    dose: of the method's change that `done.json` of the unlearned encoder says was kept; at 0 it is the original one.

    Raises:
        EvidenceError: two are, or the unlearned is not the original one at dose 0.
    """
    if dose == 0 and {"original", "unlearned"} <= set(states) and states["original"] != states["unlearned"]:
        raise EvidenceError(
            f"{DONE} says that dose 0 of method {method} was kept, and the unlearned encoder is not the original one; "
            "one of them was changed; unlearn again."
        )
    may_be_one = MAY_BE_ONE.get("none" if dose == 0 else method)
    seen: dict[str, str] = {}
    for encoder, state in states.items():
        other = seen.setdefault(str(state), encoder)
        if other != encoder and {other, encoder} != may_be_one:
            raise EvidenceError(
                f"the {other} and the {encoder} encoder are the same weights (state {str(state)[:12]}), which "
                f"method {method} does not make; one was put in the place of the other; train it again."
            )


def _require_steps(lines: Sequence[dict], phase: str, done: Mapping[str, Any]) -> None:
    """The ledger has every step of a finished phase once, and no other."""
    steps, found = done.get("steps"), effective_steps(lines, phase)
    reused = phase != "unlearn" and not any(line.get("phase") == phase for line in lines)
    if not reused and set(found) != set(range(int(steps or 0))):
        raise EvidenceError(
            f"the ledger has {len(found)} steps of {phase} that count, and {DONE} says {steps}; expected each of them "
            "once; the ledger was changed."
        )


def _require_states(lines: Sequence[dict], phase: str, done: Mapping[str, Any], original: str | None) -> None:
    """A finished phase ended with the encoder that is there, and forgetting began with the original one."""
    states = sorted(effective_states(lines, phase).items())
    if not states:
        return  # taken over from another run
    (first, began), (_, ended) = states[0], states[-1]
    if ended["digest"] != done.get("state") or not ended.get("final"):
        raise EvidenceError(
            f"the ledger says that {phase} ended with state {str(ended['digest'])[:12]}, and {DONE} names "
            f"{str(done.get('state'))[:12]}; the weights were put there afterwards; train them again."
        )
    if phase == "unlearn" and len(states) > 1 and first == 0 and began["digest"] not in (None, original):
        raise EvidenceError(
            f"unlearn began with state {str(began['digest'])[:12]}, and the original encoder has "
            f"{str(original)[:12]}; one of them was changed; unlearn again."
        )


def _require_summary(
    folder: Path,
    summary: Mapping[str, Any],
    named: Mapping[str, str | None],
    dose: float | None,
    rules: Rules | None,
    lines: Sequence[dict],
    found: Checked,
) -> None:
    if rules is None:
        found.gaps.append("The settings are not there, so nothing shows which checks were declared.")
        return
    files = read_scores(folder / "audit")
    if not {"original", "unlearned"} <= set(files):
        found.gaps.append("The raw scores are not there, so the figures cannot be computed again.")
        return
    states = {encoder: content.get("state") for encoder, content in files.items()}
    for encoder, state in states.items():
        if encoder in named and state != named[encoder]:
            raise EvidenceError(
                f"audit/scores-{encoder}.json is of other weights (state {str(state)[:12]}) than the {encoder} encoder "
                f"({str(named[encoder])[:12]}); audit the run again."
            )
    require_distinct(states, rules.method, dose)
    found.judged.update(plain(judge(raw_scores(files), rules, unchanged=states["original"] == states["unlearned"])))
    expected = {**found.judged, "states": states}
    if lines:
        expected["coverage"] = _coverage(lines, files, summary)
    for part, value in expected.items():
        at = difference(value, summary.get(part), part)
        if at is not None:
            raise EvidenceError(
                f"audit/summary.json differs from what the raw scores, the settings and the ledger give (at {at}); "
                "one of them was changed; audit the run again."
            )


def _coverage(lines: Sequence[dict], files: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """From the ledger. The request is known by the raw scores, which may be of a part, and by the ledger itself."""
    samples = files["unlearned"]["samples"]
    ids = {i for i, row in samples.items() if row["role"] == "forget"}
    for line in effective_steps(lines, "unlearn").values():
        ids.update(line.get("forget", ()))
    covered = coverage(lines, sorted(ids)).as_dict()
    told = summary.get("coverage")
    requested = told.get("requested") if isinstance(told, dict) else None
    if isinstance(requested, int) and requested > len(ids):  # those that nothing names entered no loss
        mean = covered["consumed_mean"] * len(ids) / requested
        covered |= {"requested": requested, "consumed_min": 0, "consumed_mean": mean}
    return covered


def difference(expected: Any, found: Any, at: str) -> str | None:
    """Where two values of plain JSON differ beyond rounding; None where they do not."""
    if isinstance(expected, dict) and isinstance(found, dict):
        if expected.keys() != found.keys():
            return f"{at}.{sorted(expected.keys() ^ found.keys())[0]}"
        places = (difference(expected[key], found[key], f"{at}.{key}") for key in expected)
        return next((place for place in places if place is not None), None)
    if isinstance(expected, float) and isinstance(found, (int, float)) and not isinstance(found, bool):
        return None if math.isclose(expected, found, rel_tol=CLOSE, abs_tol=CLOSE) else at
    return None if type(expected) is type(found) and expected == found else at


def _notes(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Attempts with other numerics or other code, and faults on demand."""
    notes = []
    starts = [line for line in lines if line["event"] == "start"]
    kinds = [line.get("numerics") or {} for line in starts]
    for name in sorted({name for kind in kinds for name in kind}):
        values = list(dict.fromkeys(str(kind.get(name)) for kind in kinds))
        if len(values) > 1:
            notes.append(f"Attempts worked with different {name}: {', '.join(values)}; results may differ by rounding.")
    codes = {line.get("digest") for line in lines if line["event"] == "code"}
    if len(codes) > 1:
        notes.append(f"{len(codes)} versions of the code worked on this run.")
    faults = [line["faults"] for line in starts if line.get("faults")]
    if any(fault.get("active") for fault in faults):
        notes.append("Faults were injected on purpose into this run, as tests do: it shows nothing about forgetting.")
    elif faults:
        notes.append("A variable that asks for injected faults was set; it did nothing.")
    return notes
