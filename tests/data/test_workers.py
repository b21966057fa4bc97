"""Workers that are killed, fail, hang or are orphaned: the run ends soon, names them, and leaves nothing behind."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pictures import feeder, pictures, store

from distunlearn.data.loading import decode_pool as module
from distunlearn.data.loading.decode_pool import Decoder, Pool
from distunlearn.data.loading.stream import ImageStore
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.sources.decode import decode_square
from distunlearn.errors import DataError


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    return pictures(tmp_path_factory.mktemp("pictures") / "shards")


def data_workers() -> list:
    return [p for p in multiprocessing.active_children() if p.name.startswith("data worker")]


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert data_workers() == []


def spoil(monkeypatch, sample_id: str, act) -> None:
    """Workers call `act` in place of decoding one image."""

    def decode(data, name, *args):
        return act() if name == sample_id else decode_square(data, name, *args)

    monkeypatch.setattr(module, "decode_square", decode)


def drain(images: ImageStore, steps: int = 12) -> None:
    feeds = feeder(images)
    try:
        for step in range(steps):
            feeds.batch_at(step)
    finally:
        feeds.close()
        images.close()


def wait_for(condition, seconds: float = 30) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_processes_do_the_work(manifest):
    """Non-vacuity of everything else: with workers the caller decodes nothing."""
    images = store(manifest, workers=2)
    feeds = feeder(images)
    assert len(feeds.batch_at(0)) == 8
    assert len(data_workers()) == 2 and images.pool.decoder.reader.counts.images == 0
    assert images.pool.counts.images >= 8
    feeds.close()
    images.close()
    assert data_workers() == []


@pytest.mark.parametrize("workers", [1, 3])
def test_a_worker_that_is_killed_at_work(manifest, monkeypatch, workers):
    """As the kernel does when memory runs out. The control is the message: signal 9, that process, that image."""
    spoil(monkeypatch, "p7", lambda: os.kill(os.getpid(), signal.SIGKILL))
    started = time.monotonic()
    with pytest.raises(DataError, match=r"worker \d \(process \d+\) was ended by signal 9 \(SIGKILL\) at image 'p7'"):
        drain(store(manifest, workers=workers))
    assert time.monotonic() - started < 30


def test_a_worker_that_is_killed_between_batches(manifest):
    images = store(manifest, workers=2)
    feeds = feeder(images)
    feeds.batch_at(0)
    pool = images.pool  # on a busy machine one worker may have done all there was to do so far
    victim = next(w.process for n, w in enumerate(pool._workers) if pool._place(n) != "none yet")
    os.kill(victim.pid, signal.SIGKILL)
    wait_for(lambda: not alive(victim.pid))
    started = time.monotonic()
    with pytest.raises(DataError, match=rf"\(process {victim.pid}\) was ended by signal 9 .* at image 'p\d+'"):
        for step in range(1, 40):
            feeds.batch_at(step)
    assert time.monotonic() - started < 30
    assert len(feeds.batch_at(5)) == 8  # whoever catches the error may go on, with new workers
    feeds.close()
    images.close()


class _Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("no way\nout")
        self.hook = lambda: None


class _Unprintable(BaseException):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize("kind", [_Unpicklable, _Unprintable, MemoryError, SystemExit])
def test_a_worker_that_raises_anything(manifest, monkeypatch, kind):
    def act():
        raise kind()

    with pytest.raises(Exception, match="pickle|lambda|local"):
        pickle.dumps(_Unpicklable())  # the fault is there
    spoil(monkeypatch, "p7", act)
    with pytest.raises(DataError, match=rf"Data worker \d .* failed at image 'p7' \({kind.__name__}: ") as caught:
        drain(store(manifest, workers=2))
    assert "\n" not in str(caught.value) and "data.workers=0" in str(caught.value)
    with pytest.raises(kind):  # as it says: without workers the error comes as it is
        drain(store(manifest, workers=0))


def test_a_worker_that_hangs(manifest, monkeypatch):
    spoil(monkeypatch, "p7", lambda: time.sleep(600))
    monkeypatch.setattr(module, "PATIENCE", 1.0)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"Data worker \d .* has not answered for 1 s at image 'p7'"):
        drain(store(manifest, workers=2))
    assert time.monotonic() - started < 30


def test_signals_for_the_run_do_not_end_its_workers(manifest):
    """SLURM signals all processes of a job, and Ctrl-C all of a terminal: only the run may decide to stop."""
    images = store(manifest, workers=2)
    feeds = feeder(images)
    feeds.batch_at(0)
    before = {p.pid for p in data_workers()}
    for pid in before:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.kill(pid, number)
    time.sleep(0.1)
    for step in range(1, 12):
        feeds.batch_at(step)
    assert {p.pid for p in data_workers() if alive(p.pid)} == before
    feeds.close()
    images.close()


def test_signals_before_a_worker_has_begun_do_not_end_it(manifest, monkeypatch):
    """Between its fork and its first line a worker has the handlers of whoever forked it."""
    serve = module._serve

    def late(*arguments) -> None:
        for number in module._IGNORED:
            os.kill(os.getpid(), number)
        serve(*arguments)

    monkeypatch.setattr(module, "_serve", late)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    drain(store(manifest, workers=2))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {here!r})
from pathlib import Path
from pictures import feeder, store
from distunlearn.data.manifest.manifest import Manifest
images = store(Manifest.load(Path({folder!r})), workers=3)
feeds = feeder(images)
feeds.batch_at(0)
print(*[w.process.pid for w in images.pool._workers], flush=True)
if sys.argv[1] == "wait":
    time.sleep(600)
"""


@pytest.mark.parametrize("way", ["killed", "unclosed"])
def test_no_worker_outlives_the_run(manifest, way):
    """Killed without warning, or ended without closing anything, which must not hang either."""
    text = SCRIPT.format(here=str(Path(__file__).parent), folder=str(manifest.folder))
    with subprocess.Popen(
        [sys.executable, "-c", text, "wait" if way == "killed" else "end"], stdout=subprocess.PIPE, text=True
    ) as process:
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 3
        if way == "killed":
            assert all(map(alive, pids))
            process.kill()
        assert process.wait(60) == (-signal.SIGKILL if way == "killed" else 0)
    wait_for(lambda: not any(map(alive, pids)))


def test_the_pool_takes_pieces_in_any_order_and_grows(manifest):
    pool = Pool(Decoder(manifest, 16, 3, 10_000), 2)
    pool.reserve(2)
    ids = manifest.ids("retain")
    pieces = [pool.submit([manifest.by_id[i] for i in ids[k : k + 5]]) for k in range(0, 30, 5)]
    expected = torch.empty((30, 3, 16, 16), dtype=torch.uint8)
    Decoder(manifest, 16, 3, 10_000).fill([manifest.by_id[i] for i in ids[:30]], expected, lambda _: None)
    found = torch.empty_like(expected)

    def take(number: int) -> None:
        assert pool.take(pieces[number], found[5 * number : 5 * number + 5]) == []

    take(4)
    pool.abandon([pieces[1]])
    take(0)
    pool.reserve(20)  # the workers are started anew, and what is outstanding is done again
    take(3)
    take(5)
    take(2)
    kept = [*range(5), *range(10, 30)]
    assert torch.equal(found[kept], expected[kept])
    pool.close()


def test_more_pieces_than_reserved_are_a_mistake_of_the_caller(manifest):
    pool = Pool(Decoder(manifest, 16, 3, 10_000), 1)
    one = [manifest.by_id[manifest.ids("retain")[0]]]
    with pytest.raises(AssertionError, match="reserved"):
        for _ in range(5):
            pool.submit(one)
    pool.close()


def test_shared_memory_is_bounded_and_not_in_dev_shm(manifest):
    images = store(manifest, workers=2, prefetch=3)
    feeds = feeder(images)
    feeds.batch_at(0)
    first = images.pool._slots.data_ptr()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    (shared,) = [m for m in maps if int(m[0].split("-")[0], 16) <= first < int(m[0].split("-")[1], 16)]
    assert shared[1] == "rw-s" and "/dev/shm" not in shared[-1]
    assert images.pool._slots.shape == (4 + 4 * 2, 32, 3, 16, 16)  # 2 a worker, and 4 batches of 2 pieces
    feeds.close()
    images.close()
