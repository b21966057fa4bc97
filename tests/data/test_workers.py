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

from distunlearn.data.loading import dataset, loader
from distunlearn.data.loading.dataset import ImageDataset, Wanted
from distunlearn.data.loading.image_store import ImageStore
from distunlearn.data.loading.loader import Loader
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.sources.decode import decode_image
from distunlearn.data.views.crops import Cutter
from distunlearn.errors import DataError


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    return pictures(tmp_path_factory.mktemp("pictures") / "shards")


def data_workers() -> list:
    return multiprocessing.active_children()


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert data_workers() == []


def wanted(ids: list[str]) -> list[Wanted]:
    return [Wanted.plain(ids)]


def spoil(monkeypatch, sample_id: str, act) -> None:
    """Workers call `act` in place of decoding one image."""

    def decode(data, name, *args):
        return act() if name == sample_id else decode_image(data, name, *args)

    monkeypatch.setattr(dataset, "decode_image", decode)


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
    assert len(data_workers()) == 2 and images.loader.dataset.reader.counts.images == 0
    assert images.counts.images >= 8
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
    victim = images.loader._pid(0)  # the first batch was this worker's
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: not alive(victim))
    started = time.monotonic()
    with pytest.raises(DataError, match=rf"worker 0 \(process {victim}\) was ended by signal 9 .* at image 'p\d+'"):
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
    monkeypatch.setattr(loader, "PATIENCE", 1.0)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"Data worker \d .* has not got on for 1 s at image 'p7'"):
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
    begin = loader.begin_worker

    def late(*arguments) -> None:
        for number in loader.IGNORED:
            os.kill(os.getpid(), number)
        begin(*arguments)

    monkeypatch.setattr(loader, "begin_worker", late)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    drain(store(manifest, workers=2))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_the_handler_for_ended_children_stays_as_it_was(manifest):
    """A DataLoader's own would raise in the midst of a checkpoint, and not with the exit code of lost data."""
    before = signal.getsignal(signal.SIGCHLD)
    images = store(manifest, workers=1)
    feeds = feeder(images)
    feeds.batch_at(0)
    assert signal.getsignal(signal.SIGCHLD) == before
    os.kill(images.loader._pid(0), signal.SIGKILL)
    time.sleep(0.2)  # nothing is raised here
    feeds.close()
    images.close()
    assert signal.getsignal(signal.SIGCHLD) == before


def test_workers_do_not_draw_from_the_generator_of_the_training(manifest):
    """A DataLoader draws a seed from it unless it has one of its own: then the weights would depend on the workers."""
    for workers in (0, 1):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        drain(store(manifest, workers=workers))
        assert torch.equal(torch.get_rng_state(), before)
    next(iter(torch.utils.data.DataLoader([1])))
    assert not torch.equal(torch.get_rng_state(), before), "the fault is there"


SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {here!r})
from pathlib import Path
from pictures import feeder, reloaded, store
images = store(reloaded(Path({folder!r})), workers=3)
feeds = feeder(images)
feeds.batch_at(0)
print(*[p.pid for p in images.loader._processes], flush=True)
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


def test_a_series_gives_its_batches_in_order_and_its_workers_serve_the_next(manifest):
    plain = ImageDataset(manifest, Cutter(16), 3, 10_000)
    ids = manifest.ids("retain")
    batches = [ids[k : k + 5] for k in range(0, 30, 5)]
    ahead = Loader(ImageDataset(manifest, Cutter(16), 3, 10_000), 2, 1)
    pids = []
    for series in (batches, batches[::-1]):
        ahead.start(map(wanted, series))
        pids.append({p.pid for p in data_workers()})
        for batch in series:
            assert torch.equal(ahead.next().crops, torch.stack(plain.__getitems__(batch)))
        assert ahead.is_idle
    ahead.start(map(wanted, batches))
    assert torch.equal(ahead.next().crops[0], plain[ids[0]])
    ahead.start(map(wanted, batches[3:]))  # five of the series before are not taken, and come to nobody
    assert torch.equal(ahead.next().crops[0], plain[ids[15]])
    assert pids[0] == pids[1] != {p.pid for p in data_workers()}
    ahead.close()
    ahead.close()


def test_a_stream_goes_on_after_others_have_used_the_workers(manifest):
    images = store(manifest, workers=2)
    feeds = feeder(images)
    expected = [feeder(store(manifest)).batch_at(step) for step in range(4)]
    for step in range(4):
        found = feeds.batch_at(step)
        assert found.ids == expected[step].ids and torch.equal(found.crops, expected[step].crops)
        assert len(images.plain(manifest.ids(("retain", "third_party")))) == 46
    feeds.close()
    images.close()


def test_the_dataset_is_one_that_any_data_loader_takes(manifest):
    images = ImageDataset(manifest, Cutter(16), 3, 10_000)
    ids = manifest.ids("forget")
    found = torch.cat(list(torch.utils.data.DataLoader(images, sampler=ids, batch_size=3)))
    assert len(images) == 54 and torch.equal(found, torch.stack([images[i] for i in ids]))


def test_shared_memory_is_bounded_and_not_in_dev_shm(manifest):
    images = store(manifest, workers=2, prefetch=3)
    feeds = feeder(images)
    feeds.batch_at(0)
    first = images.loader._slots.data_ptr()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    (shared,) = [m for m in maps if int(m[0].split("-")[0], 16) <= first < int(m[0].split("-")[1], 16)]
    assert shared[1] == "rw-s" and "/dev/shm" not in shared[-1]
    assert images.loader._slots.shape == (2 * 3 + 1, 8 * 2, 3, 16, 16)
    feeds.close()
    images.close()


def test_what_was_taken_is_not_written_over(manifest):
    """Places in shared memory are used again; batches of several sizes, some larger than the first, are kept."""
    plain = ImageDataset(manifest, Cutter(16), 3, 10_000)
    ids = manifest.ids("retain")
    batches = [ids[k : k + size] for k, size in zip(range(36), [3, 1, 5, 0, 2] * 8, strict=False)]
    ahead = Loader(ImageDataset(manifest, Cutter(16), 3, 10_000), 2, 1)
    ahead.start(map(wanted, batches))
    found = [ahead.next().crops for _ in batches]
    for images, batch in zip(found, batches, strict=True):
        assert torch.equal(
            images, torch.stack([plain[i] for i in batch]) if batch else torch.empty(0, 3, 16, 16).byte()
        )
    ahead.start(map(wanted, [ids[:20], ids[20:]]))
    assert torch.equal(torch.cat([ahead.next().crops, ahead.next().crops]), torch.stack([plain[i] for i in ids]))
    ahead.close()
