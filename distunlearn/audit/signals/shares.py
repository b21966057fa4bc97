"""The signals of one encoder, found by all ranks of the run, and what is kept of them while they are at work.

The images are looked at in chunks that are the same for any number of ranks. A rank takes every W-th chunk of those
that are missing, so the signals of W processes are those of one, bit for bit on machines of one kind. A chunk is
written as soon as it is there: an audit that was killed finds it by its key and its images, and looks at the rest. At
the end the main rank gathers what the others have found, once.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from distunlearn.audit.signals.cache import kept_signals, packed, unpacked
from distunlearn.audit.signals.collect import (
    Chosen,
    Signals,
    audit_bank,
    audited,
    chunks_of,
    joined,
    looking,
    signals_of,
)
from distunlearn.common.files import write_atomic
from distunlearn.distributed.meeting import Meeting
from distunlearn.engine import fault_injection
from distunlearn.engine.session import Session
from distunlearn.errors import StoppedError
from distunlearn.objectives.forward import EncoderView

STOP, ENDED, IMAGES = "stop", "chunks", "images"  # what ranks at work count together
LOOK = 0.5  # seconds between two looks of the main rank at how far the others are


def shared_signals(
    session: Session, encoder: EncoderView, name: str, of: Session | None = None, kept: tuple[Path, str] | None = None
) -> Signals | None:
    """Show every audited image to one encoder; the signals on the main rank, None elsewhere. Collective.

    Args:
        session: whose settings decide how is looked. name: of the encoder, for people.
        of: whose images, roles and store; None: the session's.
        kept: folder in which chunks lie under a key until it is removed; None: nowhere.

    Raises:
        NumericsError: a signal is not finite. StoppedError: the run was asked to stop; what is kept stays.
    """
    world, source = session.world, of or session
    chosen = audited(source.manifest, session.cfg.seed, source.store, world)
    chunks = dict(enumerate(chunks_of(chosen)))
    found = world.on_main(lambda: _found(kept, chunks)) or {}
    have = set(world.broadcast_object(list(found)))
    missing = [number for number in chunks if number not in have]
    mine = _look(session, encoder, name, source, chunks, missing, kept)
    if session.stop.agreed(world):
        reason = session.stop.honoured(world)
        raise StoppedError(f"stopped by {reason} in the audit; the same command goes on from there.")
    gathered = world.gather_bytes(mine)

    def whole() -> Signals:
        for rank, data in enumerate(gathered):
            part, start = unpacked(data, "") if data else None, 0
            for number in missing[rank :: world.size] if part else ():
                found[number] = part.at(slice(start, start + len(chunks[number])))
                start += len(chunks[number])
        return joined([found[number] for number in chunks])

    return world.on_main(whole)


def _found(kept: tuple[Path, str] | None, chunks: Mapping[int, Chosen]) -> dict[int, Signals]:
    """Chunks of an earlier attempt, of these very images."""
    if kept is None or not kept[0].is_dir():
        return {}
    parts = {number: kept_signals(_place(kept[0], number), kept[1]) for number in chunks}
    return {n: part for n, part in parts.items() if part is not None and part.ids == [i for i, _ in chunks[n]]}


def _place(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npz"


def _look(
    session: Session,
    encoder: EncoderView,
    name: str,
    source: Session,
    chunks: Mapping[int, Chosen],
    missing: list[int],
    kept: tuple[Path, str] | None,
) -> bytes:
    """This rank's share of the missing chunks, packed; fewer where the run is asked to stop. Collective."""
    world = session.world
    if kept is not None and world.is_main:
        kept[0].mkdir(parents=True, exist_ok=True)
    found: list[Signals] = []
    done = sum(len(chunk) for chunk in chunks.values()) - sum(len(chunks[n]) for n in missing)
    total = sum(len(chunk) for chunk in chunks.values())
    precision = session.cfg.audit.precision
    with (
        Meeting(world) as meeting,
        session.telemetry.progress(f"audit of {name}", total, done) as bar,
        looking(encoder, precision),
    ):
        bank = audit_bank(encoder, source.store, source.manifest) if missing else None
        for number in missing[world.rank :: world.size]:
            meeting.check()
            fault_injection.reach("audit", number, name)
            if meeting.count(STOP, int(session.stop.asked(world))):
                break
            part = signals_of(encoder, session.cfg.audit, chunks[number], source.store, source.manifest, bank)
            found.append(part)
            if kept is not None:
                write_atomic(_place(kept[0], number), packed(part, kept[1]), durable=False)
            bar.update(done + meeting.count(IMAGES, len(part.ids)))
        meeting.count(ENDED, 1)
        while world.is_main and meeting.count(ENDED) < world.size:
            meeting.check()
            bar.update(done + meeting.count(IMAGES))
            time.sleep(LOOK)
        if world.size > 1:
            bar.update(done + meeting.count(IMAGES))
        return packed(joined(found), "") if found else b""


def remove_chunks(folder: Path) -> None:
    """Remove what was kept for `shared_signals`."""
    shutil.rmtree(folder, ignore_errors=True)
