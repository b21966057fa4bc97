"""Pooled shadow encoders (tier 2): one pool in which every image plays all three parts.

Shadow k is trained like the run's own encoders, from other initial weights and in another order, on the retained images
and a part of the forget set; then it is made to forget by the run's own method. Every forget image is in each shadow

    OUT        never trained on,
    IN         trained on and retained,
    UNLEARNED  trained on and then forgotten,

each in a third of the shadows. Source: the shared pool of RULI, "Rectifying Privacy and Efficacy Measurements in
Machine Unlearning", USENIX Security 2025. A shadow lives in `<run>/shadows/NN` and is kept, like every finished
encoder; after an interruption the same command goes on. What is measured of it is the margin of `pooled`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from distunlearn.audit.signals.collect import encoder_view
from distunlearn.audit.trainings.shadow_figures import IN, OUT, UNLEARNED, margins, pooled_figures
from distunlearn.audit.trainings.sub_run import nested_session, with_roles
from distunlearn.common.files import write_json
from distunlearn.common.progress import Rounds
from distunlearn.common.random import STREAMS
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.engine import phases
from distunlearn.engine.phases import check_coverage
from distunlearn.engine.session import Session, load_trained
from distunlearn.errors import DataError

SHADOW_SEED = 10_007  # a prime, so that shadows share no seed with the runs of neighbouring seeds
ROLE_OF = {IN: "retain", OUT: "holdout", UNLEARNED: "forget"}


def assign_parts(images: int, shadows: int, seed: int) -> np.ndarray:
    """IN, OUT or UNLEARNED for every shadow and image, int64 [shadows, images].

    Every image plays each part in a third of the shadows, rounded up or down; a pure function of the arguments.
    """
    generator = np.random.default_rng([seed, STREAMS["shadow members"]])
    parts = np.resize([IN, OUT, UNLEARNED], shadows)
    # Turned by one for each image, so that left-over shadows of a number not divisible by 3 go round.
    return np.stack([generator.permutation((parts + i) % 3) for i in range(images)], axis=1)


def shadow_manifest(manifest: Manifest, ids: Sequence[str], parts: np.ndarray) -> Manifest:
    """The manifest as shadow k sees it: forget images in their parts, everything else as it was.

    OUT images get the role holdout, which no training reads.
    """
    roles = {sample_id: ROLE_OF[int(part)] for sample_id, part in zip(ids, parts, strict=True)}
    return with_roles(manifest, roles)


def audit_shadows(session: Session) -> dict[str, Any] | None:
    """Train all shadows, measure every forget image in each, save the raw margins, and judge nothing.

    All ranks train; the main one measures. Returns the figures of `pooled_figures` there, None elsewhere.

    Raises:
        DataError: so few images are forgotten that some shadow would have none to forget or to leave out.
        CoverageError: a shadow whose unlearning missed one of its images.
    """
    cfg, ids = session.cfg, session.manifest.ids("forget")
    parts = assign_parts(len(ids), cfg.audit.shadows, cfg.seed)
    fewest = min(int((row == part).sum()) for row in parts for part in (IN, OUT, UNLEARNED))
    if fewest < 2:
        raise DataError(
            f"audit.tier 2 shares {len(ids)} forget images among shadows, and one of them would get only {fewest} of a "
            "kind, expected at least 2; forget more images or set audit.tier=1."
        )
    measured, rounds = [], Rounds(cfg.audit.shadows)
    for number, row in enumerate(parts):
        session.telemetry.note("audit", f"shadow encoder {rounds.next()}")
        seed = (cfg.seed + SHADOW_SEED * (number + 1)) % 2**32
        manifest = shadow_manifest(session.manifest, ids, row)
        with nested_session(session, f"shadows/{number:02d}", manifest, seed) as shadow:
            phases.pretrain(shadow)
            phases.unlearn(shadow)
            check_coverage(shadow)
            measured.append(session.world.on_main(partial(_margins, session, shadow, ids)))
    if not session.world.is_main:
        return None
    found = np.stack([found for found in measured if found is not None])
    session.ledger.may_write()
    (session.out / "audit").mkdir(exist_ok=True)
    rows = {i: {"part": parts[:, k].tolist(), "margin": found[:, k].tolist()} for k, i in enumerate(ids)}
    write_json(
        session.out / "audit" / "shadows.json", {"parts": {"0": "in", "1": "out", "2": "unlearned"}, "ids": rows}
    )
    return pooled_figures(found, parts, cfg)


def _margins(session: Session, shadow: Session, ids: Sequence[str]) -> np.ndarray:
    """With the run's views and bank: shadows differ by weights only."""
    encoder = encoder_view(session, load_trained(shadow.out, shadow))
    return margins(encoder, session.store, session.manifest, ids, session.cfg.audit.views)
