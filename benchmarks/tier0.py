"""Encoders with a retrained one beside them, for the gates of tier 0: `tier0_report.py` judges each by both tiers.

    python benchmarks/tier0.py --runs runs/tier0 --results benchmarks/results/tier0 [--only TEXT ...]

A group is a data set, a kind of request, an encoder and a seed. `<group>.npz` keeps the signals of the original and the
retrained encoder and, as `code`, where each image lies among the others (principal axes of the original encoder's
embedding, int8); `<group>-<method>.npz` those of the encoders on a method's line from the original. Signals are means
over views that no training has seen, float16. Cells that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forgetting_dose import SIGNALS, Group, Recorder, forget, train, weights
from forgetting_requests import write_request
from torch import Tensor

from distunlearn.config.schema import RunConfig
from distunlearn.engine.dose.line import between
from distunlearn.engine.dose.looks import Viewer
from distunlearn.engine.session import load_trained, open_session

DOSES = (0.15, 0.3, 0.5, 0.7, 0.85, 1.0, 1.3, 1.6)
METHODS = ("third_party", "neg_grad")
ROLES = ("retain", "forget", "holdout")
KEPT = {"retain": 400, "forget": 200, "holdout": 400}
AXES = 8  # of the code
NUMBER = 100  # images of a request
SMALL = (  # trainings of a few minutes
    "data.members=300", f"data.forget={NUMBER}", "data.holdout=400", "data.watch=50", "data.third_party=300",
    "data.third_party_audit=50", "pretrain.epochs=250", "pretrain.batch=64", "unlearn.steps=100",
    "unlearn.retain_batch=64", "unlearn.forget_batch=32", "unlearn.third_party_batch=32", "constraint.view_pairs=1",
)  # fmt: skip


@dataclass(frozen=True)
class Asked(Group):
    """A group of any kind of request: fair (a sample), alike, or hard."""

    kind: str = "fair"

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.kind}-{self.encoder}-seed{self.seed}"

    def config(self, runs: Path, method: str, *extra: str) -> RunConfig:
        given = list(SMALL)
        if self.kind != "fair":
            source = {"digits": "digits", "fashion": "fashion_mnist"}[self.dataset]
            request = write_request(runs / "requests", source, None, self.seed, NUMBER, self.kind)
            given.append(f"data.forget={request.resolve()}")
        return super().config(runs, method, *given, *extra)


GROUPS = tuple(
    Asked(dataset, encoder, 20 + 12 * turn + number, kind=kind)
    for turn in range(4)
    for number, (dataset, kind, encoder) in enumerate(
        (
            ("digits", "fair", "vit"), ("digits", "alike", "resnet"), ("digits", "hard", "resnet"),
            ("fashion", "fair", "vit"), ("fashion", "alike", "vit"), ("fashion", "hard", "resnet"),
            ("digits", "fair", "resnet"), ("digits", "alike", "vit"), ("digits", "hard", "vit"),
            ("fashion", "fair", "resnet"), ("fashion", "alike", "resnet"), ("fashion", "hard", "vit"),
        )
    )
)  # fmt: skip


def measure(group: Asked, runs: Path, method: str, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Contents of the group's file and of the method's."""
    cfg = group.config(runs, method, f"runtime.reuse={(runs / group.name / 'base').resolve()}")
    with open_session(cfg, out) as session, torch.no_grad():
        viewer = Viewer(session, ROLES)
        model = load_trained(out, session).model.eval()
        session.backend.model = model
        first, last, ideal = (weights(out / place) for place in ("original", ".", "retrained"))
        states = [{name: between(name, first[name], last[name], dose) for name in last} for dose in DOSES]
        seen = []
        for state in (first, ideal, *states):
            model.load_state_dict(dict(state))
            recorder = Recorder(model, cfg.dose.views)
            found = viewer.look(recorder, None)
            noted = recorder.by_role({role: len(ids) for role, ids in viewer.ids.items()})
            arrays = {role: np.concatenate([found[role], noted[role][0][:, None]], 1) for role in ROLES}
            seen.append(({role: rows[: KEPT[role]].astype(np.float16) for role, rows in arrays.items()}, noted))
    signals = {role: np.stack([one[0][role] for one in seen]) for role in ROLES}
    told = {"name": group.name, **vars(group), "signals": list(SIGNALS), "doses": list(DOSES)}
    directions = {role: seen[0][1][role][1][: KEPT[role]] for role in ("forget", "holdout")}
    shared = {
        "told": np.array(json.dumps(told)), "retain": signals["retain"][0],
        **{role: signals[role][:2] for role in directions}, **coded(directions),
    }  # fmt: skip
    return shared, {"told": np.array(json.dumps(told | {"method": method})),
                    **{role: signals[role][2:] for role in directions}}  # fmt: skip


def coded(directions: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Coordinates along the principal axes of all images together, int8, by `code_<role>`."""
    every = torch.cat(list(directions.values())).double()
    every = every - every.mean(0)
    axes = torch.linalg.svd(every, full_matrices=False).Vh[:AXES]
    places = every @ axes.T
    whole = (127 * places / places.abs().max()).round().to(torch.int8).numpy()
    found, start = {}, 0
    for role, rows in directions.items():
        found[f"code_{role}"], start = whole[start : start + len(rows)], start + len(rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/tier0"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/tier0"))
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="groups whose name holds one of these")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    for group in (g for g in GROUPS if any(text in g.name for text in args.only)):
        missing = [m for m in args.methods if not (args.results / f"{group.name}-{m}.npz").exists()]
        started = time.process_time()
        if missing:
            train(group, args.runs)
            print(f"{group.name}: encoders, {time.process_time() - started:.0f} s", file=sys.stderr, flush=True)
        for method in missing:
            shared, cell = measure(group, args.runs, method, forget(group, args.runs, method))
            np.savez_compressed(args.results / f"{group.name}.npz", **shared)
            np.savez_compressed(args.results / f"{group.name}-{method}.npz", **cell)
            print(f"{group.name} {method}: {time.process_time() - started:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
