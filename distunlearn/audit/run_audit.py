"""The audit of a run directory: signals of every encoder, what its tier adds, then summary.json and the raw scores.

tier 0   nothing is trained: attacks, controls and similarity of the original and the unlearned encoder, and of the
         retrained one if the run has it
tier 1   one retrained encoder: gaps to it, reference attacks, relearning
tier 2   also pooled shadow encoders (`shadows`)

Stress tests (`stress`, called tier 3) come on top of tier 1 or 2 where `audit.stress` names them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distunlearn.audit.relearn import Relearned, relearn
from distunlearn.audit.signals.cache import SHARED, keep_signals, kept_signals, signals_key
from distunlearn.audit.signals.collect import Signals, collect_signals, encoder_view
from distunlearn.audit.summary import summarise, write_audit
from distunlearn.data.manifest.records import FORGOTTEN
from distunlearn.engine.session import Session, load_trained
from distunlearn.objectives.forward import EncoderView
from distunlearn.verify.chain import CHAIN, Chain
from distunlearn.verify.ledger import coverage, coverage_by_person, read_ledger
from distunlearn.verify.run import DONE, FOLDERS, PHASES, require_distinct, require_settings


def collect_evidence(
    session: Session, pooled: dict[str, Any] | None = None, stress: dict[str, Any] | None = None
) -> str:
    """Look at the run's encoders (the main process alone), write `audit/`, and return the verdict.

    pooled, stress: figures of the shadow encoders and of the stress tests, whose encoders all processes have trained.
    """
    cfg, out = session.cfg, session.out
    lines = read_ledger(session.ledger.path)
    require_settings(out, lines)
    signals: dict[str, Signals] = {}
    relearned: dict[str, Relearned] = {}
    facts: dict[str, dict[str, Any]] = {}
    told: dict[str, Any] = {}
    for name, place in FOLDERS.items():
        folder = out / place
        if name == "retrained" and cfg.audit.tier == 0 and not (folder / DONE).exists():
            continue
        session.telemetry.note("audit", f"attacking the {name} encoder")
        trained = load_trained(folder, session)
        facts[name] = trained.facts
        require_distinct(
            {name: found["state"] for name, found in facts.items()}, cfg.method.name,
            facts.get("unlearned", {}).get("dose"),
        )  # fmt: skip
        encoder = encoder_view(session, trained)
        signals[name] = _signals(session, name, encoder, trained.facts["state"])
        if cfg.audit.tier and cfg.audit.relearn_steps:
            steps = 0 if name == "original" else cfg.audit.relearn_steps
            relearned[name] = relearn(encoder, session.store, session.manifest, cfg, steps)
    states = {name: found["state"] for name, found in facts.items()}
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
        relearned=relearned,
        pooled=pooled,
        stress=stress,
        states=states,
        request_of=_requests(session),
        **told,
    )
    session.ledger.may_write()
    write_audit(out / "audit", summary, scores)
    return summary["gates"]["verdict"]


def _requests(session: Session) -> dict[str, int]:
    """Which earlier request forgot each image that still is in the shards; 0: a list said so (`data.exclude`)."""
    samples = session.manifest.lookup(session.manifest.ids(FORGOTTEN))
    if not samples or not (session.out / CHAIN).exists():
        return dict.fromkeys((sample.id for sample in samples), 0)
    numbers = Chain.load(session.out).requests_of(bytes.fromhex(sample.sha256) for sample in samples)
    return dict(zip((sample.id for sample in samples), numbers, strict=True))


def _signals(session: Session, name: str, encoder: EncoderView, state: str) -> Signals:
    """Those of a run that this one reuses, where it kept them, else found by looking."""
    cfg = session.cfg
    key = signals_key(cfg, session.manifest, state)
    found = None
    if name in SHARED and cfg.runtime.reuse:
        found = kept_signals(Path(cfg.runtime.reuse).expanduser() / "audit" / f"signals-{name}.npz", key)
    if found is None:
        found = collect_signals(encoder, session.store, session.manifest, cfg)
    if name in SHARED and cfg.audit.keep_signals:
        session.ledger.may_write()
        keep_signals(session.out / "audit" / f"signals-{name}.npz", found, key)
    return found
