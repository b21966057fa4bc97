"""Finished runs of every kind that the page must serve, each of another verdict, request or state.

Their signals are made up (`rundir`), for no training of seconds passes its checks; what the audit, the gates, the
ledger and the chain make of them is the package's own work. The certified run is a whole tiny run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from parts import constraint_settings, method_settings
from rundir import AUDITED, COUNTS, build_run, change_json, settings

from distunlearn.config.schema import RunConfig
from distunlearn.data.manifest.records import FORGOTTEN
from distunlearn.verify.chain import Chain

CURVE = {
    "dose": 0.5, "low": 0.0, "high": 1.0, "grid": [0.0, 0.5, 1.0], "features": ["bank_loss", "view_agreement"],
    "auc": [[0.7, 0.8], [0.52, 0.49], [0.31, 0.3]], "criterion": [0.5, 0.03, 0.39], "images": {"watch": 321},
    "lost": [[0.0, 0.0], [0.01, 0.25], [0.4, 7.5]], "allowed": [True, True, False],
}  # fmt: skip


def tier(number: int) -> RunConfig:
    cfg = settings()
    return replace(cfg, audit=replace(cfg.audit, tier=number))


def tier_0(folder: Path) -> Path:
    """Without a retrained encoder, with held-out images enough for groups that are chosen like the request."""
    counts = COUNTS | {"holdout": 300}
    return build_run(folder, "fail", tier(0), counts)


def tier_0_few(folder: Path) -> Path:
    """The same with too few."""
    return build_run(folder, "pass", tier(0))


def small_request(folder: Path) -> Path:
    """Fewer images than any check can settle."""
    cfg = settings()
    cfg = replace(cfg, data=replace(cfg.data, members=72, forget=12))
    return build_run(folder, "pass", cfg, COUNTS | {"forget": 12})


def persons(folder: Path) -> Path:
    """40 images of 24 persons, 80 held-out images of 30 others."""
    audited = [(role, COUNTS[role]) for role in AUDITED if role in COUNTS]
    who = {"forget": np.arange(40) % 24, "holdout": 24 + np.arange(80) % 30}
    numbers = np.concatenate([who.get(role, np.full(count, -1)) for role, count in audited]).astype(np.int32)
    covered = [{"person": p, "images": int((who["forget"] == p).sum()), "consumed_min": 2} for p in range(24)]
    run = build_run(folder, "pass", persons=numbers, person_coverage=covered)
    asked = {"images_of_requested_that_stay": 3}
    change_json(run / "request.json", lambda found: found["facts"].update(persons=asked))
    return run


def chained(folder: Path) -> Path:
    """The third request of a chain, with 25 of the 30 images of the first two still in the shards."""
    counts = COUNTS | {FORGOTTEN: 25}
    request_of = {f"people/{FORGOTTEN}-{row:04d}.png": 1 if row < 15 else 2 for row in range(25)}
    run = build_run(folder, "pass", counts=counts, request_of=request_of)
    chain = Chain.new()
    for count in (20, 10, counts["forget"]):
        chain = chain.with_request([(bytes(32), str(row), None) for row in range(count)], original="a", unlearned="b")
    chain.save(run)
    facts = {"present": 25, "near_copies_among_members": 1}
    change_json(run / "request.json", lambda found: found["facts"].update(previous=facts))
    change_json(run / "audit/summary.json", lambda found: found["cost"].update(pretrain_images=0, pretrain_seconds=0))
    return run


def without_labels(folder: Path) -> Path:
    """No classes: nothing is known of the encoder's use."""
    return build_run(folder, "pass", labels=False)


def moved(folder: Path) -> Path:
    """The unlearned encoder sees all images differently."""
    run = build_run(folder)
    signals = {"view_agreement": {"original": 0.0, "unlearned": -1.5}}
    level = {"farthest": "view_agreement", "kept": False, "signals": signals}
    change_json(run / "audit/summary.json", lambda found: found.update(level=level))
    return run


def dosed(folder: Path) -> Path:
    """A dose was chosen, and the encoder has it."""
    run = build_run(folder)
    (run / "dose").mkdir()
    (run / "dose/curve.json").write_text(json.dumps(CURVE))
    change_json(run / "done.json", lambda found: found.update(dose=CURVE["dose"]))
    return run


def other_method(folder: Path) -> Path:
    return build_run(folder, cfg=replace(settings(), method=method_settings("neg_grad")))


def relearned(folder: Path) -> Path:
    """The unlearned encoder learns the images again, the retrained one does not within what was tried; sketch."""
    figures = {"steps": [0, 1, 2, 4, 8, 16], "steps_to_relearn": 8}
    both = {"original": {}, "unlearned": figures, "retrained": {**figures, "steps_to_relearn": None}}
    run = build_run(folder, cfg=replace(settings(), constraint=constraint_settings("sketch")))
    change_json(run / "audit/summary.json", lambda found: found.update(relearning=both))
    return run


def purged(folder: Path) -> Path:
    run = build_run(folder)
    (run / "purge.json").write_text(json.dumps({"images": 40, "copies": 1}))
    return run


def of_case(case: str) -> Callable[[Path], Path]:
    return lambda folder: build_run(folder, case)


KINDS: dict[str, Callable[[Path], Path]] = {
    "pass": of_case("pass"), "fail": of_case("fail"), "inconclusive": of_case("inconclusive"), "tier_0": tier_0,
    "tier_0_few": tier_0_few, "small_request": small_request, "persons": persons, "chained": chained,
    "without_labels": without_labels, "moved": moved, "dosed": dosed, "other_method": other_method,
    "relearned": relearned, "purged": purged,
}  # fmt: skip
