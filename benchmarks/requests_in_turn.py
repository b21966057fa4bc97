"""Three requests in turn on one encoder: do the images of the first stay forgotten while the later ones are served?

    python benchmarks/requests_in_turn.py digits --seed 0 --out DIR            [--purge] [--processes 2] [--set K=V ...]
    python benchmarks/requests_in_turn.py photos --seed 0 --out DIR --purge    [--later K=V ...] [--reference]

`digits`: the recipe of that name. `photos`: 600 generated photos and, as the original encoder, a checkpoint of a
backbone alone that was trained elsewhere: by a run of another seed, on the images that are the members here.

Every run is `distunlearn run`, the later ones with `--previous`. The images of the first request are kept aside before
they are purged, and every encoder is shown them here, in the way of the audit. Prints and writes DIR/result.json: view
agreement (AUC against the holdout) of the first request's images in the encoder before it, after it, and after the
third, and how often one of them is in a batch of a later run, by the ledger and by the roles; and of each request its
own images before and after it. With `--reference` the first and the third run train their retrained encoder, and the
images are shown to both: what of a rise is there without any memory of them. Goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from photos import jpeg
from safetensors.torch import load_file

from distunlearn.audit.signals.collect import AUDIT_EPOCH, CHUNK, looking
from distunlearn.config.schema import RunConfig
from distunlearn.data.loading.image_store import open_store
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.encoders.model import build_model
from distunlearn.engine.run_directory import saved_config, shards_folder
from distunlearn.objectives import make_objective
from distunlearn.objectives.forward import EncoderView
from distunlearn.verify.chain import Chain
from distunlearn.verify.run import STATE
from distunlearn.verify.statistics import Comparison, auc

SETS = {
    "digits": [
        "data.members=240", "data.forget=30", "data.holdout=200", "data.calibration=60", "data.third_party=120",
        "data.third_party_audit=30", "pretrain.epochs=100", "pretrain.batch=60", "unlearn.steps=40",
        "unlearn.retain_batch=48", "unlearn.forget_batch=16", "unlearn.third_party_batch=24", "audit.views=6",
    ],
    "photos": [
        "data.source=imagefolder", "data.members=260", "data.forget=30", "data.holdout=160", "data.calibration=60",
        "data.third_party=90", "data.third_party_audit=30", "encoder.in_chans=3", "pretrain.epochs=80",
        "pretrain.batch=60", "unlearn.steps=40", "unlearn.retain_batch=48", "unlearn.forget_batch=16",
        "unlearn.third_party_batch=24", "audit.views=6",
    ],
}  # fmt: skip
NEXT = {"digits": 30, "photos": 30}
ENDED = (0, 6, 7)


def command(processes: int, *words: str) -> None:
    """One `distunlearn` command; its verdict does not matter here."""
    start = [sys.executable, "-m"]
    if processes > 1:
        # With a restart left a run that came to a verdict ends with 0; torchrun makes 1 of any other code.
        start += ["torch.distributed.run", "--standalone", "--max-restarts=1", f"--nproc_per_node={processes}", "-m"]
    done = subprocess.run([*start, "distunlearn", *words], capture_output=True, text=True, check=False)
    if done.returncode not in ENDED:
        raise SystemExit(f"{' '.join(words[:3])} ended with {done.returncode}: {done.stderr[-2000:]}")


def sets(values: list[str]) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def photos(folder: Path) -> list[str]:
    """600 generated photos; settings that name them."""
    root = folder / "photos"
    for number in range(600):
        path = root / f"class{number % 5}" / f"{number:04d}.jpg"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(number, (120, 90)))
    return [f"data.root={root}"]


def foreign(folder: Path, settings: list[str], seed: int) -> list[str]:
    """A checkpoint of a backbone alone, of a run of another seed; settings that name it and a list of all roles.

    The roles are those of that run, so that members are what the encoder was trained on.
    """
    other, listed = folder / "elsewhere", folder / "request.csv"
    if not (other / "original" / "done.json").exists():
        command(1, "prepare", "digits", "--out", str(other), *sets([*settings, f"seed={seed + 100}"]))
        command(1, "pretrain", "digits", "--out", str(other), *sets([*settings, f"seed={seed + 100}"]))
    manifest = Manifest.of_run(other)
    rows = [f"{s.id},{s.role}" for s in manifest.samples if s.role != "unused"]
    listed.write_text("id,role\n" + "\n".join(rows) + "\n")
    checkpoint = other / "original" / "export" / "model.safetensors"
    return [f"encoder.checkpoint={checkpoint}", f"data.forget={listed}"]


@torch.no_grad()
def agreements(folder: Path, cfg: RunConfig, kept: Manifest, shown: list[str]) -> dict[str, float]:
    """{id: mean cosine between its views} of some images in the encoder of a model folder, on the audit's views."""
    state = load_file(folder / STATE)
    model = build_model(cfg, None)
    model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
    encoder = EncoderView(model, None, make_objective(cfg.objective), cfg.views, cfg.seed)
    store, found = open_store(kept, cfg, torch.device("cpu")), {}
    with looking(encoder, cfg.audit.precision):
        for start in range(0, len(shown), CHUNK):
            ids = shown[start : start + CHUNK]
            views = encoder.views(ids, store.cut, AUDIT_EPOCH, cfg.audit.views)
            units = torch.nn.functional.normalize(torch.stack([model(view).output for view in views]).double(), dim=-1)
            first, second = np.triu_indices(len(units), 1)
            found |= zip(ids, (units[first] * units[second]).sum(-1).mean(0).tolist(), strict=True)
    return found


def of_requests(kept: Manifest, chain: Chain) -> dict[int, list[str]]:
    """{number of a request of the chain: the ids that it named}."""
    numbers = np.array(chain.requests_of(row.tobytes() for row in kept.columns.sha256))
    return {number: kept.columns.ids.at(np.flatnonzero(numbers == number)) for number in range(1, numbers.max() + 1)}


def in_later_batches(run: Path, kept: Manifest) -> int:
    """Times that an image of the first request is in a batch of a later run: named by its ledger, or by its roles."""
    gone = {sample.sha256 for sample in kept.lookup(kept.ids("forget"))}
    ids = set(kept.ids("forget"))
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    named = sum(i in ids for line in lines for part in ("forget", "misused") for i in line.get(part, ()))
    now = Manifest.load(shards_folder(saved_config(run, world=1), run), run=run)
    trained = now.lookup(now.ids(("retain", "forget", "third_party", "calibration")))
    return named + sum(sample.sha256 in gone for sample in trained)


def requests(asked: argparse.Namespace) -> dict:
    folder = asked.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    tier = f"audit.tier={int(asked.reference)}"
    settings = [*SETS[asked.kind], f"seed={asked.seed}", tier, "audit.bootstrap=100", *asked.set]
    if asked.kind == "photos":
        settings += photos(folder)
        settings += foreign(folder, settings, asked.seed)
    settings += [f"backend={'ddp' if asked.processes > 1 else 'single'}"]
    runs = [folder / name for name in ("first", "second", "third")]
    kept_run = folder / "kept"
    if not (runs[0] / "report.html").exists():
        command(asked.processes, "run", "digits", "--out", str(runs[0]), *sets(settings))
    if not kept_run.exists():
        shutil.copytree(runs[0] / "shards", folder / ".kept" / "shards", dirs_exist_ok=True)
        for name in ("request.json", "roles.arrow"):
            shutil.copy(runs[0] / name, folder / ".kept" / name)
        (folder / ".kept").rename(kept_run)
    for before, run in zip(runs, runs[1:], strict=False):
        if asked.purge and not (before / "purge.json").exists():
            command(1, "purge", str(before), "--apply")
        if not (run / "report.html").exists():
            audited = tier if run == runs[-1] else "audit.tier=0"
            again = [f"data.forget={NEXT[asked.kind]}", f"seed={asked.seed}", audited, *asked.later]
            command(asked.processes, "run", "--previous", str(before), "--out", str(run), *sets(again))
    cfg, kept = saved_config(runs[0], world=1), Manifest.of_run(kept_run)
    return looked_at(asked, runs, cfg, kept)


def looked_at(asked: argparse.Namespace, runs: list[Path], cfg: RunConfig, kept: Manifest) -> dict:
    """The figures of three finished runs; kept: the images of the first one, as before any purge."""
    named, holdout = of_requests(kept, Chain.load(runs[-1])), kept.ids("holdout")
    shown = [i for ids in (*named.values(), holdout) for i in ids]
    encoders = {"before": runs[0] / "original", **{run.name: run for run in runs}}
    if asked.reference:
        encoders |= {f"retrained for the {run.name}": run / "retrained" for run in (runs[0], runs[-1])}
    known = {name: agreements(folder, cfg, kept, shown) for name, folder in encoders.items()}

    def level(encoder: str, number: int) -> float:
        """AUC of view agreement of the images of a request against held-out images, in one encoder."""
        return auc(Comparison.of(*(np.array([known[encoder][i] for i in ids]) for ids in (named[number], holdout))))

    found = {
        "kind": asked.kind, "seed": asked.seed, "purge": asked.purge, "processes": asked.processes,
        **{name: level(name, 1) for name in encoders},
        "own": {
            run.name: {"before": level(before, number), "after": level(run.name, number)}
            for number, (before, run) in enumerate(zip(encoders, runs, strict=False), 1)
        },
        "in_later_batches": {run.name: in_later_batches(run, kept) for run in runs[1:]},
    }  # fmt: skip
    found["moved"] = found["third"] - found["first"]
    if asked.reference:
        found["moved_retrained"] = found["retrained for the third"] - found["retrained for the first"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(SETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--purge", action="store_true", help="purge the shards between the requests")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--reference", action="store_true", help="retrain for the first and the third request")
    parser.add_argument("--set", action="append", default=[], help="further settings of the first run")
    parser.add_argument("--later", action="append", default=[], help="further settings of the later runs")
    asked = parser.parse_args()
    found = requests(asked)
    (asked.out / "result.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
