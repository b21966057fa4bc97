"""Encoders with a retrained one beside them, for the gates of tier 0: `tier0_report.py` judges each by both tiers.

    python benchmarks/tier0.py --runs runs/tier0 --results benchmarks/results/tier0 [--only TEXT ...]

A group is a data set, a kind of request, an encoder and a seed. `<group>.npz` keeps the signals of the original and the
retrained encoder and, as `code`, where each image lies among the others (principal axes of the original encoder's
embedding, int8); `<group>-<method>.npz` those of the encoders on a method's line from the original. Signals are means
over views that no training has seen, float16. Cells that are there are not measured again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forgetting_dose import SIGNALS, Group, Recorder, campaign, on_the_line
from forgetting_requests import write_request
from torch import Tensor

from distunlearn.config.schema import RunConfig

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


def measure(group: Asked, runs: Path, method: str, out: Path) -> dict[str, dict[str, Any]]:
    """Contents of the group's file and of the method's, by their names."""
    cfg, seen = group.settings(runs, method), []
    with on_the_line(cfg, out, ROLES, DOSES) as line:
        for state in (line.first, line.ideal, *line.doses):
            line.model.load_state_dict(dict(state))
            recorder = Recorder(line.model, cfg.dose.views)
            found = line.viewer.look(recorder, None)
            noted = recorder.by_role({role: len(ids) for role, ids in line.viewer.ids.items()})
            arrays = {role: np.concatenate([found[role], noted[role][0][:, None]], 1) for role in ROLES}
            seen.append(({role: rows[: KEPT[role]].astype(np.float16) for role, rows in arrays.items()}, noted))
    signals = {role: np.stack([one[0][role] for one in seen]) for role in ROLES}
    told = {"name": group.name, **vars(group), "signals": list(SIGNALS), "doses": list(DOSES)}
    directions = {role: seen[0][1][role][1][: KEPT[role]] for role in ("forget", "holdout")}
    shared = {
        "told": np.array(json.dumps(told)), "retain": signals["retain"][0],
        **{role: signals[role][:2] for role in directions}, **coded(directions),
    }  # fmt: skip
    own = {"told": np.array(json.dumps(told | {"method": method})), **{role: signals[role][2:] for role in directions}}
    return {group.name: shared, f"{group.name}-{method}": own}


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


if __name__ == "__main__":
    campaign(__doc__, "tier0", GROUPS, METHODS, measure)
