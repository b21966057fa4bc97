"""The dose against retraining: what is right by the retrained encoder, and what non-members alone would have chosen.

    python benchmarks/forgetting_dose.py --runs runs/dose --results benchmarks/results/forgetting-dose [--only TEXT ...]

A group is a data set, a kind of request, an encoder and a seed: one original and one retrained encoder serve all its
methods, and one run of a method all its doses. Each encoder on the line is seen as `method.dose=auto` sees it, with
the holdout images and the retrained encoder beside. A cell, `<group>-<method>.npz`, keeps the signals of some images
(float16) and, as JSON in `figures`, what was measured on all. Cells that are there are not measured again, trainings
that were interrupted go on. `forgetting_dose_report.py` makes tables of them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from forgetting_grid import FORMER, FORMER_THIRD_PARTY
from forgetting_requests import write_request
from safetensors.torch import load_file
from torch import Tensor

from distunlearn.config.load import load_config
from distunlearn.config.schema import RunConfig
from distunlearn.encoders.model import EncoderOutput
from distunlearn.engine import phases
from distunlearn.engine.dose.line import between
from distunlearn.engine.dose.looks import FEATURES, PIECE, ROLES, Viewer
from distunlearn.engine.session import Session, load_trained, open_session
from distunlearn.run import pipeline
from distunlearn.verify.dose import Looks, choose
from distunlearn.verify.statistics import Comparison, auc

DOSES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.15, 1.3, 1.6, 2.0)
SEEN = (*ROLES, "holdout")
SIGNALS = (*FEATURES, "embedding_norm")  # the last is in no choice: an attack that the choice does not look at
KEPT = 140  # images of a role whose signals a cell keeps
DIGITS = (  # as in the grids, but for 450 non-members in place of 700 in audits; 250 watch
    *FORMER, "data.watch=250", "data.third_party_audit=50", "data.holdout=400",
)  # fmt: skip
FASHION = (
    "data.members=1000", "data.holdout=1000", "data.third_party=1500", "data.third_party_audit=100", "data.watch=500",
    "pretrain.epochs=250", "unlearn.steps=150", "unlearn.retain_batch=128", "unlearn.forget_batch=32",
    "unlearn.third_party_batch=32", "constraint.view_pairs=1",
)  # fmt: skip
VIT = tuple(
    f"encoder.{key}={value}" for key, value in (
        ("name", '"vit_tiny_patch16_224"'), ("stem", '"standard"'), ("embed_dim", 96),
        ("args", '{"patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3, "class_token": false, '
                 '"global_pool": "avg"}'),
    )
)  # fmt: skip
# Settings of the methods are those that the searches of the grid `small` chose on other seeds.
TUNED = {
    "digits-resnet": {
        "third_party": FORMER_THIRD_PARTY,
        "neg_grad": ("unlearn.lr=0.003326", "method.ascent_weight=0.01722"),
        "alignment_calibration": ("unlearn.lr=4e-3",),
    },
    "fashion-resnet": {
        "third_party": ("unlearn.lr=4e-3",),
        "neg_grad": ("unlearn.lr=4e-3",),
        "alignment_calibration": ("unlearn.lr=4e-3",),
    },
    "fashion-vit": {
        "third_party": ("unlearn.lr=0.0004187", "method.gradient_weight=6.804", "method.output_weight=10.95",
                        "method.confidence_weight=0.01337"),
        "neg_grad": ("unlearn.lr=1e-3",),
        "alignment_calibration": ("unlearn.lr=0.004226", "method.alignment_weight=0.5013",
                                  "method.calibration_weight=1.316"),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """One pair of an original and a retrained encoder. alike: images to forget that are alike; 0: a fair sample."""

    dataset: str
    encoder: str
    seed: int
    alike: int = 0

    @property
    def name(self) -> str:
        return f"{self.dataset}-{'alike' if self.alike else 'fair'}-{self.encoder}-seed{self.seed}"

    def config(self, runs: Path, method: str, *extra: str) -> RunConfig:
        """Settings of one method; those of its base but for the method and the steps of forgetting."""
        given = [*(DIGITS if self.dataset == "digits" else FASHION), *(VIT if self.encoder == "vit" else ())]
        given += ["pretrain.lr=1e-3"] if self.encoder == "vit" else []
        given += [f"seed={self.seed}", f"method.name={method}", "runtime.threads=1", "tracking=[]"]
        given.append(f"data.shards={(runs / self.name / 'shards').resolve()}")
        given += TUNED.get(f"{self.dataset}-{self.encoder}", {}).get(method, ())
        if self.alike:
            request = write_request(runs / "requests", "fashion_mnist", None, self.seed, self.alike)
            given.append(f"data.forget={request.resolve()}")
        return load_config("digits" if self.dataset == "digits" else "fashion_mnist", None, [*given, *extra], world=1)

    def settings(self, runs: Path, method: str) -> RunConfig:
        """Those of a method's run, which takes over the base's encoders."""
        return self.config(runs, method, f"runtime.reuse={(runs / self.name / 'base').resolve()}")


class Line(NamedTuple):
    """What `on_the_line` opens. first, ideal, doses: weights of the original, the retrained, and each dose."""

    session: Session
    viewer: Viewer
    model: torch.nn.Module
    first: dict[str, Tensor]
    ideal: dict[str, Tensor]
    doses: list[dict[str, Tensor]]


GROUPS = (
    *(Group("digits", "resnet", seed) for seed in range(5)),
    *(Group("fashion", encoder, seed, 60) for seed in range(3) for encoder in ("resnet", "vit")),
)


# -- training --------------------------------------------------------------------------------------------------------


def train(group: Group, runs: Path) -> Path:
    """Original and retrained encoder of a group; returns the run directory."""
    base, cfg = runs / group.name / "base", group.config(runs, "none")
    pipeline.prepare(cfg, base)
    with open_session(cfg, base) as session:
        phases.pretrain(session)
        phases.retrain(session)
    return base


def forget(group: Group, runs: Path, method: str) -> Path:
    """The whole dose of a method; returns the run directory."""
    out = runs / group.name / method
    pipeline.unlearn(group.settings(runs, method), out)
    return out


# -- looking ---------------------------------------------------------------------------------------------------------


class Recorder:
    """An encoder that notes, of each image in turn, its embedding's norm and direction, means over the views."""

    def __init__(self, model: torch.nn.Module, views: int) -> None:
        self.model, self.views = model, views
        self.norms: list[Tensor] = []
        self.directions: list[Tensor] = []

    def __call__(self, images: Tensor) -> EncoderOutput:
        out = self.model(images)
        each = out.embedding.unflatten(0, (self.views, -1))
        self.norms.append(each.norm(dim=-1).mean(0))
        self.directions.append(torch.nn.functional.normalize(each, dim=-1).mean(0))
        return out

    def by_role(self, counts: Mapping[str, int]) -> dict[str, tuple[np.ndarray, Tensor]]:
        """What was noted since the start: norms [n], directions [n, E]."""
        norms, directions = torch.cat(self.norms), torch.cat(self.directions)
        found, start = {}, 0
        for role, count in counts.items():
            found[role] = norms[start : start + count].double().numpy(), directions[start : start + count]
            start += -(-count // PIECE) * PIECE
        assert start == len(norms)
        return found


def look(viewer: Viewer, session: Session, state: Mapping[str, Tensor], model: torch.nn.Module) -> dict[str, Any]:
    """Signals [n, len(SIGNALS)] by role, and `chance`, `right` and `knn`, of the encoder with these weights."""
    model.load_state_dict(dict(state))
    recorder = Recorder(model, session.cfg.dose.views)
    seen = viewer.look(recorder, None)
    noted = recorder.by_role({role: len(ids) for role, ids in viewer.ids.items()})
    for role, (norms, _) in noted.items():
        seen[role] = np.concatenate([seen[role], norms[:, None]], 1)
    seen["knn"] = knn(session, viewer, noted)
    return seen


def knn(session: Session, viewer: Viewer, noted: Mapping[str, tuple[np.ndarray, Tensor]]) -> np.ndarray:
    """Accuracy, in points, on holdout images, by the nearest retained ones."""
    labels = {role: torch.from_numpy(session.manifest.labels(viewer.ids[role])) for role in ("retain", "holdout")}
    unit = {role: torch.nn.functional.normalize(noted[role][1], dim=-1) for role in labels}
    nearest = labels["retain"][(unit["holdout"] @ unit["retain"].T).topk(session.cfg.audit.neighbours).indices]
    return np.array(100 * (nearest.mode(1).values == labels["holdout"]).double().mean())


def weights(folder: Path) -> dict[str, Tensor]:
    found = load_file(folder / "training_state.safetensors")
    return {name.removeprefix("model."): value for name, value in found.items() if name.startswith("model.")}


@contextlib.contextmanager
def on_the_line(cfg: RunConfig, out: Path, roles: Sequence[str], doses: Sequence[float]) -> Iterator[Line]:
    """A run's original, retrained and unlearned encoder, the last one at each dose."""
    with open_session(cfg, out) as session, torch.no_grad():
        model = load_trained(out, session).model.eval()
        session.backend.model = model
        first, last, ideal = (weights(out / place) for place in ("original", ".", "retrained"))
        states = [{name: between(name, first[name], last[name], dose) for name in last} for dose in doses]
        yield Line(session, Viewer(session, roles), model, first, ideal, states)


def measure(group: Group, runs: Path, method: str, out: Path) -> dict[str, dict[str, Any]]:
    """All doses and the retrained encoder: the arrays of a cell, by its name."""
    cfg, start = group.settings(runs, method), time.process_time()
    with on_the_line(cfg, out, SEEN, DOSES) as line:
        seen = [look(line.viewer, line.session, state, line.model) for state in (*line.doses, line.ideal)]
    return {f"{group.name}-{method}": cell(cfg, group, method, seen, time.process_time() - start)}


def cell(cfg: RunConfig, group: Group, method: str, seen: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    arrays = {role: np.stack([one[role] for one in seen]) for role in SEEN}
    doses, used = len(DOSES), len(FEATURES)
    levels = {role: _aucs(arrays["forget"], arrays[role]) for role in ("watch", "holdout")}
    loss, right = arrays["retain"][:doses, :, FEATURES.index("bank_loss")], np.stack([one["right"] for one in seen])
    looks = Looks(
        **{role: arrays[role][:doses, :, :used] for role in ROLES}, loss=loss, chance=float(seen[0]["chance"]),
        right=right[:doses],
    )  # fmt: skip
    every = dataclasses.replace(cfg.dose, grid=DOSES)  # no schema bounds these
    chosen = {aim: choose(looks, every, cfg.seed, aim).as_dict() for aim in ("half", "retained")}
    spread = arrays["holdout"][-1].std(0)
    figures = {
        "group": {**vars(group), "name": group.name}, "method": method, "doses": list(DOSES), "signals": list(SIGNALS),
        "watch": levels["watch"].tolist(), "holdout": levels["holdout"].tolist(),
        "knn": [float(one["knn"]) for one in seen], "chosen": chosen,
        "level": ((arrays["holdout"].mean(1) - arrays["holdout"][-1].mean(0)) / spread).tolist(),
        "images": {role: arrays[role].shape[1] for role in SEEN}, "seconds": round(seconds, 1),
    }  # fmt: skip
    kept = {role: arrays[role][:, :KEPT].astype(np.float16) for role in SEEN if role != "retain"}
    return {"figures": np.array(json.dumps(figures)), **kept, "retain": arrays["retain"][0, :KEPT].astype(np.float16)}


def _aucs(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    pairs = [
        [Comparison.of(a[:, s], b[:, s]) for s in range(a.shape[1])] for a, b in zip(positives, negatives, strict=True)
    ]
    return np.array([[auc(pair) for pair in row] for row in pairs])


def campaign(
    doc: str | None, results: str, groups: Sequence[Any], methods: Sequence[str], measure: Callable[..., dict[str, Any]]
) -> None:
    """The command: what is missing in a folder of benchmarks/results is trained and measured, a file for each name."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs") / results)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results") / results)
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="groups whose name holds one of these")
    parser.add_argument("--methods", nargs="+", default=methods)
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    for group in (g for g in groups if any(text in g.name for text in args.only)):
        missing = [m for m in args.methods if not (args.results / f"{group.name}-{m}.npz").exists()]
        if not missing:
            continue
        started = time.process_time()
        train(group, args.runs)
        print(f"{group.name}: encoders, {time.process_time() - started:.0f} s", file=sys.stderr, flush=True)
        for method in missing:
            for name, content in measure(group, args.runs, method, forget(group, args.runs, method)).items():
                np.savez_compressed(args.results / f"{name}.npz", **content)
            print(f"{group.name} {method}: {time.process_time() - started:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    campaign(__doc__, "forgetting-dose", GROUPS, ("third_party", "neg_grad", "alignment_calibration"), measure)
