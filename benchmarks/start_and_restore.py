"""The start of a run of many samples, and the restore of a sharded checkpoint: seconds, memory and files a rank.

    python benchmarks/start_and_restore.py --rows 1000000 10000000 > figures.json
    python benchmarks/start_and_restore.py --opens

For every number of rows an index of made-up images is written (no shard: what is measured reads none), and processes of
their own load it, find the digest of what a training is trained on, and ask for batches of two epochs. Memory is the
process's own (RssAnon), sampled, less what it had after its imports; pages of the mapped index belong to the system.
"""

from __future__ import annotations

import argparse
import bisect
import json
import math
import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import timm
import torch

from distunlearn.data.loading.epoch_order import epoch_order
from distunlearn.data.manifest.columns import NO_HASH, Columns
from distunlearn.data.manifest.ids import IdTable, numbers
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.manifest.records import CODE, Shard
from distunlearn.data.schedule import Cycle

PER_SHARD = 10_000
FORGET, HELD_OUT = 1_000, 10_000  # images to forget, and images of every other role
BATCH, STEPS = 4096, 20
WIDTH = 24  # characters of an id
IMAGE = 100_000  # bytes
INTERVAL = 0.01  # seconds between two looks at the memory

WORLDS = ((16, 16), (16, 32), (4, 16), (16, 24), (24, 16), (32, 16), (16, 4), (64, 1024), (1024, 1024), (1024, 512),
          (1024, 64))  # fmt: skip


def by_rows(shape: tuple[int, ...], world: int, rank: int) -> tuple[int, int]:
    """First element, and the one after the last, of what a rank of fsdp2 has of a weight."""
    rows = shape[0] if shape else 1
    first, last = (min(rows, part * -(-rows // world)) for part in (rank, rank + 1))
    return first * (math.prod(shape) // rows), last * (math.prod(shape) // rows)


def by_elements(shape: tuple[int, ...], world: int, rank: int) -> tuple[int, int]:
    """As `by_rows`, of zero3."""
    size = math.prod(shape)
    first, last = (min(size, part * -(-size // world)) for part in (rank, rank + 1))
    return first, last


Cut = Callable[[tuple[int, ...], int, int], tuple[int, int]]


def opens(shapes: Iterable[tuple[int, ...]], old: tuple[Cut, int], new: tuple[Cut, int], rank: int) -> int:
    """Files that `rank` of `new` opens of a checkpoint by `old` (how weights are cut, over how many ranks)."""
    (cut, writers), files = old, {0}  # the main rank's has whole tensors, which all read
    for shape in set(shapes):
        edges = [cut(shape, writers, writer)[1] for writer in range(writers)]
        first, last = new[0](shape, new[1], rank)
        if first < last:
            files.update(range(bisect.bisect_right(edges, first), bisect.bisect_left(edges, last) + 1))
    return len(files)


def table_of_opens() -> None:
    """The most files that a rank opens, for encoders of real size: no file is made."""
    print("| encoder | W before | W now | fsdp2 | zero3 | fsdp2, read by zero3 | at least |")
    print("|---|---|---|---|---|---|---|")
    for name in ("vit_base_patch16_224", "resnet50"):
        with torch.device("meta"):
            shapes = {tuple(weight.shape) for weight in timm.create_model(name).parameters()}
        for old, new in WORLDS:
            pairs = ((by_rows, by_rows), (by_elements, by_elements), (by_rows, by_elements))
            most = [max(opens(shapes, (a, old), (b, new), rank) for rank in range(new)) for a, b in pairs]
            print(f"| {name} | {old} | {new} | {' | '.join(map(str, most))} | {-(-old // new)} |", flush=True)


def made(folder: Path, rows: int) -> None:
    """An index of so many images, and the roles of a request in the same folder."""
    data = np.char.zfill(np.arange(rows).astype(f"S{WIDTH}"), WIDTH)
    ends = numbers(pa.int64(), np.arange(rows + 1, dtype=np.int64) * WIDTH).buffers()[1]
    ids = pa.LargeStringArray.from_buffers(rows, ends, pa.py_buffer(data.tobytes()))
    del data
    number = np.arange(rows)
    shards = -(-rows // PER_SHARD)
    role = np.full(rows, CODE["retain"], dtype=np.uint8)
    others = ("third_party", "third_party_audit", "holdout", "calibration", "watch")
    ends_at = np.cumsum([0, FORGET, *[HELD_OUT] * len(others)])
    for name, first, last in zip(("forget", *others), ends_at[:-1], ends_at[1:], strict=True):
        role[np.random.default_rng(0).permutation(rows)[first:last]] = CODE[name]
    columns = Columns(
        ids=IdTable(ids), shard=(number // PER_SHARD).astype(np.uint32),
        offset=(number % PER_SHARD * (IMAGE + 1024) + 512).astype(np.uint64),
        length=np.full(rows, IMAGE, dtype=np.uint32),
        sha256=np.random.default_rng(1).integers(0, 256, (rows, 32), dtype=np.uint8),
        label=(number % 1000).astype(np.int32), width=np.full(rows, 224, np.uint32),
        height=np.full(rows, 224, np.uint32), near=number.astype(np.uint64) % np.uint64(NO_HASH),
        name=pa.nulls(rows, pa.large_string()), role=role,
    )  # fmt: skip
    size = PER_SHARD * (IMAGE + 1024) + 1024
    counts = np.bincount(columns.shard, minlength=shards)
    files = {f"{k:06d}.tar": Shard(size, "ab" * 32, int(n)) for k, n in enumerate(counts)}
    manifest = Manifest(folder, columns, files)
    manifest.save(folder)
    manifest.save_request(folder)


class _Memory:
    """Peak of the process's own memory within the block, less what it had before, in MiB."""

    def __enter__(self) -> _Memory:
        self.before = self.peak = _anonymous()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self.mib = round((max(self.peak, _anonymous()) - self.before) / 1024, 1)

    def _look(self) -> None:
        while not self._over.wait(INTERVAL):
            self.peak = max(self.peak, _anonymous())


def _anonymous() -> int:
    """KiB."""
    text = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("RssAnon")))


def start(folder: Path) -> dict[str, Any]:
    """What a rank does before its first step, with the main rank's digest, and the batches of two epochs' borders."""
    found: dict[str, Any] = {}

    def measured(name: str, work: Callable[[], Any]) -> Any:
        begun, spent = time.perf_counter(), time.process_time()
        with _Memory() as memory:
            result = work()
        found[name] = {
            "seconds": round(time.perf_counter() - begun, 2), "cpu": round(time.process_time() - spent, 2),
            "mib": memory.mib,
        }  # fmt: skip
        return result

    with _Memory() as whole:
        manifest = measured("load the index and the roles", lambda: Manifest.load(folder, run=folder))
        measured("counts and fingerprint of the roles", lambda: (manifest.count_roles(), manifest.fingerprint))
        measured("digest of the members (main rank)", lambda: manifest.samples_digest(("retain", "forget")))
        members = ("retain", "forget")
        measured("select the members", lambda: manifest.select(members))
        cycle = measured("open the order", lambda: Cycle(lambda epoch: epoch_order(manifest, members, 0, epoch), BATCH))
        measured("first batch", lambda: cycle.at(0))
        border = cycle.num_ids // BATCH
        measured(f"{STEPS} batches", lambda: [cycle.at(step) for step in range(1, STEPS + 1)])
        measured("batches at the epoch's border", lambda: [cycle.at(border + step) for step in range(2)])
    sums = {key: round(sum(part[key] for part in found.values()), 2) for key in ("seconds", "cpu")}
    found["all"] = {**sums, "mib": whole.mib}
    return found


def _child(folder: str, queue: Any) -> None:
    queue.put(start(Path(folder)))


def apart(folder: Path) -> dict[str, Any]:
    """`start` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_child, args=(str(folder), queue))
    process.start()
    found = queue.get()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--at", type=Path, default=None, help="folder for the indexes; removed afterwards")
    parser.add_argument("--opens", action="store_true", help="count files that a restore opens, and do nothing else")
    chosen = parser.parse_args()
    if chosen.opens:
        table_of_opens()
        return
    found = {}
    for rows in chosen.rows:
        folder = Path(tempfile.mkdtemp(dir=chosen.at))
        try:
            made(folder, rows)
            found[rows] = {"index_mib": (folder / "index.arrow").stat().st_size >> 20, **apart(folder)}
        finally:
            shutil.rmtree(folder)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
