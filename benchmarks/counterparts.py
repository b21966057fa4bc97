"""What a perfect match of distributions would leave of a request: to the whole third party, and to its counterparts.

    python benchmarks/counterparts.py runs/larger/*-none --images 60 --requests 20 --neighbours 20 50 100 200

As `forgetting_floor.py`, for parts of the forgotten images, which the retrained encoder met as little as all of them:
`--requests` of `--images` images that the original encoder finds most like one that is drawn by chance, and as many
drawn by chance. The third-party images of the audit stand in for those of the loss; they are weighed as
`unlearn.third_party_sampling=matched` weighs those, from the original encoder alone. Printed are means over runs,
requests and attacks, in points of 100, of

    |AUC(request against holdout) - AUC(weighted third-party against holdout)|    by the retrained encoder's scores,

and, of the weights, as how many equally weighted images they count.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from forgetting_floor import ATTACKS
from sklearn.metrics import roc_auc_score

from distunlearn.config.load import load_config
from distunlearn.config.schema import RunConfig
from distunlearn.data.loading.image_store import open_store
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.engine.matched_sampling import look
from distunlearn.engine.session import load_trained
from distunlearn.methods.third_party_weights import Look, counterpart_weights, effective_number

ROLES = ("forget", "retain", "third_party_audit", "holdout")
FOUR = ("bank_loss", "view_agreement", "gradient_norm_head", "gradient_norm_network")
PIECE = 256  # images
Scores = Mapping[str, Mapping[str, Any]]


def looks(run: Path, cfg: RunConfig, ids: Mapping[str, list[str]]) -> dict[str, Look]:
    """What the run's original encoder makes of the images of each role."""
    model = load_trained(run / "original", SimpleNamespace(cfg=cfg, num_classes=None)).model
    manifest = Manifest.load(run / "shards")
    images = open_store(manifest, cfg)
    found = {}
    try:
        for role, names in ids.items():
            parts = [names[start : start + PIECE] for start in range(0, len(names), PIECE)]
            seen = [look(cfg, model, images.by_offset(part), part) for part in parts]
            found[role] = Look(*map(torch.cat, zip(*seen, strict=True)))
    finally:
        images.close()
    return found


def requests(forget: Look, images: int, count: int, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """(kind, rows of the forgotten images)."""
    rng = np.random.default_rng(seed)
    direction = forget.direction.numpy()
    if images >= len(direction):
        yield "all", np.arange(len(direction))
        return
    for _ in range(count):
        yield "alike", np.argsort(-direction @ direction[rng.integers(len(direction))])[:images]
        yield "by chance", rng.permutation(len(direction))[:images]


def area(member: np.ndarray, other: np.ndarray, weights: np.ndarray | None = None) -> float:
    """AUC of (weighted) scores against other ones."""
    truth = np.r_[np.ones(len(member)), np.zeros(len(other))]
    weighed = None if weights is None else np.r_[weights, np.ones(len(other))]
    return float(roc_auc_score(truth, np.r_[member, other], sample_weight=weighed))


def measure(run: Path, images: int, count: int, neighbours: list[int]) -> Iterator[tuple[str, str, float, float]]:
    """(kind of request, draw, mean gap over the attacks in points, effective number of third-party images)."""
    cfg = load_config(None, run / "run.yaml", [], world=1)
    scores: Scores = json.loads((run / "audit/scores-retrained.json").read_text(encoding="utf-8"))["samples"]
    attacks = [name for name in FOUR if all(name in row for row in scores.values() if row["role"] != "retain")]
    ids = {role: [i for i, row in scores.items() if row["role"] == role] for role in ROLES}
    of = {(role, name): np.array([ATTACKS[name] * scores[i][name] for i in ids[role]])
          for role in ROLES if role != "retain" for name in attacks}  # fmt: skip
    seen = looks(run, cfg, {role: ids[role] for role in ROLES if role != "holdout"})
    for kind, rows in requests(seen["forget"], images, count, cfg.seed):
        part = Look(seen["forget"].direction[rows], seen["forget"].agreement[rows])
        draws: dict[str, np.ndarray] = {"uniform": np.ones(len(ids["third_party_audit"]))}
        for k in neighbours:
            draws[f"matched, {k} neighbours"] = counterpart_weights(
                part, seen["retain"], seen["third_party_audit"], k
            ).numpy()
        for name, weights in draws.items():
            gaps = [
                abs(area(of["forget", a][rows], of["holdout", a])
                    - area(of["third_party_audit", a], of["holdout", a], weights))
                for a in attacks
            ]  # fmt: skip
            yield kind, name, 100 * statistics.mean(gaps), effective_number(torch.from_numpy(weights))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories that have a retrained audit")
    parser.add_argument("--images", type=int, default=60, help="of a request; as many as were forgotten, or more: all")
    parser.add_argument("--requests", type=int, default=20, help="of each kind, of each run")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[50])
    args = parser.parse_args()
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for run in args.runs:
        if not (run / "audit/scores-retrained.json").is_file():
            parser.error(f"{run / 'audit/scores-retrained.json'} is missing; expected a finished run with audit.tier=1")
        for kind, draw, gap, effective in measure(run, args.images, args.requests, args.neighbours):
            found.setdefault((kind, draw), []).append((gap, effective))
    print("| requests | draw | mean gap | effective third-party images |\n|---|---|---|---|")
    for (kind, draw), values in sorted(found.items()):
        gap, effective = (statistics.mean(column) for column in zip(*values, strict=True))
        print(f"| {kind} ({len(values)}) | {draw} | {gap:.2f} | {effective:.0f} |")


if __name__ == "__main__":
    main()
