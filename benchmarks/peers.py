"""Our training step, gathered losses and per-sample gradient norms beside those of other packages, in one run.

    pip install lightly opacus open_clip_torch       into an environment of its own, beside distunlearn
    python benchmarks/peers.py --document benchmarks/results/DATE-peers.md [--solo FOLDER]

Step: ours is the whole engine (finite checks, gradient norm, ledger, metrics), the peer's its documentation's loop.
Both train the same backbone on the same batches and views, in the same process, and take turns step by step;
`peers_steps.py` says how. Once the peer has torch's AdamW as constructed by default, once the one that our engine makes
(fused), and once its own views. Ratios are images/s of ours to theirs, the median over pairs of steps next to each
other, with a distribution-free 95 % interval of that median; above 1 ours is faster.

--solo: an unpacked wheel of solo-learn, whose loss file is loaded by itself (its pins allow no torch of today).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from constraint_cost import peak_bytes
from constraint_report import json_text, machine
from peers_norms import NETWORKS, brute_force, opacus_norms, our_norms
from peers_report import document
from peers_steps import PEERS, Peer
from throughput_step import ENCODERS, configuration, prepared, session, train

from distunlearn.data.loading.stream import RoleFeeder
from distunlearn.engine.session import Session

WARM_UP = 3  # pairs that are not counted
VARIANTS = {"default optimizer": ("theirs", False), "same optimizer": ("ours", False), "own views": ("ours", True)}


def variants(run: Session, objective: str, batch: int, chosen: list[str]) -> dict[str, Peer]:
    """Every peer of this objective, by name and variant (of `chosen`)."""
    made = {}
    for name, build in PEERS.items():
        if not name.endswith(objective) or (name.startswith("solo") and build.folder == Path()):
            continue
        for variant in chosen:
            optimizer, own_views = VARIANTS[variant]
            if own_views and name.startswith("solo"):
                continue
            feeder = RoleFeeder(run.store, run.manifest, ("retain", "forget"), seed=0, batch=batch)
            made[f"{name}, {variant}"] = build(run.cfg, feeder, optimizer, own_views)
    return made


def steps(encoder: str, batch: int, objective: str, pairs: int, chosen: list[str]) -> dict[str, Any]:
    """Seconds (clock, CPU) of our steps and of the peers' steps that follow each of them."""
    cfg = configuration(ENCODERS[encoder], batch, objective=objective, steps=pairs + WARM_UP)
    samples: dict[str, list[tuple[float, float]]] = {}
    peers: dict[str, Peer] = {}

    def between(number: int) -> None:
        for name, peer in peers.items():
            start = time.perf_counter(), time.process_time()
            peer.step()
            samples.setdefault(name, []).append((time.perf_counter() - start[0], time.process_time() - start[1]))

    with tempfile.TemporaryDirectory() as folder:
        cfg = prepared(cfg, Path(folder) / "data")
        with session(cfg, Path(folder) / "run", between) as run:
            peers |= variants(run, objective, batch, chosen)
            ours = [(s.seconds, s.cpu) for s in train(run, "pretrain")]
    last = WARM_UP + pairs
    return {
        "encoder": encoder, "batch": batch, "objective": objective, "ours": ours[WARM_UP:last],
        "theirs": {name: found[WARM_UP:last] for name, found in samples.items()},
    }  # fmt: skip


def norms(rounds: int) -> list[dict[str, Any]]:
    """Per-sample gradient norms by both sides: seconds, live bytes, agreement."""
    order, found = random.Random(0), []
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        network, x = make()
        runs = {"ours": our_norms(network, x), "theirs": opacus_norms(copy.deepcopy(network), x)}
        expected = brute_force(copy.deepcopy(network), x)
        off = {side: float(((run().double() - expected) / expected).abs().max()) for side, run in runs.items()}
        samples: dict[str, list[tuple[float, float]]] = {side: [] for side in runs}
        for number in range(rounds + WARM_UP):
            for side in order.sample(list(runs), 2):
                start = time.perf_counter(), time.process_time()
                runs[side]()
                if number >= WARM_UP:
                    samples[side].append((time.perf_counter() - start[0], time.process_time() - start[1]))
        live = {side: peak_bytes(run) for side, run in runs.items()}
        found.append({"network": name, "samples": len(x), "error": off, "seconds": samples, "live_bytes": live})
        print(name, off, live, flush=True)
    return found


def gathered(rounds: int) -> list[dict[str, Any]]:
    """`peers_gather.py` on two gloo ranks."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "gathered.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            str(Path(__file__).with_name("peers_gather.py")), str(out), str(rounds),
        ]  # fmt: skip
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads(out.read_text(encoding="utf-8"))


def save(document_path: Path | None, result: dict[str, Any]) -> None:
    """The raw numbers so far, beside the document."""
    if document_path:
        document_path.with_suffix(".json").write_text(json_text(result), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20, help="pairs of steps, at least 10")
    parser.add_argument("--rounds", type=int, default=40, help="of losses and norms")
    parser.add_argument("--encoders", nargs="+", choices=list(ENCODERS), default=["resnet18-64", "vit_tiny16-64"])
    parser.add_argument("--objectives", nargs="+", choices=("simclr", "moco"), default=["simclr", "moco"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=32, help="images of a step")
    parser.add_argument("--solo", type=Path, help="unpacked wheel of solo-learn")
    parser.add_argument("--parts", nargs="+", choices=("steps", "norms", "gathered"),
                        default=["steps", "norms", "gathered"])  # fmt: skip
    parser.add_argument("--document", type=Path, help="write the results here, and as .json beside it")
    args = parser.parse_args()
    if args.pairs < 10:
        parser.error("--pairs must be at least 10")
    torch.set_num_threads(1)
    if args.solo:
        PEERS["solo-learn simclr"].folder = args.solo
    started = time.perf_counter()
    packages = {name: metadata.version(name) for name in ("lightly", "open_clip_torch", "opacus")}
    result: dict[str, Any] = {"command": " ".join(["python", "benchmarks/peers.py", *sys.argv[1:]])}
    result |= {"machine": machine("cpu"), "packages": packages}
    result |= {"steps": [], "norms": [], "gathered": []}
    for encoder in args.encoders if "steps" in args.parts else ():
        for objective in args.objectives:
            result["steps"].append(steps(encoder, args.batch, objective, args.pairs, args.variants))
            print(encoder, objective, "done", flush=True)
            save(args.document, result)
    if "norms" in args.parts:
        result["norms"] = norms(args.rounds)
    save(args.document, result)
    if "gathered" in args.parts:
        result["gathered"] = gathered(args.rounds)
    result |= {"minutes": (time.perf_counter() - started) / 60, "load_after": os.getloadavg()[0]}
    save(args.document, result)
    text = document(result)
    if args.document:
        args.document.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
