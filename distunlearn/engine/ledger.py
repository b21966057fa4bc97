"""Append-only record of what entered the loss, when, and by which attempt.

One JSON object a line. A `cut` line says that so many bytes of a torn last line, which a killed writer left, were
removed. A `step` line names the forget ids that entered the loss at that step and counts every other role; a `start`
line begins an attempt and names the settings and the numerics that it works with; a `state` line has the digest of a
checkpoint or of a finished encoder. Every line has its number and the SHA-256 of the line before it, the first one that
of the commitment. Which lines count: `distunlearn.verify.ledger`, which reads them.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distunlearn.common.records import LineFile
from distunlearn.errors import CoverageError
from distunlearn.verify.ledger import Coverage, next_link


class Ledger:
    """Writer; only the main rank writes. Lines are flushed at once and synced to disk with each checkpoint."""

    def __init__(
        self,
        path: Path,
        *,
        is_main: bool = True,
        may_write: Callable[[], None] | None = None,
        facts: Mapping[str, object] | None = None,
        anchor: str | None = None,
    ) -> None:
        """may_write: asked before every line; raises where the directory belongs to another attempt.

        facts: what every `start` line names besides, such as settings and numerics.
        anchor: digest of the commitment that a new ledger goes back to; None: there is none.
        """
        self.path = Path(path)
        self.facts = dict(facts or {})
        self.may_write = may_write or (lambda: None)
        self._file = LineFile(self.path, 0o600) if is_main else None  # it names people's images
        self._lock = threading.Lock()  # the thread that saves writes, too
        if self._file is not None:
            self._next = next_link(self.path, anchor)
            if self._file.cut:
                self._write({"event": "cut", "bytes": self._file.cut})

    def start(self, phase: str, step: int, *, attempt: int, **facts: object) -> None:
        """A new attempt at `phase` goes on from `step` (0 for the first)."""
        self._write({"event": "start", "phase": phase, "step": step, "attempt": attempt, **facts, **self.facts})

    def step(
        self,
        phase: str,
        step: int,
        consumed: Mapping[str, Sequence[str]],
        forget: frozenset[str],
        names: str = "forget",
        count: Mapping[str, int] | None = None,
    ) -> None:
        """Ids that entered the loss at `step`, by role, over all ranks.

        Only forget ids are named; an id of the forget set that enters under another role is named too, under
        `misused`. In the phases that train on members on purpose (`names=""`) roles are only counted.

        count: images by role, where `consumed` leaves out ids that need no name.
        """
        line: dict[str, object] = {"event": "step", "phase": phase, "step": step}
        line["count"] = dict(count or {role: len(ids) for role, ids in consumed.items()})
        if names:
            line["forget"] = list(consumed.get(names, ()))
            misused = [i for role, ids in consumed.items() if role != names for i in ids if i in forget]
            if misused:
                line["misused"] = misused
        self._write(line)

    def state(self, phase: str, step: int, digest: str, **facts: object) -> None:
        """After `step` steps `phase` was in the state of this digest, which is that of a checkpoint unless `final`."""
        self._write({"event": "state", "phase": phase, "step": step, "digest": digest, **facts})

    def done(self, phase: str, step: int, **facts: object) -> None:
        """`phase` ended after `step` steps."""
        self._write({"event": "done", "phase": phase, "step": step, **facts})

    def dose(self, **facts: object) -> None:
        """A dose was chosen; facts: of `dose/curve.json`, with the digests of both ends and of the file of scores."""
        self._write({"event": "dose", "phase": "unlearn", **facts})

    def code(self, version: str, digest: str, outside: Sequence[Mapping[str, str]] = ()) -> None:
        """From here on the run works under this version, whose files have this sha256.

        outside: name, file and sha256 of each package or file with parts of the run that is not ours.
        """
        more = {"outside": list(outside)} if outside else {}
        self._write({"event": "code", "version": version, "digest": digest, **more})

    def sync(self) -> None:
        """Make everything written so far durable; another thread may go on writing."""
        if self._file is not None:
            self._file.sync()

    def size(self) -> int:
        """Bytes so far; only the main rank knows."""
        return self._file.size() if self._file is not None else 0

    def head(self, size: int) -> dict[str, object]:
        """What a checkpoint keeps of the first `size` bytes: `bytes` and `sha256`."""
        return {"bytes": size, "sha256": _sha256(self.path, size)}

    def begins_with(self, head: Mapping[str, Any]) -> bool:
        """Whether the ledger still begins with what `head` was made of."""
        size = head["bytes"]
        return self.path.stat().st_size >= size and _sha256(self.path, size) == head["sha256"]

    def close(self) -> None:
        """Sync and close; safe to call twice."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.sync()
            finally:
                file.close()

    def _write(self, line: dict[str, object]) -> None:
        if self._file is None:
            return
        self.may_write()
        with self._lock:
            number, before = self._next
            whole = {**line, "time": round(time.time(), 3), "n": number, "prev": before}
            text = json.dumps(whole, separators=(",", ":"), allow_nan=False)
            self._file.line(text)
            self._next = number + 1, hashlib.sha256(text.encode()).hexdigest()


def _sha256(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while size > 0 and (piece := file.read(min(size, 1 << 20))):
            digest.update(piece)
            size -= len(piece)
    return digest.hexdigest()


def require_coverage(found: Coverage, forgets: bool) -> None:
    """Refuse a training that did not do what was requested.

    forgets: whether the method is one that shows the forget images to its loss.

    Raises:
        CoverageError: a forget image never entered the loss of such a method, or entered a loss as a retained one.
    """
    if found.used_as_retain:
        raise CoverageError(
            f"{found.used_as_retain} of {found.requested} forget images entered a loss as retain images."
        )
    if forgets and found.consumed_min < 1:
        missed = sum(count == 0 for count in found.counts.values())
        raise CoverageError(
            f"{missed} of {found.requested} forget images never entered the loss; expected every one at least once; "
            "raise unlearn.steps or unlearn.forget_batch."
        )
