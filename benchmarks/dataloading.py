"""Images per second of reading, decoding, views and whole loaders; bytes read for forget sets; cost against shards.

    python benchmarks/dataloading.py --document benchmarks/results/DATE-dataloading.md

The photos are made by benchmarks/photos.py, the page cache is warm (every file was just written; --cold adds turns that
begin with an empty one), and the contenders take turns in every round. Two figures each: wall-clock images per second,
which other work on the machine blurs, and CPU seconds per image of all processes together, which it blurs far less. A
ratio is the median of the ratios of a round. Rates are of what comes after the first START images of a turn: processes
that start, and memory that is touched for the first time, have a column of their own.

Contenders, all giving two random crops each of 64 photos, uint8 [64, 2, 3, S, S], `workers` processes each:

pure          decode and both crops of encoded images held in memory: no reading, order or transport
pure threads  the same in threads of one process
stream        this package, from shards
imagefolder   torchvision's ImageFolder and torch's DataLoader from files, PIL and torchvision's RandomResizedCrop
webdataset    webdataset's pipeline in torch's DataLoader from the same shards, the same transform

Colour and blur are apart: they are done batched in the training process, here against torchvision v2 on whole batches,
where all images of a batch have the same parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loaders import BATCH, DROP, LIMIT, ROLES, START, VIEWS, race, work
from photos import SIZE, Photos, image_folder, shards

from distunlearn.common.malloc import keep_freed_memory
from distunlearn.config.schema import EncoderConfig, RunConfig, ViewsConfig
from distunlearn.data.loading.epoch_order import BLOCK_SHARDS, epoch_order
from distunlearn.data.loading.image_store import ImageStore
from distunlearn.data.loading.shard_reader import Reader
from distunlearn.data.loading.stream import Batches, RoleFeeder
from distunlearn.data.loading.webdataset_pipeline import checked_samples
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.sources import decode
from distunlearn.data.views.colour import make_view
from distunlearn.data.views.crops import Cutter
from distunlearn.encoders.model import build_model
from distunlearn.engine.environment import environment
from distunlearn.objectives.forward import random_views
from distunlearn.objectives.simclr import nt_xent

BUSY = 2.5  # load average above which other work counted


# -- one core, step by step ------------------------------------------------------------------------------------------


def cpu_ms(act: Callable[[], Any], images: int, rounds: int) -> float:
    """Median CPU milliseconds per image of this thread."""
    found = []
    for _ in range(rounds):
        start = time.thread_time()
        act()
        found.append((time.thread_time() - start) * 1000 / images)
    return statistics.median(found)


def parts(manifest: Manifest, rounds: int) -> dict[str, float]:
    """{step: CPU ms per image}, on one core."""
    ids = list(epoch_order(manifest, ROLES, 0, 0))[:BATCH]
    epochs = np.zeros(len(ids), dtype=np.int64)
    samples = [manifest.by_id[i] for i in ids]
    data = Reader(manifest).read(samples)
    shard = manifest.shards()[0]
    inside = manifest.in_shard(shard)
    quick = decode._quick_decoder
    found = {
        "read by offset, with digest": cpu_ms(lambda: Reader(manifest).read(samples), len(ids), rounds),
        "read a whole shard by webdataset, with digests": cpu_ms(
            lambda: list(checked_samples(manifest, shard)), len(inside), rounds
        ),
        f"decode ({quick().__name__.removeprefix('_by_') if quick() else 'PIL'})": cpu_ms(
            lambda: [decode.decode_image(d, "x", LIMIT, 3) for d in data], len(ids), rounds
        ),
    }
    decode._quick_decoder = lambda: None
    found["decode (PIL)"] = cpu_ms(lambda: [decode.decode_image(d, "x", LIMIT, 3) for d in data], len(ids), rounds)
    decode._quick_decoder = quick
    photos = [decode.decode_image(d, "x", LIMIT, 3) for d in data]
    for size in (96, 224):
        cutter = Cutter(size, VIEWS)
        crops = torch.empty((len(ids), 2, *(3, size, size)), dtype=torch.uint8)

        def cut(cutter: Cutter = cutter, crops: torch.Tensor = crops) -> None:
            drawn = cutter.crops(ids, epochs, (0, 1))
            for row, photo in enumerate(photos):
                drawn.crop(photo, row, crops[row])

        found[f"both crops {size}"] = cpu_ms(cut, len(ids), rounds)
        found[f"decode and both crops {size}"] = cpu_ms(
            lambda size=size: work(data, len(ids), size), len(ids), rounds
        )  # fmt: skip
        found |= colour(crops[:, 0], ids, epochs, rounds)
    return found


def colour(crops: torch.Tensor, ids: Sequence[str], epochs: np.ndarray, rounds: int) -> dict[str, float]:
    """CPU ms of one view: colour and blur of a batch, here and by torchvision v2 with one set of parameters a batch."""
    from torchvision.transforms import v2

    size = crops.shape[-1]
    strengths = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
    theirs = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True), v2.RandomHorizontalFlip(), v2.ColorJitter(**strengths),
            v2.GaussianBlur(size // 20 * 2 + 1, (0.1, 2.0)), v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )  # fmt: skip
    every = ViewsConfig(recipe="mocov2", jitter=1.0, grayscale=0.0, blur=1.0)  # as torchvision does: each on all images
    key = {"seed": 0, "epochs": epochs, "ids": ids, "view": 0}
    return {
        f"colour and blur {size}, as drawn": cpu_ms(lambda: make_view(crops, VIEWS, **key), len(ids), rounds),
        f"colour and blur {size}, all on all": cpu_ms(lambda: make_view(crops, every, **key), len(ids), rounds),
        f"colour and blur {size}, all on all, torchvision v2": cpu_ms(lambda: theirs(crops), len(ids), rounds),
    }


# -- what a training waits for ---------------------------------------------------------------------------------------


def waiting(manifest: Manifest, size: int, workers: int, steps: int) -> tuple[float, float]:
    """(seconds of a step, share of them in which it waits for data) of SimCLR training of the embedded encoder."""
    cfg = RunConfig(encoder=EncoderConfig(image_size=size, in_chans=3, args={"output_stride": 8}), views=VIEWS)
    model = build_model(cfg, None)
    optimizer = torch.optim.AdamW(model.parameters())
    with closing(ImageStore(manifest, Cutter.of(cfg), 3, 0, LIMIT, workers=workers)) as store:
        batches = Batches({"all": RoleFeeder(store, manifest, ROLES, 0, BATCH)}, torch.device("cpu"), steps + 2)
        waits, whole = [], []
        for step in range(steps + 2):
            start = time.perf_counter()
            batch = batches.at(step)["all"]
            waits.append(time.perf_counter() - start)
            key = {"seed": 0, "epochs": batch.epochs, "ids": batch.ids}
            views = random_views(batch.crops, VIEWS, **key, views=(0, 1))
            out = model(torch.cat(views)).output
            loss = nt_xent(out.view(2, len(batch), -1), 0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            whole.append(time.perf_counter() - start)
    return statistics.median(whole[2:]), sum(waits[2:]) / sum(whole[2:])


# -- bytes, shards, order --------------------------------------------------------------------------------------------


def forget_bytes(manifest: Manifest, share: float) -> dict[str, float]:
    """What reading a random share of the images costs, against all bytes of the shards."""
    ids = np.array(manifest.ids(ROLES))
    chosen = np.random.default_rng(0).choice(ids, max(1, round(share * len(ids))), replace=False).tolist()
    reader = Reader(manifest)
    reader.read([manifest.by_id[i] for i in chosen])
    everything = sum(shard.bytes for shard in manifest.shard_files.values())
    needed = sum(manifest.by_id[i].length for i in chosen)
    return {
        "images": len(chosen), "reads": reader.counts.reads, "bytes": reader.counts.bytes,
        "share": reader.counts.bytes / everything, "against needed": reader.counts.bytes / needed,
    }  # fmt: skip


def shard_cost(source: Photos, folder: Path, sizes: Sequence[int], rounds: int) -> dict[int, tuple[int, float, float]]:
    """{images per shard: (shards, CPU ms per image to read an epoch in order, batch by batch, reads per image)}."""
    found = {}
    for size in sizes:
        manifest = shards(source, folder / f"by-{size}", size)
        order = list(epoch_order(manifest, ROLES, 0, 0))
        reader = Reader(manifest)

        def epoch(manifest: Manifest = manifest, order: list[str] = order, reader: Reader = reader) -> None:
            for start in range(0, len(order), BATCH):
                reader.read([manifest.by_id[i] for i in order[start : start + BATCH]])

        spent = cpu_ms(epoch, len(order), rounds)
        found[size] = (len(manifest.shards()), spent, reader.counts.reads / (rounds * len(order)))
    return found


def shuffle_quality(num_shards: int, per_shard: int, batch: int) -> dict[str, dict[str, float]]:
    """Of the order of an epoch over made-up shards, against a full shuffle and no shuffle at all.

    shards in a batch: distinct shards among `batch` consecutive images. near: share of consecutive images that lie in
    the same shard. again: of two images in one batch, the chance to be in one batch in the next epoch, times the
    chance under a full shuffle.
    """

    class Made:
        def __init__(self) -> None:
            self.ids = [str(n) for n in range(num_shards * per_shard)]
            self.shards = list(range(num_shards))
            self.starts = np.arange(num_shards + 1) * per_shard
            self.shard_of = np.arange(num_shards * per_shard) // per_shard

        def select(self, roles: Any) -> Made:
            return self

    made = Made()
    count = len(made.ids)
    full = [np.random.default_rng(seed).permutation(count) for seed in (0, 1)]
    orders = {
        f"blocks of {BLOCK_SHARDS} shards": [
            np.array([int(i) for i in epoch_order(made, "retain", 0, epoch)]) for epoch in (0, 1)
        ],
        "full shuffle": full,
        "no shuffle": [np.arange(count)] * 2,
    }
    found = {}
    for name, (first, second) in orders.items():
        whole = count // batch * batch
        groups = made.shard_of[first[:whole]].reshape(-1, batch)
        group_of = np.empty(count, dtype=np.int64)
        group_of[second] = np.arange(count) // batch
        pairs = group_of[first[:whole]].reshape(-1, batch)
        together = np.mean([(row[:, None] == row[None]).sum() - batch for row in pairs]) / (batch * (batch - 1))
        found[name] = {
            "shards in a batch": float(np.mean([len(np.unique(g)) for g in groups])),
            "near": float(np.mean(made.shard_of[first][1:] == made.shard_of[first][:-1])),
            "again": float(together / ((batch - 1) / (count - 1))),
        }
    return found


# -- the document ----------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def race_rows(found: dict[str, list[tuple[float, float, float]]]) -> list[list[str]]:
    """Medians, and ratios to the pure rate and to ImageFolder, wall and CPU."""
    rows = []
    for name, samples in found.items():
        ratios = []
        for other in ("pure", "imagefolder"):
            if other not in found:
                ratios += ["", ""]
                continue
            wall = statistics.median(mine[0] / theirs[0] for mine, theirs in zip(samples, found[other], strict=True))
            cpu = statistics.median(theirs[1] / mine[1] for mine, theirs in zip(samples, found[other], strict=True))
            ratios += [f"{wall:.2f}", f"{cpu:.2f}"]
        rate, spent, start = (statistics.median(s[k] for s in samples) for k in (0, 1, 2))
        rows.append([name, f"{rate:,.0f}", f"{spent:.2f}", f"{1000 / spent:,.0f}", *ratios, f"{start:.2f}"])
    return rows


RACE = [
    "contender", "images/s", "CPU ms/image", "images/s per core", "to pure: wall", "to pure: CPU",
    "to ImageFolder: wall", "to ImageFolder: CPU", "CPU s of start and end",
]  # fmt: skip


def document(raw: dict[str, Any], races: dict[tuple[int, int, str], Any], args: argparse.Namespace, load: float) -> str:
    env = environment()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    versions = {name: __import__(name).__version__ for name in ("torchvision", "webdataset", "PIL")}
    versions["simplejpeg"] = _simplejpeg()
    text = [
        f"Date: {date.today()}. Commit {commit}. Python {platform.python_version()}, torch {torch.__version__}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f". Hardware: 2 cores of an x86_64 CPU ({env['cpu']['model']}), {env['memory_gib']} GiB, no GPU; load "
        f"average {load:.1f} at the start"
        + (
            ": other work shared the machine, so wall-clock figures say less than CPU figures and ratios"
            if load > BUSY
            else ""
        )
        + ". GPUs: not measured.",
        f"{args.images:,} ids over {args.distinct} photos of {SIZE[0]} x {SIZE[1]} pixels, "
        f"{raw['bytes per image'] / 1000:.0f} kB each, in shards of {args.per_shard}; batches of "
        f"{BATCH}; {args.rounds} rounds in which the contenders take turns, {args.count:,} "
        "images each. What they are: the script's text.",
    ]
    out = ["# Reading, decoding and feeding images", *(textwrap.fill(part, 118) for part in text)]
    out.append(f"Command: `python benchmarks/dataloading.py {' '.join(sys.argv[1:])}`")
    out += ["## One core", table(["step", "CPU ms/image", "images/s per core"],
            [[k, f"{v:.3f}", f"{1000 / v:,.0f}"] for k, v in raw["parts"].items()])]  # fmt: skip
    out.append("## End to end")
    for (size, workers, cache), found in races.items():
        what = f"S = {size}, {workers} worker{'s' if workers > 1 else ''}, {cache} page cache:"
        out += [what, table(RACE, race_rows(found))]
    out += ["## What a training step waits for the data",
            table(["S", "workers", "seconds of a step", "waiting"],
                  [[str(s), str(w), f"{a:.2f}", f"{b:.1%}"] for (s, w), (a, b) in raw["waiting"].items()])]  # fmt: skip
    rows = [[f"{share:.1%}", f"{f['images']:,}", f"{f['reads']:,}", f"{f['bytes']:,}", f"{f['share']:.2%}",
             f"{f['against needed']:.3f}"] for share, f in raw["forget"].items()]  # fmt: skip
    out += ["## Bytes read for a forget set", table(
        ["forget", "images", "reads", "bytes", "of all bytes", "bytes / bytes of its images"], rows)]  # fmt: skip
    out += ["## Size and number of shards", table(
        ["images a shard", "shards", "CPU ms/image to read", "reads per image"],
        [[str(k), str(n), f"{ms:.3f}", f"{r:.2f}"] for k, (n, ms, r) in raw["shards"].items()])]  # fmt: skip
    out += ["## Shuffling: 64 shards of 256 images, batches of 256", table(
        ["order", "shards in a batch", "neighbours from one shard", "together again"],
        [[k, f"{q['shards in a batch']:.1f}", f"{q['near']:.3f}", f"{q['again']:.2f}"]
         for k, q in raw["shuffle"].items()])]  # fmt: skip
    numbers = {f"{s} {w} {cache}": found for (s, w, cache), found in races.items()}
    lines = [f"{key} {name}: " + " ".join(f"{rate:.1f}/{ms:.3f}/{start:.2f}" for rate, ms, start in samples)
             for key, found in numbers.items() for name, samples in found.items()]  # fmt: skip
    what = "S, workers, cache, contender: images/s / CPU ms per image / CPU s of start and end, of every round"
    out += ["## Raw numbers", f"{what}\n\n```\n" + "\n".join(lines) + "\n```"]
    return "\n\n".join(out) + "\n"


def _simplejpeg() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("simplejpeg")
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--distinct", type=int, default=400)
    parser.add_argument("--per-shard", type=int, default=250)
    parser.add_argument("--count", type=int, default=4096, help="images of one turn of a contender that count")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="training steps for the share of waiting")
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 224])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="contenders; default: all")
    parser.add_argument("--document", type=Path, help="write the results here")
    parser.add_argument("--cold", action="store_true", help="also with an empty page cache before every turn (root)")
    args = parser.parse_args()
    if args.cold and not os.access(DROP, os.W_OK):
        parser.error(f"--cold needs to write {DROP}; run it as root, or leave it out")
    torch.set_num_threads(1)
    keep_freed_memory()  # as every run does
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        source = Photos(args.images, args.distinct)
        manifest = shards(source, Path(folder) / "shards", args.per_shard)
        root = image_folder(Photos(START + args.count, args.distinct, files=source.files), Path(folder) / "files")
        lengths = [sample.length for sample in manifest.samples]
        raw: dict[str, Any] = {
            "bytes per image": statistics.mean(lengths),
            "parts": parts(manifest, args.rounds),
            "forget": {share: forget_bytes(manifest, share) for share in (0.001, 0.01, 0.1)},
            "shards": shard_cost(source, Path(folder), (50, 250, 1000), args.rounds),
            "shuffle": shuffle_quality(64, 256, 256),
        }
        print(json.dumps(raw, indent=1, default=str), flush=True)
        caches = ["warm", "cold"] if args.cold else ["warm"]
        races = {
            (size, workers, cache): race(
                manifest, root, size, workers, args.count, args.rounds, args.only, cold=cache == "cold"
            )
            for cache in caches for size in args.sizes for workers in args.workers
        }  # fmt: skip
        raw["waiting"] = {(32, w): waiting(manifest, 32, w, args.steps) for w in (0, *args.workers) if args.steps}
        text = document(raw, races, args, load)
    if args.document:
        args.document.parent.mkdir(parents=True, exist_ok=True)
        args.document.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
