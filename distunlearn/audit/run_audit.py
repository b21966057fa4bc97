"""The audit of a run directory: signals of every encoder, what its tier adds, then summary.json and the raw scores.

tier 0   nothing is trained: attacks, controls and similarity of the original and the unlearned encoder, and of the
         retrained one if the run has it
tier 1   one retrained encoder: gaps to it, reference attacks, relearning
tier 2   also pooled shadow encoders (`shadows`)

Stress tests (`stress`, called tier 3) come on top of tier 1 or 2 where `audit.stress` names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from distunlearn.audit.relearn import Relearned, relearn
from distunlearn.audit.signals.cache import SHARED, keep_signals, kept_signals, signals_file, signals_key
from distunlearn.audit.signals.collect import Signals, encoder_view
from distunlearn.audit.signals.shares import remove_chunks, shared_signals
from distunlearn.audit.summary import summarise, write_audit
from distunlearn.data.manifest.records import FORGOTTEN
from distunlearn.engine.session import Session, load_for_all
from distunlearn.objectives.forward import EncoderView
from distunlearn.verify.chain import CHAIN, Chain
from distunlearn.verify.figures import REFERENCES
from distunlearn.verify.ledger import coverage, coverage_by_person, read_ledger
from distunlearn.verify.run import DONE, FOLDERS, PHASES, require_distinct, require_settings


def collect_evidence(
    session: Session, pooled: dict[str, Any] | None = None, stress: dict[str, Any] | None = None
) -> str:
    """Look at the run's encoders, all ranks a share of the images, write `audit/`, and return the verdict. Collective.

    pooled, stress: figures of the shadow encoders and of the stress tests, on the main rank.

    Raises:
        StoppedError: the run was asked to stop; what was found is kept, and the same command goes on.
    """
    cfg, out, world = session.cfg, session.out, session.world
    lines = world.on_main(lambda: _settled_ledger(session)) or []
    signals: dict[str, Signals | None] = {}
    relearned: dict[str, Relearned | None] = {}
    facts: dict[str, dict[str, Any]] = {}
    further = REFERENCES[max(1, len(cfg.audit.reference)) :]
    for name, place in FOLDERS.items():
        folder = out / place
        if name in further:
            continue
        is_there = world.broadcast_object((folder / DONE).exists())
        if name == "retrained" and cfg.audit.tier == 0 and not is_there:
            continue
        session.telemetry.note("audit", f"attacking the {name} encoder")
        trained = load_for_all(folder, session)
        facts[name] = trained.facts
        world.on_main(lambda: _require_distinct(facts, cfg.method.name))
        encoder = encoder_view(session, trained)
        signals[name] = _signals(session, name, encoder, trained.facts["state"])
        if cfg.audit.tier and cfg.audit.relearn_steps:
            steps = 0 if name == "original" else cfg.audit.relearn_steps
            relearned[name] = world.on_main(partial(relearn, encoder, session.store, session.manifest, cfg, steps))
    more = {"relearned": relearned, "pooled": pooled, "stress": stress}
    return world.broadcast_object(world.on_main(lambda: _conclude(session, lines, facts, signals, more)))


def _settled_ledger(session: Session) -> list[dict[str, Any]]:
    lines = read_ledger(session.ledger.path)
    require_settings(session.out, lines)
    return lines


def _require_distinct(facts: Mapping[str, Mapping[str, Any]], method: str) -> None:
    states = {name: found["state"] for name, found in facts.items()}
    require_distinct(states, method, facts.get("unlearned", {}).get("dose"))


def _conclude(
    session: Session,
    lines: list[dict[str, Any]],
    facts: Mapping[str, Mapping[str, Any]],
    signals: Mapping[str, Any],
    more: Mapping[str, Any],
) -> str:
    """Figures and gates of what was found, written; the verdict. What only an interrupted audit needs is removed."""
    cfg, told = session.cfg, dict[str, Any]()
    cost = {
        f"{phase}_{unit}": facts[name][unit] if name in facts else None
        for unit in ("images", "seconds") for name, phase in PHASES.items()
    }  # fmt: skip
    forget = session.manifest.ids("forget")
    covered, persons = coverage(lines, forget), session.manifest.persons(forget)
    if persons is not None and (persons >= 0).any():
        own = dict(zip(forget, persons.tolist(), strict=True))
        told = {
            "persons": session.manifest.persons(signals["original"].ids),
            "person_coverage": coverage_by_person(covered.counts, own),
        }
    summary, scores = summarise(
        signals,
        cfg,
        cost=cost,
        coverage=covered.as_dict(),
        states={name: found["state"] for name, found in facts.items()},
        request_of=_requests(session),
        **more,
        **told,
    )
    session.ledger.may_write()
    write_audit(session.out / "audit", summary, scores)
    for name in signals if not cfg.audit.keep_signals else ():
        signals_file(session.out, name).unlink(missing_ok=True)
    return summary["gates"]["verdict"]


def _requests(session: Session) -> dict[str, int]:
    """Which earlier request forgot each image that still is in the shards; 0: a list said so (`data.exclude`)."""
    samples = session.manifest.lookup(session.manifest.ids(FORGOTTEN))
    if not samples or not (session.out / CHAIN).exists():
        return dict.fromkeys((sample.id for sample in samples), 0)
    numbers = Chain.load(session.out).requests_of(bytes.fromhex(sample.sha256) for sample in samples)
    return dict(zip((sample.id for sample in samples), numbers, strict=True))


def _signals(session: Session, name: str, encoder: EncoderView, state: str) -> Signals | None:
    """What this run, or one that it reuses, kept of an encoder, else found by looking; on the main rank. Collective."""
    cfg, own, world = session.cfg, signals_file(session.out, name), session.world
    key = signals_key(cfg, session.manifest, state)
    reused = [signals_file(Path(cfg.runtime.reuse).expanduser(), name)] if name in SHARED and cfg.runtime.reuse else []
    found = world.on_main(lambda: next(filter(None, (kept_signals(path, key) for path in (own, *reused))), None))
    chunks = own.with_suffix("")
    if world.broadcast_object(found is not None):
        session.telemetry.note("audit", f"what the {name} encoder shows is kept; it is not looked at again")
    else:
        found = shared_signals(session, encoder, name, kept=(chunks, key))

    def keep() -> None:
        session.ledger.may_write()
        assert found is not None, "the main rank has them"
        keep_signals(own, found, key)
        remove_chunks(chunks)

    world.on_main(keep)
    return found
