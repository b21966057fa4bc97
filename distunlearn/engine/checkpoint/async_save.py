"""Saving beside training: a copy into host memory blocks it, all else happens in a thread.

A save has two phases. Every rank writes and syncs its files and says so by a small file beside them; the main rank
waits for all of these, asks whether the directory is still its own, and commits by a rename. The ranks talk through
the folder alone, so that no collective of the thread can come between those of the training. A save in flight is waited
for by the next one, by a stop and by the end of the phase; what hindered it is raised then, on all ranks, and asks for
a stop at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from distunlearn import errors
from distunlearn.common.files import write_json
from distunlearn.config.checks import SHARDED
from distunlearn.config.schema import CheckpointConfig
from distunlearn.distributed.world import World
from distunlearn.encoders.weights import check_finite
from distunlearn.engine.backends import Backend
from distunlearn.engine.backends.tensor_shards import Piece
from distunlearn.engine.checkpoint.format import (
    KEEP,
    Checkpoint,
    begin,
    candidates,
    commit,
    exposed,
    files_digest,
    none_verifies,
    read_commit,
    verified,
)
from distunlearn.engine.checkpoint.tensors import OPTIMIZER, write_pieces
from distunlearn.engine.ledger import Ledger
from distunlearn.engine.preemption import StopRequest
from distunlearn.errors import DataError, DistunlearnError, NumericsError, RankLostError
from distunlearn.verify.records import read_record

LARGE = 64 * 2**20  # weights above which `auto` shards (float32: 256 MiB, and twice that for AdamW)
PATIENCE = 600.0  # seconds the main rank waits for the parts of the others


class HostBuffers:
    """Host memory that every save copies into: made by the first, page-locked where it is filled from a GPU."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def copy(self, name: str, piece: Piece) -> Piece:
        """The piece under another name, its values copied."""
        values = piece.values
        kept = self._kept.get(name)
        if kept is None or kept.shape != values.shape or kept.dtype != values.dtype:
            kept = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._kept[name] = kept
        return Piece(name, kept.copy_(values), piece.shape, piece.start)


@dataclass
class _Save:
    """One save on one rank. `trouble` may be read once the event before it is set."""

    step: int
    token: str
    sharded: bool
    pieces: list[Piece]
    facts: dict[str, Any]
    ledger_bytes: int
    written: threading.Event = field(default_factory=threading.Event)
    abandoned: threading.Event = field(default_factory=threading.Event)
    trouble: BaseException | None = None
    notes: list[str] = field(default_factory=list)
    thread: threading.Thread | None = None


class Saver:
    """Saves one phase's states into `folder`; used as a context, which waits for the save in flight and never raises.

    Args:
        stop: asked for a stop as soon as a save fails.
        note: told of what is no error (an old checkpoint that cannot be removed).
        keep: checkpoints that stay.
    """

    def __init__(
        self, folder: Path, backend: Backend, settings: CheckpointConfig, ledger: Ledger, stop: StopRequest,
        note: Callable[[str], None], keep: int = KEEP,
    ) -> None:  # fmt: skip
        self._folder, self._backend, self._settings = folder, backend, settings
        self._ledger, self._stop, self._note, self._keep = ledger, stop, note, keep
        self._buffers = HostBuffers()
        self._job: _Save | None = None
        self._sound: set[int] = set()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        """Without the other ranks: they may be gone."""
        if self._job is not None and self._job.thread is not None:
            self._job.abandoned.set()
            self._job.thread.join()
        self._job = None

    def resumed(self, step: int) -> None:
        """The checkpoint of `step` is known to be sound: the phase goes on from it."""
        self._sound.add(step)

    def is_sharded(self) -> bool:
        """Whether each rank writes its own pieces; the same answer on all ranks."""
        backend, wanted = self._backend, self._settings.sharded
        if backend.world.size == 1 or wanted == "never":
            return False
        return wanted == "always" or (backend.cfg.backend in SHARDED and backend.num_weights > LARGE)

    def save(
        self, step: int, extras: Mapping[str, Tensor], facts: Mapping[str, Any], momentum: nn.Module | None = None
    ) -> None:
        """Save the state before step `step`. Collective.

        Args:
            extras: what the main rank saves beside weights and optimizer, under its full name.
            facts: plain JSON for COMMIT.json.
            momentum: the momentum encoder's model, which is saved as the weights are.

        Raises:
            DataError, NumericsError, RankLostError: what hindered the save before this one; synchronous: this one.
        """
        self.wait()
        sharded = self.is_sharded()
        token = self._backend.world.broadcast_object(f"{time.time_ns():x}") if sharded else "0"
        facts = {**facts, "optimizer": type(self._backend.optimizer).__name__, "sharded": sharded}
        pieces = self._snapshot(sharded, extras, momentum)
        job = self._job = _Save(step, token, sharded, pieces, facts, self._ledger.size())
        if sharded or self._backend.world.is_main:
            job.thread = threading.Thread(target=self._run, args=(job,), name=f"save-{step}", daemon=True)
            job.thread.start()
        else:
            job.written.set()
        if not self._settings.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until the save in flight is committed, on all ranks; without one, at once. Collective.

        Raises:
            DataError: files could not be written.
            NumericsError: a value is not finite.
            RankLostError: the directory belongs to another attempt, or a rank's part did not come.
        """
        if self._job is None:
            return
        job, self._job = self._job, None
        job.written.wait()
        found = self._troubles(job) if job.sharded else []
        if found:
            job.abandoned.set()  # the main rank need not wait for what does not come
        if job.thread is not None:
            job.thread.join()
        found = found or self._troubles(job)
        for note in job.notes:
            self._note(note)
        if found:
            kind, text = found[0]
            own = job.trouble is not None and str(job.trouble) == text
            error = job.trouble if own else getattr(errors, kind, DistunlearnError)(text)
            if isinstance(error, DistunlearnError):
                error.agreed = True
            raise error

    def _troubles(self, job: _Save) -> list[list[str]]:
        """(class, sentence) of every rank's trouble, in rank order. Collective."""
        mine = [] if job.trouble is None else [type(job.trouble).__name__, str(job.trouble)]
        return [found for found in self._backend.world.gather_objects(mine) if found]

    def _snapshot(self, sharded: bool, extras: Mapping[str, Tensor], momentum: nn.Module | None) -> list[Piece]:
        backend, pieces = self._backend, []
        sources = [("model.", backend.weights(sharded)), (OPTIMIZER, backend.moments(sharded))]
        sources += [("momentum.", backend.weights(sharded, momentum))] if momentum is not None else []
        for prefix, source in sources:
            for piece in source:  # to the end on every rank: each may be a collective
                if sharded or backend.world.is_main:
                    pieces.append(self._buffers.copy(prefix + piece.name, piece))
        if backend.world.is_main:
            whole = (Piece(name, value.detach(), tuple(value.shape)) for name, value in extras.items())
            pieces += [self._buffers.copy(piece.name, piece) for piece in whole]
        return pieces

    # -- in the thread -------------------------------------------------------------------------------------------

    def _run(self, job: _Save) -> None:
        try:
            self._write(job)
        except BaseException as error:  # noqa: BLE001  (raised by `wait`; a thread has nobody to raise to)
            job.trouble = _explained(error, self._folder, job.step)
            self._stop.reason = self._stop.reason or "a checkpoint that could not be saved"
        finally:
            job.pieces.clear()
            job.written.set()

    def _write(self, job: _Save) -> None:
        backend, may_write = self._backend, self._ledger.may_write
        _require_finite(job.pieces)
        if backend.world.is_main:
            may_write()
        temporary = begin(self._folder, job.step, job.token)
        files = write_pieces(temporary, job.pieces, backend.world.rank, backend.world.size, job.sharded)
        if not backend.world.is_main:
            write_json(temporary / _report(backend.world.rank), files)
            return
        if job.sharded:
            job.written.set()
            files |= self._others(job, temporary)
        # Before the commit: a checkpoint that is there has its line.
        self._ledger.state(job.facts["phase"], job.step, files_digest(files), ranks=job.facts["ranks"])
        self._ledger.sync()
        facts = {**job.facts, "ledger": self._ledger.head(job.ledger_bytes)}
        _, job.notes = commit(temporary, job.step, files, facts, may_write, self._sound, self._keep)
        self._sound.add(job.step)

    def _others(self, job: _Save, temporary: Path) -> dict[str, Any]:
        """The files of all other ranks, once each has said that they are written."""
        files: dict[str, Any] = {}
        deadline = time.monotonic() + PATIENCE
        for rank in range(1, self._backend.world.size):
            path = temporary / _report(rank)
            while not path.exists():
                if job.abandoned.wait(0.02) and not path.exists():
                    raise RankLostError(f"the part of rank {rank} in {temporary.name} did not come; nothing is saved.")
                if time.monotonic() > deadline:
                    raise RankLostError(
                        f"rank {rank} did not write its part of the checkpoint of step {job.step} within "
                        f"{PATIENCE:.0f} s; see what that rank says; the one before is intact."
                    )
            files |= read_record(path)
            path.unlink()
        return files


def _report(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _require_finite(pieces: list[Piece]) -> None:
    """NumPy and not torch: it takes no threads from the training."""
    for piece in pieces:
        if piece.values.dtype in (torch.float32, torch.float64):
            if not np.isfinite(piece.values.numpy()).all():
                check_finite({piece.name: piece.values})
        else:
            check_finite({piece.name: piece.values})


def _explained(error: BaseException, folder: Path, step: int) -> BaseException:
    if isinstance(error, NumericsError):
        return NumericsError(f"the state before step {step} is not saved: {error}")
    if isinstance(error, OSError | SafetensorError):
        return DataError(
            f"the checkpoint of step {step} could not be written into {folder} ({error}); the one before is intact: "
            "make the disk writable, and the same command goes on from there."
        )
    return error


# -- reading ---------------------------------------------------------------------------------------------------------


def agreed_checkpoint(folder: Path, world: World, ledger: Ledger, note: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint of which every rank finds its share of the files sound; None: there is none. Collective.

    note: told of those that are passed over, and of a folder that others may write into.

    Raises:
        DataError: checkpoints exist but none verifies, one is of a newer format, or the ledger has lost lines.
    """
    try:
        return _agreed(folder, world, ledger, note)
    except DataError as error:
        error.agreed = True
        raise


def _agreed(folder: Path, world: World, ledger: Ledger, note: Callable[[str], None]) -> Checkpoint | None:
    rejected: list[str] = []
    for name in world.broadcast_object(candidates(folder) if world.is_main else None):
        checkpoint = read_commit(folder / name)
        sound = checkpoint is not None and verified(checkpoint, world.rank, world.size)
        if world.all_finite(torch.tensor(0.0 if sound else float("nan"))):
            head = checkpoint.facts.get("ledger")
            if world.broadcast_object(world.is_main and head is not None and not ledger.begins_with(head)):
                raise DataError(
                    f"{ledger.path} no longer begins with what it held when {checkpoint.folder} was saved; restore the "
                    "ledger, or delete the checkpoints to start this phase anew."
                )
            if trouble := exposed(checkpoint.folder):
                note(f"{trouble}; its digests show accidents, not intent")
            return checkpoint
        note(f"checkpoint {name} does not match its COMMIT.json and is passed over")
        rejected.append(name)
    if rejected:
        raise none_verifies(folder, rejected)
    return None
