"""Trainings inside a run: other roles, or other seeds, of the same shards, in a folder of their own below the run's.

The pooled shadows of tier 2 and the stress tests are such trainings. No shard is written: the manifest in memory gives
the images other roles, and the processes, the stop request and the watchdog are those of the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from distunlearn.data.loading.image_store import open_store
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.manifest.records import CODE
from distunlearn.engine.ledger import Ledger
from distunlearn.engine.session import Session


def with_roles(manifest: Manifest, roles: Mapping[str, str]) -> Manifest:
    """The same samples; those named in `roles` {id: role} have that role, all others keep theirs."""
    role = manifest.columns.role.copy()
    rows = manifest.columns.ids.find(list(roles), exact=True)
    role[rows[rows >= 0]] = [CODE[name] for name, row in zip(roles.values(), rows, strict=True) if row >= 0]
    return manifest.with_roles(role, manifest.facts)


def with_copies(manifest: Manifest, copies: Mapping[str, int]) -> Manifest:
    """The samples named in `copies` {id: k} are there k times, as ids `<id>`, `<id>~2` and so on, of the same bytes."""
    samples = []
    for sample in manifest.samples:
        samples.append(sample)
        for number in range(2, copies.get(sample.id, 1) + 1):
            samples.append(dataclasses.replace(sample, id=f"{sample.id}~{number}"))
    return Manifest(manifest.folder, samples, manifest.shard_files, manifest.info, manifest.remote, manifest.facts)


@contextlib.contextmanager
def nested_session(session: Session, folder: str, manifest: Manifest, seed: int | None = None) -> Iterator[Session]:
    """A session of its own directory `<run>/<folder>`, roles and ledger. seed: None is the run's. Collective."""
    out = Path(session.out) / folder
    cfg = session.cfg if seed is None else dataclasses.replace(session.cfg, seed=seed)
    if session.world.is_main:
        out.mkdir(parents=True, exist_ok=True)
    session.world.barrier()
    own = session.ledger
    with (
        contextlib.closing(open_store(manifest, cfg, session.backend.device)) as store,
        contextlib.closing(
            Ledger(out / "ledger.jsonl", is_main=session.world.is_main, may_write=own.may_write, facts=own.facts)
        ) as ledger,
    ):
        yield dataclasses.replace(session, cfg=cfg, out=out, manifest=manifest, store=store, ledger=ledger)
