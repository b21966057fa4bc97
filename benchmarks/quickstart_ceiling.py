"""How often the quickstart could pass: another seed's retrained encoder in the place of the unlearned one.

    python benchmarks/quickstart_ceiling.py --seeds 0 1 2 --runs DIR --out FILE.jsonl [--recipe digits] [--set K=V ...]

Of each seed: the run (original, unlearned and retrained encoder), and a second retrained encoder of the same images
whose initial weights, order and views have another seed. One look at each of the four encoders, then the gates for
every pair in PAIRS, as `distunlearn audit` judges them. A line a seed, in FILE; a seed that has its line is left out,
trainings that were interrupted go on. Signals of the audit stay in DIR.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distunlearn.audit.attacks import attack
from distunlearn.audit.figures.utility import correct_predictions
from distunlearn.audit.signals.collect import Signals, collect_signals, encoder_view
from distunlearn.config.load import load_config
from distunlearn.config.schema import RunConfig
from distunlearn.config.shape import plain
from distunlearn.engine import phases
from distunlearn.engine.session import load_trained, open_session
from distunlearn.run import pipeline
from distunlearn.verify.figures import JUDGED, Raw, Rules, judge

OTHER_SEED = 1000  # added, for the second retrained encoder
PAIRS = {  # what stands in the unlearned encoder's place: what it is compared with
    "unlearned": ("retrained",),
    "again": ("retrained",),
    "retrained": ("again",),
    "unlearned, the other": ("again",),
    "unlearned, both": ("retrained", "again"),
}


def train(cfg: RunConfig, run: Path) -> dict[str, float]:
    """All four encoders; processor seconds of each training."""
    pipeline.prepare(cfg, run)
    seconds, last = {}, time.process_time()

    def done(name: str) -> None:
        nonlocal last
        seconds[name], last = round(time.process_time() - last, 1), time.process_time()

    with open_session(cfg, run) as session:
        for name, phase in (
            ("original", phases.pretrain),
            ("unlearned", phases.unlearn),
            ("retrained", phases.retrain),
        ):
            phase(session)
            done(name)
    again = run / "again"
    again.mkdir(exist_ok=True)
    for name in ("request.json", "roles.arrow"):
        shutil.copy(run / name, again / name)
    data = dataclasses.replace(cfg.data, shards=str((run / "shards").resolve()))
    with open_session(dataclasses.replace(cfg, seed=cfg.seed + OTHER_SEED, data=data), again) as session:
        phases.retrain(session)
    done("again")
    return seconds


def look(cfg: RunConfig, run: Path) -> dict[str, Signals]:
    """What the audit of the run sees of each encoder; the second retrained one is shown the run's own views."""
    places = {"original": run / "original", "unlearned": run, "retrained": run / "retrained",
              "again": run / "again" / "retrained"}  # fmt: skip
    with open_session(cfg, run) as session:
        found = {}
        for name, folder in places.items():
            encoder = encoder_view(session, load_trained(folder, session))
            found[name] = collect_signals(encoder, session.store, session.manifest, cfg)
            columns = {f.name: getattr(found[name], f.name) for f in dataclasses.fields(Signals)}
            np.savez_compressed(run / f"signals-{name}.npz", **columns)
    return found


def gates(cfg: RunConfig, signals: Mapping[str, Signals]) -> dict[str, Any]:
    """`gates` of each pair, and `power`: which attacks beat chance on the original encoder, with their intervals."""
    seen = {name: {e: attack(name)(s, cfg.seed).comparison for e, s in signals.items()} for name in JUDGED}
    first, rules = signals["original"], Rules.of(plain(cfg))
    sizes, held = (len(first.of("forget")), len(first.of("holdout"))), first.of("holdout")
    correct = {
        e: {name: right[held] for name, right in correct_predictions(s, cfg.audit.neighbours).items()}
        for e, s in signals.items()
    }
    found: dict[str, Any] = {"gates": {}}
    for pair, references in PAIRS.items():
        named = {"original": "original", "unlearned": pair.partition(",")[0], "retrained": references[0]}
        named |= {f"retrained_{n}": other for n, other in enumerate(references[1:], 2)}
        comparisons = {name: {e: own[source] for e, source in named.items()} for name, own in seen.items()}
        judged = judge(Raw(comparisons, {e: correct[source] for e, source in named.items()}, *sizes), rules)
        found["gates"][pair] = {name: _gate(gate) for name, gate in judged["gates"].items()}
        found["power"] = {name: _rounded(own["power"], "auc") for name, own in judged["attacks"].items()}
    return found


def _gate(gate: Any) -> Any:
    """Figure, ends of its interval and verdict; the verdict of all is a word already."""
    if isinstance(gate, str):
        return gate
    return [*_rounded(gate, "auc" if "auc" in gate else "change"), gate["verdict"]]


def _rounded(figures: Mapping[str, Any], key: str) -> list[float]:
    return [round(float(figures[name]), 4) for name in (key, "low", "high")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    asked = parser.parse_args()
    lines = asked.out.read_text(encoding="utf-8").splitlines() if asked.out.exists() else []
    done = {(line["recipe"], line["seed"], tuple(line["set"])) for line in map(json.loads, lines)}
    for seed in asked.seeds:
        if (asked.recipe, seed, tuple(asked.set)) in done:
            continue
        cfg = load_config(asked.recipe, None, [*asked.set, f"seed={seed}", "runtime.threads=1", "tracking=[]"], world=1)
        run = asked.runs / str(seed)
        line = {"recipe": asked.recipe, "seed": seed, "set": asked.set, "seconds": train(cfg, run)}
        line |= gates(cfg, look(cfg, run))
        with asked.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
