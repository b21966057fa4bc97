"""Resolving a list of ids to forget against a manifest: time, memory, bytes a sample, at three sizes.

    python benchmarks/manifest.py                      # 1e5 ids in 1e6 samples, 3e5 in 3e6, 1e6 in 1e7
    python benchmarks/manifest.py --ids 1000 --samples 100000

Every case makes a manifest in one process, then loads it and resolves the list in another, whose peak memory is that
of the case. Ids look like `train/n00000123/000004567123.jpg`; the listed ones are drawn at random, and one is added
that no sample has. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from distunlearn.data.manifest.columns import Columns
from distunlearn.data.manifest.ids import IdTable, texts
from distunlearn.data.manifest.manifest import INDEX, Manifest, Shard
from distunlearn.data.prepare.forget_list import resolve_list

CASES = ((100_000, 1_000_000), (300_000, 3_000_000), (1_000_000, 10_000_000))
PER_SHARD = 10_000
PIECE = 200_000  # rows made at a time
MIB = 1 << 20


def name(number: int) -> str:
    """The id of a sample."""
    return f"train/n{number % 1000:08d}/{number:012d}.jpg"


def table(rows: np.ndarray) -> IdTable:
    """What `name` gives for these rows, all at once."""
    first, last = b"train/n00000000/", b"000000000000.jpg"
    letters = np.tile(np.frombuffer(first + last, dtype=np.uint8), (len(rows), 1))
    for values, end, digits in ((rows % 1000, 15, 3), (rows, 28, 12)):
        for k in range(digits):
            letters[:, end - 1 - k] += (values // 10**k % 10).astype(np.uint8)
    ends = np.arange(len(rows) + 1, dtype=np.int64) * letters.shape[1]
    return IdTable(pa.LargeStringArray.from_buffers(len(rows), pa.py_buffer(ends), pa.py_buffer(letters)))


def make(folder: Path, ids: int, samples: int) -> dict:
    """Write a manifest of `samples` and a list of `ids` of them; returns seconds and sizes."""
    began = time.perf_counter()
    pieces = []
    for start in range(0, samples, PIECE):
        rows = np.arange(start, min(start + PIECE, samples))
        digests = np.random.default_rng(start).integers(0, 256, (len(rows), 32), dtype=np.uint8)
        pieces.append(
            Columns(
                table(rows),
                (rows // PER_SHARD).astype(np.uint32),
                (rows % PER_SHARD * 50_000).astype(np.uint64),
                np.full(len(rows), 40_000, dtype=np.uint32),
                digests,
                (rows % 1000).astype(np.int32),
                np.full(len(rows), 500, dtype=np.uint32),
                np.full(len(rows), 375, dtype=np.uint32),
                digests[:, :8].copy().view("<u8")[:, 0],
                texts([None] * len(rows)),
                np.zeros(len(rows), dtype=np.uint8),
            )
        )
    shards = {
        f"{k:06d}.tar": Shard(PER_SHARD * 50_000, "0" * 64, min(PER_SHARD, samples - k * PER_SHARD))
        for k in range(-(-samples // PER_SHARD))
    }
    manifest = Manifest(folder, Columns.join(pieces), shards)
    assert [manifest.columns.ids[k] for k in (0, samples - 1)] == [name(0), name(samples - 1)]
    manifest.save(folder)
    listed = np.random.default_rng(0).choice(samples, ids, replace=False)
    with (folder / "list.txt").open("w") as handle:
        for number in listed.tolist():
            handle.write(f"{name(number)}\n")
        handle.write("nobody\n")
    return {
        "make_s": round(time.perf_counter() - began, 2),
        "bytes_per_sample": round((folder / INDEX).stat().st_size / samples, 1),
    }


def resolve(folder: Path) -> dict:
    """Load the manifest and resolve the list, in this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, cpu = time.perf_counter(), time.process_time()
    manifest = Manifest.load(folder)
    loaded, cpu_loaded = time.perf_counter(), time.process_time()
    after_load = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = resolve_list(folder / "list.txt", manifest.columns.ids, allow_missing=True)
    ended, cpu_ended = time.perf_counter(), time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for row in found.forget[:: max(1, len(found.forget) // 100)].tolist():  # each hundredth is what it should be
        assert manifest.columns.ids[row] == name(row), row
    return {
        "found": len(found.forget),
        "missing": found.num_missing,
        "load_s": round(loaded - began, 2),
        "resolve_s": round(ended - loaded, 2),
        "load_cpu_s": round(cpu_loaded - cpu, 2),
        "resolve_cpu_s": round(cpu_ended - cpu_loaded, 2),
        "peak_mib": round(peak / 1024),
        "mib_above_imports": round((peak - before) / 1024),
        "mib_of_load": round((after_load - before) / 1024),
    }


def case(folder: Path, ids: int, samples: int) -> dict:
    """Both parts of one case, each in a process of its own."""
    found = {"ids": ids, "samples": samples}
    for part in (["make", str(ids), str(samples)], ["resolve"]):
        done = subprocess.run(
            [sys.executable, __file__, "--part", *part, "--folder", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        found |= json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, help="listed ids of a single case")
    parser.add_argument("--samples", type=int, help="samples of a single case")
    parser.add_argument("--folder", type=Path, help="where manifests are made; by default a temporary folder")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        part, *numbers = args.part
        print(json.dumps(make(args.folder, *map(int, numbers)) if part == "make" else resolve(args.folder)))
        return
    cases = ((args.ids, args.samples),) if args.ids and args.samples else CASES
    found = []
    for ids, samples in cases:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            found.append(case(Path(folder), ids, samples))
            print(found[-1], file=sys.stderr, flush=True)
    versions = {"python": platform.python_version(), "numpy": np.__version__, "pyarrow": pa.__version__}
    print(json.dumps({"cases": found, "versions": versions, "cores": os.cpu_count()}, indent=2))


if __name__ == "__main__":
    main()
