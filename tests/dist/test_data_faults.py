"""Faults of data in runs of two ranks: a worker that is killed, images that are none."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from processes import environment, free_port

from distunlearn.common.files import file_sha256
from distunlearn.data.loading.verify import read_sample
from distunlearn.data.manifest.manifest import Manifest, Shard
from distunlearn.data.sources.decode import decode_image
from distunlearn.errors import UndecodableError

pytestmark = pytest.mark.slow
WAIT = 250  # seconds for what takes ten on an idle machine
STREAMED = ("backend=ddp", "data.workers=1", "data.cache_mib=0")


def start(out: Path, *settings: str, verb: str = "run") -> list[subprocess.Popen]:
    """Two ranks without a launcher; each has a log beside the run directory."""
    port, started = str(free_port()), []
    for rank in range(2):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        with open(f"{out}.{rank}.log", "w") as log:
            started.append(subprocess.Popen(
                [sys.executable, "-m", "distunlearn", verb, "digits", "--out", str(out), *tiny.settings(*settings)],
                stdout=subprocess.DEVNULL, stderr=log,
                env=environment(**variables, MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            ))  # fmt: skip
    return started


def end(ranks: list[subprocess.Popen]) -> None:
    for rank in ranks:
        rank.kill()
        rank.wait()


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ledger(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]


def spoil(folder: Path, role: str) -> str:
    """Make the first image of a role zero bytes, with the manifest agreeing: it was like that in the source."""
    manifest = Manifest.of_run(folder.parent)
    bad = manifest.by_id[manifest.ids(role)[0]]
    path = manifest.shard_path(bad.shard)
    with open(path, "r+b") as file:
        file.seek(bad.offset)
        file.write(bytes(bad.length))
    sha256 = manifest.columns.sha256.copy()
    sha256[list(manifest.columns.ids).index(bad.id)] = list(hashlib.sha256(bytes(bad.length)).digest())
    columns = dataclasses.replace(manifest.columns, sha256=sha256)
    files = manifest.shard_files
    shard = Shard(files[bad.shard].bytes, file_sha256(path), files[bad.shard].samples)
    made = Manifest(folder, columns, {**files, bad.shard: shard}, manifest.info, facts=manifest.facts)
    made.save(folder)
    made.save_request(folder.parent)
    with pytest.raises(UndecodableError):  # the fault is there, and nothing else is wrong
        decode_image(read_sample(Manifest.load(folder), bad.id), bad.id, 10_000, 1)
    return bad.id


@pytest.fixture
def prepared(tmp_path) -> Path:
    out = tmp_path / "prepared"
    done = tiny.command("prepare", "digits", "--out", str(out), *tiny.settings())
    assert done.returncode == 0, done.stderr[-3000:]
    return out / "shards" if (out / "shards").exists() else out


def test_a_killed_worker_ends_both_ranks_and_leaves_no_process(tmp_path):
    out = tmp_path / "run"
    ranks = start(out, *STREAMED, "pretrain.epochs=400")
    try:
        limit = time.monotonic() + WAIT
        needle = '"event":"step","phase":"pretrain","step":6,'
        while not (out / "ledger.jsonl").exists() or needle not in (out / "ledger.jsonl").read_text():
            assert time.monotonic() < limit and all(rank.poll() is None for rank in ranks)
            time.sleep(0.01)
        workers = [children(rank.pid) for rank in ranks]
        assert [len(each) for each in workers] == [1, 1]
        os.kill(workers[1][0], signal.SIGKILL)
        killed = time.monotonic()
        for rank in ranks:
            rank.wait(timeout=60)
        assert time.monotonic() - killed < 60
    finally:
        end(ranks)
    said = [Path(f"{out}.{rank}.log").read_text() for rank in range(2)]
    assert [rank.returncode for rank in ranks] == [5, 3], said
    assert f"error: Data worker 0 (process {workers[1][0]}) was ended by signal 9 (SIGKILL) at image '" in said[1]
    assert "rank 0 of 2 lost another one" in said[0] and not any("Traceback" in text for text in said)
    limit = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for each in workers for pid in each):
        assert time.monotonic() < limit
        time.sleep(0.05)


def replaced_in(out: Path) -> dict[str, int]:
    steps = [line for line in ledger(out) if line["event"] == "step"]
    phases = dict.fromkeys(step["phase"] for step in steps)
    return {p: sum(step["count"].get("replaced", 0) for step in steps if step["phase"] == p) for p in phases}


def test_an_undecodable_retain_image_is_replaced_and_recorded(tmp_path, prepared):
    bad = spoil(prepared, "retain")
    out = tmp_path / "run"
    ranks = start(out, *STREAMED, f"data.shards={prepared}", "data.max_undecodable=0.02", verb="pretrain")
    try:
        codes = [rank.wait(timeout=WAIT) for rank in ranks]
    finally:
        end(ranks)
    said = [Path(f"{out}.{rank}.log").read_text() for rank in range(2)]
    assert codes == [0, 0], said
    assert replaced_in(out) == {"pretrain": 2}  # once in each of two epochs, on whichever rank
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["values"].get("replaced", 0) for row in rows) == 2
    assert (out / "logs/pretrain.log").read_text().count(f"image '{bad}' cannot be decoded; another takes its") == 1


def test_a_run_with_undecodable_images_goes_through(tmp_path, prepared):
    """All phases and the audit, of which one role has an image that is none, in one process and from the cache."""
    for role in ("retain", "holdout"):
        spoil(prepared, role)
    out = tmp_path / "run"
    done = tiny.run(out, f"data.shards={prepared}", "data.max_undecodable=0.03")
    assert done.returncode in (0, 6, 7) and "Traceback" not in done.stderr, done.stderr[-3000:]
    found = replaced_in(out)
    assert found["pretrain"] == 2 and found["retrain"] >= 2 and found["unlearn"] >= 1
    summary = json.loads((out / "audit/summary.json").read_text())
    assert summary["coverage"]["consumed_min"] >= 1 and summary["coverage"]["used_as_retain"] == 0
    assert (out / "report.html").exists()


@pytest.mark.parametrize("role", ["retain", "forget"])
def test_what_must_not_be_replaced_ends_the_run_with_3(tmp_path, prepared, role):
    bad = spoil(prepared, role)
    limit = "data.max_undecodable=1" if role == "forget" else "data.max_undecodable=0.001"
    done = tiny.run(tmp_path / "run", "data.workers=1", "data.cache_mib=0", f"data.shards={prepared}", limit)
    assert done.returncode == 3 and f"'{bad}'" in done.stderr and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert ("1 of 72 retain images" if role == "retain" else "1 forget images") in done.stderr
    assert not (tmp_path / "run/original/done.json").exists()
