"""Levels 3 and 4 of `verify`: the verifier's own audit of a run's encoders, and steps of its trainings repeated.

Both work on copies in a scratch folder, with the verifier's own installation. A segment lies between two states of the
ledger; it is repeated from the newest checkpoint that is kept, or from the start of its training. States, the hashes of
what every process was given, and the ids of every step must be equal: there is no tolerance that a forgery could use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distunlearn import __version__
from distunlearn.audit.run_audit import collect_evidence
from distunlearn.config.schema import RunConfig
from distunlearn.data.manifest.request import REQUEST, ROLES_FILE
from distunlearn.distributed.world import World
from distunlearn.engine import phases
from distunlearn.engine.backends import open_backend
from distunlearn.engine.backends.tensor_shards import whole
from distunlearn.engine.checkpoint.format import Checkpoint, files_digest, read_commit, verified
from distunlearn.engine.checkpoint.tensors import read_state
from distunlearn.engine.commitment import Declared
from distunlearn.engine.preemption import StopRequest
from distunlearn.engine.provenance import code_digest, numerics
from distunlearn.engine.run_directory import saved_config
from distunlearn.engine.session import load_own_parts, open_session, seeded
from distunlearn.errors import EvidenceError, StoppedError
from distunlearn.verify.certificate import Predicate
from distunlearn.verify.check import Further, Incomparable
from distunlearn.verify.commitment import kept_commitment
from distunlearn.verify.ledger import effective_states, effective_steps, read_ledger
from distunlearn.verify.run import DONE, FOLDERS, PHASES, STATE
from distunlearn.verify.scores import read_scores

PLACES = {phase: FOLDERS[encoder] for encoder, phase in PHASES.items()}  # folder of each training
REPEATED = ("unlearn", "retrain")
TOLERANCE = 1e-3  # of a score's spread: processors of different make round differently


class _StopAt(StopRequest):
    """Asks for a stop before a step; nothing else does."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(folder)
        self.step = step

    def agreed(self, world: World, *position: int) -> bool:
        """See `StopRequest`; the loop gives (phase, step, count)."""
        return len(position) == 3 and position[1] == self.step

    def honoured(self, world: World) -> str:
        """See `StopRequest`."""
        return "the replay"


def further(run: Path, shards: Path | None, replayed: str | None) -> dict[int, Further]:
    """The checks that are asked for. shards: None makes none. replayed: a number of segments, "all", or None."""
    if shards is None:
        return {}
    found: dict[int, Further] = {3: lambda predicate: _own_audit(_Case(run, shards), predicate)}
    if replayed is not None:
        count = None if replayed == "all" else int(replayed)
        found[4] = lambda predicate: _replay(_Case(run, shards), count)
    return found


class _Case:
    """A run that is checked: its settings as this machine can follow them, its ledger, its commitment."""

    def __init__(self, run: Path, shards: Path) -> None:
        self.run, saved = run, saved_config(run)
        self.lines = read_ledger(run / "ledger.jsonl")
        self.starts = [line for line in self.lines if line["event"] == "start"]
        kept = kept_commitment(run)
        self.declared = Declared(kept[0].digest, kept[1].nonce) if kept else Declared()
        threads = next((line["numerics"]["threads"] for line in self.starts), saved.runtime.threads)
        runtime = dataclasses.replace(saved.runtime, reuse=None, threads=threads)
        data = dataclasses.replace(saved.data, shards=str(shards), store=None)
        self.cfg: RunConfig = dataclasses.replace(saved, data=data, runtime=runtime, tracking=())
        load_own_parts(self.cfg)
        self.world = open_backend(self.cfg).world
        self._require_code()

    def _require_code(self) -> None:
        """Raises EvidenceError, or Incomparable, where other code worked on the run than is installed here."""
        for line in self.lines:
            if line["event"] != "code" or line["digest"] == code_digest():
                continue
            if line["version"] != __version__:
                raise Incomparable(
                    f"the run is of distunlearn {line['version']}, and this is {__version__}: install it"
                )
            raise EvidenceError(
                f"the run worked with code {line['digest'][:12]}, and version {__version__} as it is installed here is "
                f"{code_digest()[:12]}; its code was changed; ask the operator which code it was."
            )

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder that goes away, the same on every rank, with the settings of the run. Collective."""
        with contextlib.ExitStack() as stack:
            made = stack.enter_context(tempfile.TemporaryDirectory()) if self.world.is_main else None
            out = Path(self.world.broadcast_object(made))
            if self.world.is_main:
                for name in ("run.yaml", REQUEST, ROLES_FILE):
                    shutil.copy(self.run / name, out)
            self.world.barrier()
            yield out
            self.world.barrier()

    def copy(self, place: str, out: Path) -> None:
        """A finished encoder."""
        for name in (STATE, DONE, "export"):
            source, target = self.run / place / name, out / place / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target)
            elif source.exists():
                shutil.copy(source, target)


# -- level 3 ---------------------------------------------------------------------------------------------------------


def _own_audit(case: _Case, predicate: Predicate) -> str:
    """The three encoders, looked at again."""
    with case.scratch() as out:
        if case.world.is_main:
            for place in FOLDERS.values():
                case.copy(place, out)
            shutil.copy(case.run / "ledger.jsonl", out)
        case.world.barrier()
        with open_session(case.cfg, out, case.declared) as session, seeded(session, "audit") as own:
            collect_evidence(own)
        largest = _difference(read_scores(case.run / "audit"), read_scores(out / "audit"))
    return "equal" if largest == 0 else f"equal but for rounding, at most {largest:.1g} of a score's spread"


def _difference(claimed: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """The largest difference of two sets of raw scores, in spreads of the score.

    Raises:
        EvidenceError: it is not rounding.
    """
    largest = 0.0
    for encoder, content in found.items():
        theirs, ours = claimed.get(encoder, {"samples": {}})["samples"], content["samples"]
        names = sorted({name for row in ours.values() for name in row} - {"role", "label"})
        for name in names:
            mine, other = (np.array([rows.get(i, {}).get(name, np.nan) for i in ours]) for rows in (ours, theirs))
            gap = float(np.nanmax(np.abs(mine - other), initial=0.0)) / max(float(np.nanstd(mine)), 1e-12)
            if (np.isnan(mine) != np.isnan(other)).any() or gap > TOLERANCE:
                raise EvidenceError(
                    f"{name} of the {encoder} encoder is not what this encoder gives when it is looked at again; the "
                    "scores were made up, or are of other weights or images."
                )
            largest = max(largest, gap)
    return largest


# -- level 4 ---------------------------------------------------------------------------------------------------------


def _replay(case: _Case, count: int | None) -> str:
    """Repeat `count` random segments of each training and those that matter most; None: all, pretraining too."""
    told = []
    for phase in REPEATED if count is not None else PHASES.values():
        states = sorted(effective_states(case.lines, phase).items())
        if len(states) < 2:
            continue
        _require_comparable(case, phase)
        chosen = case.world.broadcast_object(_chosen(case, phase, states, count))
        _repeat(case, phase, states, chosen)
        told.append(f"{len(chosen)} of {len(states) - 1} segments of {phase}")
    return ", ".join(told) or "no training of this run has steps"


def _require_comparable(case: _Case, phase: str) -> None:
    own = numerics(case.cfg, case.world)
    if torch.cuda.is_available():
        raise Incomparable("on a GPU steps do not repeat bit for bit")
    for line in case.starts:
        theirs = line["numerics"]
        differing = [name for name in theirs if line["phase"] == phase and theirs[name] != own.get(name)]
        if differing:
            told = ", ".join(f"{name} {theirs[name]} there, {own.get(name)} here" for name in differing)
            raise Incomparable(f"{phase} worked with other numerics ({told})")


def _chosen(case: _Case, phase: str, states: Sequence[tuple[int, dict]], count: int | None) -> list[int]:
    """Numbers of segments: drawn now, so that nobody could know them; the first, the last, the two of most change."""
    numbers = list(range(len(states) - 1))
    if count is None:
        return numbers
    changes = {
        n: change for n in numbers if (change := _change(case, phase, states[n][0], states[n + 1][0])) is not None
    }
    drawn = secrets.SystemRandom().sample(numbers, min(count, len(numbers)))
    return sorted({*drawn, numbers[0], numbers[-1], *sorted(changes, key=lambda n: -changes[n])[:2]})


def _change(case: _Case, phase: str, first: int, last: int) -> float | None:
    """How far the weights moved between two checkpoints that are kept."""
    ends = [_kept(case, phase, step, None) for step in (first, last)]
    if None in ends:
        return None
    a, b = (read_state(end) for end in ends if end is not None)
    return sum(float((whole(b[n]).double() - whole(a[n]).double()).square().sum()) for n in a if n.startswith("model."))


def _kept(case: _Case, phase: str, step: int, digest: str | None) -> Checkpoint | None:
    """The checkpoint of a step, if it is kept; digest: that it must have."""
    found = read_commit(case.run / PLACES[phase] / "checkpoints" / f"step-{step:08d}")
    if found is None or not verified(found) or digest not in (None, files_digest(found.facts["files"])):
        return None
    return found


def _repeat(case: _Case, phase: str, states: Sequence[tuple[int, dict]], chosen: Sequence[int]) -> None:
    """Repeat segments, each from the newest state that is at hand, and compare every state on the way."""
    at: int | None = None  # number of the state that `out` holds
    with contextlib.ExitStack() as stack:
        for number in chosen:
            if at is None or number > at:
                stack.close()
                at = next((n for n in range(number, 0, -1) if _kept(case, phase, *_place(states[n]))), 0)
                out = stack.enter_context(case.scratch())
                if case.world.is_main:
                    _lay_out(case, phase, states[at], out)
                case.world.barrier()
            while at <= number:
                _advance(case, phase, states, at, out)
                at += 1


def _place(state: tuple[int, dict]) -> tuple[int, str]:
    return state[0], state[1]["digest"]


def _lay_out(case: _Case, phase: str, state: tuple[int, dict], out: Path) -> None:
    """What the training needs to go on from a state: original encoder, checkpoint, ledger up to it."""
    if phase == "unlearn":
        case.copy("original", out)
    checkpoint = _kept(case, phase, *_place(state)) if state[0] else None
    if checkpoint is not None:
        folder = out / PLACES[phase] / "checkpoints"
        shutil.copytree(checkpoint.folder, folder / checkpoint.folder.name)
        content = (case.run / "ledger.jsonl").read_bytes()
        (out / "ledger.jsonl").write_bytes(content[: checkpoint.facts["ledger"]["bytes"]])


def _advance(case: _Case, phase: str, states: Sequence[tuple[int, dict]], at: int, out: Path) -> None:
    """From one state to the next.

    Raises:
        EvidenceError: it is another one than the run has.
    """
    (first, _), (last, expected) = states[at], states[at + 1]
    with open_session(case.cfg, out, case.declared) as session, seeded(session, phase) as own:
        if not expected.get("final"):
            own = dataclasses.replace(own, stop=_StopAt(out, last))
        with contextlib.suppress(StoppedError):
            getattr(phases, phase)(own)
        case.world.barrier()
    lines = read_ledger(out / "ledger.jsonl")
    found = effective_states(lines, phase).get(last, {})
    steps, theirs = effective_steps(lines, phase), effective_steps(case.lines, phase)
    wrong = [step for step in range(first, last) if _seen(steps.get(step)) != _seen(theirs.get(step))]
    if wrong or (found.get("digest"), found.get("ranks")) != (expected["digest"], expected.get("ranks")):
        raise EvidenceError(
            f"steps {first} to {last} of {phase}, repeated, give state {str(found.get('digest'))[:12]}, and the run "
            f"has {expected['digest'][:12]}; these weights were not made by these steps; do not rely on them."
        )


def _seen(line: Mapping[str, Any] | None) -> Any:
    return line and {name: line.get(name) for name in ("count", "forget", "misused")}
