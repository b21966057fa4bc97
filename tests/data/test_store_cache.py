"""Processes that read an object store, and the copies that they share on a local disk."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from object_server import as_s3, bare, batches, samples

from distunlearn.data.loading.shard_reader import Reader
from distunlearn.data.loading.verify import read_sample
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.manifest.records import Remote
from distunlearn.data.storage import object_store
from distunlearn.data.storage.object_store import ObjectStore
from distunlearn.data.storage.object_store_cache import ShardCache, verify_objects
from distunlearn.data.storage.retry import Counts
from distunlearn.errors import ConfigError, DataError

# -- processes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "cached"), [("http", False), ("http", True), ("s3", False)])
def test_workers_give_the_batches_of_local_shards(local, tmp_path, server, monkeypatch, scheme, cached):
    """The store was used in this process before they are forked, as a run's check of the shards does."""
    options = {"cache": str(tmp_path / "copies")} if cached else {}
    manifest = bare(local, tmp_path, server.url if scheme == "http" else as_s3(server, monkeypatch), **options)
    verify_objects(manifest, deep=True)
    expected = batches(local, 0)
    for workers in (0, 1, 2):
        assert batches(manifest, workers) == expected
    gets = [name for method, name, _ in server.asked if method == "GET"]
    assert len(gets) == len(local.shards()) if cached else len(gets) > 3 * len(local.shards())
    verify_objects(manifest, deep=not cached)  # the connections of this process are as they were
    if cached:
        return
    own, real = os.getpid(), object_store._file_system
    monkeypatch.setattr(object_store, "_file_system", lambda url, pid: real(url, own))
    with pytest.raises(DataError, match="fork"):  # control: the parent's file system does not do
        batches(manifest, 1)


WATCHED = """
import pickle, sys
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.loading.shard_reader import Reader
from distunlearn.data.manifest.records import Remote
from distunlearn.data.storage.object_store_cache import verify_objects
events = []
names = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class")
sys.addaudithook(lambda event, args: events.append(event) if event in names else None)
manifest = Manifest.load(sys.argv[1], Remote(sys.argv[2], cache=sys.argv[3] if len(sys.argv) > 3 else None))
verify_objects(manifest, deep=True)
images = Reader(manifest).read(list(manifest.samples))
assert len(images) == len(manifest) and not events, events
pickle.loads(pickle.dumps(OSError))
assert events == ["pickle.find_class"], events
"""


@pytest.mark.parametrize("cached", [False, True])
def test_no_program_is_started_and_nothing_is_unpickled(remote, server, tmp_path, cached):
    command = [sys.executable, "-c", WATCHED, str(remote.folder), server.url, *[str(tmp_path / "copies")] * cached]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert server.sent


# -- the cache -----------------------------------------------------------------------------------------------------


def copies(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".lock"))


def test_a_shard_is_fetched_once_and_as_a_whole(local, tmp_path, server):
    folder = tmp_path / "copies"
    manifest = bare(local, tmp_path, server.url, cache=str(folder))
    wanted = samples(manifest, "retain")
    for _ in range(3):
        assert Reader(manifest).read(wanted) == [read_sample(local, s.id) for s in wanted]
    used = {s.shard for s in wanted}
    assert server.sent == {name: local.shard_files[name].bytes for name in used}
    assert copies(folder) == sorted(f"{local.shard_files[name].sha256}.tar" for name in used)


def test_a_damaged_copy_is_fetched_again(local, tmp_path, server):
    folder = tmp_path / "copies"
    manifest = bare(local, tmp_path, server.url, cache=str(folder))
    shard = manifest.shards()[0]
    inside = manifest.in_shard(shard)
    reader = Reader(manifest)
    expected = reader.read(inside)
    path = folder / f"{manifest.shard_files[shard].sha256}.tar"
    whole, size = path.read_bytes(), manifest.shard_files[shard].bytes
    flipped = bytearray(whole)
    flipped[inside[1].offset + 5] ^= 1
    for times, damaged in enumerate((whole[:-1], b"", bytes(len(whole)), bytes(flipped)), start=2):
        path.write_bytes(damaged)
        assert reader.read(inside) == expected and path.read_bytes() == whole
        assert server.sent[shard] == times * size
    path.write_bytes(bytes(len(whole)))
    verify_objects(manifest, deep=True)
    assert path.read_bytes() == whole
    (server.folder / shard).write_bytes(bytes(size))
    path.write_bytes(bytes(size))
    with pytest.raises(DataError, match=f"{shard} .* does not have the sha256 of the manifest"):
        reader.read(inside)
    assert not path.exists() and not list(folder.glob(".*.partial"))  # what is not right never gets its name


def test_copies_used_longest_ago_go_first(local, tmp_path, server):
    folder = tmp_path / "copies"
    remote = Remote(server.url, cache=str(folder))
    manifest = bare(local, tmp_path, server.url)
    cache = ShardCache(ObjectStore(server.url), manifest, remote)
    a, b, c = manifest.shards()[:3]
    sizes = {name: manifest.shard_files[name].bytes for name in (a, b, c)}
    cache._budget = sum(sizes.values()) - 1

    def use(shard: str) -> None:
        handle = cache.open(shard, Counts())
        assert os.pread(handle, 1 << 30, 0) == (server.folder / shard).read_bytes()
        os.close(handle)
        os.utime(cache._path(shard), (next(clock), next(clock)))

    clock = iter(range(10**9, 10**9 + 100))
    for shard in (a, b, a, c):
        use(shard)
    assert copies(folder) == sorted(cache._path(name).name for name in (a, c))
    open_before = cache.open(a, Counts())
    os.utime(cache._path(a), (1, 1))
    use(c)
    use(b)
    assert copies(folder) == sorted(cache._path(name).name for name in (b, c))
    assert os.pread(open_before, 1 << 30, 0) == (server.folder / a).read_bytes()  # who has it open may go on
    os.close(open_before)
    old, new = folder / ".old.partial", folder / ".new.partial"
    for path in (old, new):
        path.write_bytes(b"left by a process that was killed")
    os.utime(old, (1, 1))
    use(a)
    assert new.exists() and not old.exists()
    with pytest.raises(ConfigError, match="store_cache_mib=1 has no room for a shard of 2097152 bytes; set it to 2"):
        ShardCache(ObjectStore(server.url), _with_a_large_shard(manifest), Remote(server.url, cache="x", cache_mib=1))


def _with_a_large_shard(manifest: Manifest) -> Manifest:
    files = {name: type(shard)(2 << 20, shard.sha256, shard.samples) for name, shard in manifest.shard_files.items()}
    return Manifest(manifest.folder, manifest.columns, files)


def test_a_small_cache_still_gives_every_image(local, tmp_path, server):
    manifest = bare(local, tmp_path, server.url, cache=str(tmp_path / "copies"))
    reader = Reader(manifest)
    reader._cache._budget = 2 * max(shard.bytes for shard in manifest.shard_files.values())
    wanted = samples(manifest, "retain", "forget")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert reader.read(wanted) == [read_sample(local, s.id) for s in wanted]
    assert sum(server.sent.values()) > 1.5 * sum(local.shard_files[name].bytes for name in {s.shard for s in wanted})
    assert sum(p.stat().st_size for p in (tmp_path / "copies").glob("*.tar")) <= reader._cache._budget
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # connections aside, nothing stays open


def test_processes_that_want_the_same_shard_fetch_it_once(local, tmp_path, server):
    folder = tmp_path / "copies"
    manifest = bare(local, tmp_path, server.url, cache=str(folder))
    wanted = samples(manifest, "retain", "forget")
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(3), context.Queue()

    def read() -> None:
        barrier.wait(60)
        answers.put(Reader(manifest).read(wanted))

    racing = [context.Process(target=read) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        for process in racing:
            process.start()
    found = [answers.get(timeout=120) for _ in racing]
    for process in racing:
        process.join(30)
    assert [process.exitcode for process in racing] == [0, 0, 0]
    assert all(each == [read_sample(local, s.id) for s in wanted] for each in found)
    assert server.sent == {name: local.shard_files[name].bytes for name in {s.shard for s in wanted}}
    assert len(copies(folder)) == len(server.sent) and not list(folder.glob(".*.partial"))
