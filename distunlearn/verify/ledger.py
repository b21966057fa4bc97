"""The ledger of a run, read: what entered the loss, by the lines that count.

One JSON object a line; `distunlearn.engine.ledger` writes them. After an interruption a `start` line says from which
step the new attempt goes on; step lines at or after it, written by earlier attempts, never reached a committed
checkpoint and no longer count. Coverage is computed from these lines and from nothing else.

The lines are a chain: `n` is the number of the line, from 0, and `prev` the SHA-256 (hex) of the bytes of the line
before it; of the first line it is the digest of the commitment, or null.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import DataError, EvidenceError
from .records import FIX, read_plain, read_records

# What a line of each event must have; `images` are lists of ids, where they are there.
EVENTS: Mapping[str, Mapping[str, type]] = {
    "start": {"phase": str, "step": int}, "step": {"phase": str, "step": int, "count": dict},
    "done": {"phase": str, "step": int}, "dose": {"phase": str}, "code": {"version": str, "digest": str},
    "state": {"phase": str, "step": int, "digest": str},
}  # fmt: skip
MAY_HAVE: Mapping[str, type] = {"numerics": dict, "faults": dict, "settings": str, "forget": list, "misused": list}


@dataclass(frozen=True)
class Coverage:
    """How often each requested id entered the loss; `used_as_retain` must be 0."""

    requested: int
    consumed_min: int
    consumed_max: int
    consumed_mean: float
    used_as_retain: int
    counts: Mapping[str, int]

    def as_dict(self) -> dict[str, float | int]:
        """The figures of `audit/summary.json`, without the ids."""
        return {
            "requested": self.requested,
            "consumed_min": self.consumed_min,
            "consumed_max": self.consumed_max,
            "consumed_mean": self.consumed_mean,
            "used_as_retain": self.used_as_retain,
        }


def read_ledger(path: Path) -> list[dict]:
    """All whole lines, in order; a last line without a line end, which a killed writer left, is left out.

    Raises:
        DataError: a line is damaged, or lacks what a line of its event has.
        EvidenceError: the chain is broken: a line was changed, taken out, put in or moved.
    """
    lines: list[dict] = []
    before: bytes | None = None
    for (where, line), raw in zip(read_records(path), _raw(path), strict=True):
        event = line.get("event")
        fields = EVENTS.get(event, {}) if isinstance(event, str) else None
        if fields is None or not all(type(line.get(name)) is kind for name, kind in fields.items()):
            raise DataError(f"{where} is no line of a ledger; {FIX}.")
        wrong = [name for name, kind in MAY_HAVE.items() if name in line and not isinstance(line[name], kind)]
        if wrong or not all(isinstance(i, str) for name in ("forget", "misused") for i in line.get(name, ())):
            raise DataError(f"{where} has a {(wrong or ['name'])[0]} of another kind; {FIX}.")
        link = line.get("prev") if before is None else _digest(before)
        if (line.get("n"), line.get("prev")) != (len(lines), link):
            raise EvidenceError(
                f"{where} does not follow the line before it (number and SHA-256 differ); the ledger was changed; "
                "restore it."
            )
        before = raw
        lines.append(line)
    return lines


def next_link(path: Path, anchor: str | None = None) -> tuple[int, str | None]:
    """`n` and `prev` of the next line; anchor: `prev` of the first one."""
    lines = _raw(path) if Path(path).exists() else []
    return (len(lines), _digest(lines[-1])) if lines else (0, anchor)


def _raw(path: Path) -> list[bytes]:
    """The bytes of every whole line."""
    return read_plain(path).split(b"\n")[:-1]


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def effective_states(lines: Sequence[dict], phase: str) -> dict[int, dict]:
    """The states of `phase` that count, by step: {"digest", "ranks"?, "final"?}, the one it began with among them.

    A checkpoint that was resumed counts; those after it, of the attempt before, do not.
    """
    states: dict[int, dict] = {}
    for line in lines:
        if line.get("phase") != phase:
            continue
        if line["event"] == "start":
            states = {step: kept for step, kept in states.items() if step < line["step"]}
            states[line["step"]] = {"digest": line.get("state"), "ranks": line.get("ranks")}
        elif line["event"] == "state":
            states[line["step"]] = line
    return states


def effective_steps(lines: Sequence[dict], phase: str) -> dict[int, dict]:
    """Step lines of `phase` that count: the last attempt to run each step, as checkpoints were resumed."""
    steps: dict[int, dict] = {}
    for line in lines:
        if line.get("phase") != phase:
            continue
        if line["event"] == "start":
            steps = {number: kept for number, kept in steps.items() if number < line["step"]}
        elif line["event"] == "step":
            steps[line["step"]] = line
    return steps


def coverage(lines: Sequence[dict], forget: Sequence[str], phase: str = "unlearn") -> Coverage:
    """Consumption counts of the requested ids in `phase`; `used_as_retain` counts every image of this or an earlier
    request that entered under another role, in the retrained reference too.

    Args:
        lines: from `read_ledger`.
        forget: the requested ids; at least one.
    """
    counts: Counter[str] = Counter()
    misused: set[str] = set()
    for line in effective_steps(lines, phase).values():
        counts.update(line.get("forget", ()))
        misused.update(line.get("misused", ()))
    for line in effective_steps(lines, "retrain").values():
        misused.update(line.get("misused", ()))
    numbers = [counts[i] for i in forget]
    return Coverage(
        requested=len(forget),
        consumed_min=min(numbers),
        consumed_max=max(numbers),
        consumed_mean=sum(numbers) / len(numbers),
        used_as_retain=len(misused),
        counts={i: counts[i] for i in forget},
    )


def coverage_by_person(counts: Mapping[str, int], persons: Mapping[str, int]) -> list[dict[str, int]]:
    """Of each requested person, by number: how many images, and how often the least of them entered the loss.

    counts: of `Coverage`. persons: {id: number of the person}, -1 where unknown.
    """
    found: dict[int, list[int]] = {}
    for sample_id, count in counts.items():
        if persons[sample_id] >= 0:
            found.setdefault(persons[sample_id], []).append(count)
    return [{"person": p, "images": len(of), "consumed_min": min(of)} for p, of in sorted(found.items())]
