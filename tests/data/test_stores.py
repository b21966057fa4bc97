"""Shards in an object store: the same bytes as from a disk, little traffic, and every failure a sentence."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
from fsspec.exceptions import FSTimeoutError
from object_server import ObjectServer, serving
from pictures import feeder, pictures, store

from distunlearn import pipeline
from distunlearn.cli import main
from distunlearn.config import DataConfig, RunConfig
from distunlearn.config_checks import cross_checks
from distunlearn.config_io import load_config, save_config
from distunlearn.data import stores
from distunlearn.data.index import index_shards
from distunlearn.data.manifest import Manifest, Sample
from distunlearn.data.patience import Counts, is_transient, reason
from distunlearn.data.reading import Reader
from distunlearn.data.shards import read_sample
from distunlearn.data.store_cache import ShardCache, verify_objects
from distunlearn.data.stores import ObjectStore, Remote
from distunlearn.errors import ConfigError, DataError
from distunlearn.pipeline import find_manifest, shards_remote
from distunlearn.store_url import DRIVERS, url_problem

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from hostile_tars import img2dataset  # noqa: E402


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Manifest:
    return pictures(tmp_path_factory.mktemp("pictures") / "shards")


@pytest.fixture
def objects(local, tmp_path) -> Path:
    """A copy of the shards that a test may spoil."""
    folder = tmp_path / "objects of 100% ours"
    folder.mkdir()
    for name in local.shards():
        shutil.copy(local.shard_path(name), folder)
    return folder


@pytest.fixture
def server(objects):
    pytest.importorskip("aiohttp")  # of the extra `test`
    with serving(objects) as found:
        yield found


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The pauses before requests are repeated, none of which is made."""
    found: list[float] = []
    monkeypatch.setattr(stores.time, "sleep", found.append)
    return found


@pytest.fixture
def remote(local, tmp_path, server) -> Manifest:
    return bare(local, tmp_path, server.url)


def bare(local: Manifest, tmp_path: Path, url: str, **options) -> Manifest:
    """The manifest in a folder without shards, which lie at the URL."""
    folder = tmp_path / "manifest"
    folder.mkdir(exist_ok=True)
    local.save(folder)
    assert not list(folder.glob("*.tar"))
    return Manifest.load(folder, Remote(url, **options))


def samples(manifest: Manifest, *roles: str) -> list[Sample]:
    return [manifest.by_id[i] for i in manifest.ids(roles)]


# -- URLs ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "pipe:cat /etc/passwd": "space", "pipe:cat$IFS/etc/passwd": "begins with 'pipe:'", "/data/shards": "is no URL",
    "s3:bucket/set": "begins with 's3:'", "ftp://host/set": "begins with 'ftp:'", "memory://set": "'memory:'",
    "S3://bucket/set": "begins with 'S3:'",
    "simplecache::s3://bucket/set": "chains", "zip://x.tar::http://host/set": "chains", "s3://bucket/a::b": "chains",
    "s3://bucket/../other": "'..'", "http://host/a/%2e%2E/b": "'..'", "file:///data/./x": "'..'",
    "http://host/set?X-Amz-Signature=s3cret": "query", "gs://bucket/set#s3cret": "query",
    "https://me:s3cret@host/set": "user or a password", "s3://AKIA:s3cret@bucket/set": "user or a password",
    "s3://s3cret@bucket/set": "user or a password", "abfs://c:s3cret@account.dfs.core.windows.net/x": "password",
    "s3:///set": "no bucket", "http:///set": "no host", "http://host:99999/set": "no host", "http://-x/set": "no host",
    "file://host/data": "no absolute path", "file://": "no absolute path", "s3://bucket/a b": "space",
    "s3://bucket/a\\..\\b": "backslash", "s3://bucket/a\nb": "control", "": "is no URL",
}  # fmt: skip


@pytest.mark.parametrize("url", REFUSED)
def test_urls_that_are_refused_before_any_work(tmp_path, capsys, url, monkeypatch):
    monkeypatch.setattr(stores, "_file_system", None)
    assert REFUSED[url] in url_problem(url)
    given = ["--set", f"data.store={url!r}" if url else "data.store=''", "--set", f"data.shards={tmp_path}"]
    assert main(["plan", "digits", "--out", str(tmp_path / "run"), *given]) == 2
    said = capsys.readouterr().err.strip()
    assert "data.store " in said and "s3cret" not in said and "\n" not in said
    with pytest.raises(ConfigError, match="^data.store "):
        ObjectStore(url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url",
    ["s3://bucket", "s3://my.bucket-1/a/set/", "gs://bucket/set", "az://container/set", "https://host:8443/a%20b/set",
     "abfs://container@account.dfs.core.windows.net/set", "http://[fe80:0:0:0:0:0:0:1]:80/x", "http://127.0.0.1/..x/y",
     "file:///data/set", "s3://bucket/user@example"],
)  # fmt: skip
def test_urls_that_are_taken(url):
    assert url_problem(url) is None


def test_settings_that_belong_together(tmp_path):
    def problems(**data) -> list[str]:
        return cross_checks(dataclasses.replace(RunConfig(), data=DataConfig(**data)))

    assert problems(store="s3://bucket/set", shards="x", store_cache="y") == []
    assert problems(store="s3://bucket/set") == [
        "data.store needs data.shards, the local folder that holds the manifest"
    ]
    assert problems(store_cache="y") == ["data.store_cache is set without data.store; set both or neither"]
    assert len(problems(store="s3://bucket/set", shards="x", store_cache="y\n")) == 1


def test_a_driver_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(stores.importlib.util, "find_spec", lambda name: None)
    for scheme, package in DRIVERS.items():
        if package is None:
            ObjectStore("file:///data/set")
            continue
        with pytest.raises(ConfigError, match=f"package {package}, which is not installed; .*pip install {package}`"):
            ObjectStore(f"{scheme}://place/set")


# -- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["http", "s3", "file"])
def test_the_bytes_are_those_of_the_local_shards(local, tmp_path, objects, request, monkeypatch, scheme):
    url = objects.as_uri()
    if scheme != "file":
        server = request.getfixturevalue("server")
        url = server.url if scheme == "http" else as_s3(server, monkeypatch)
    manifest = bare(local, tmp_path, url + "/")
    wanted = samples(manifest, "retain", "forget", "third_party")
    shuffled = [wanted[i] for i in np.random.default_rng(0).permutation(len(wanted))]
    reader, beside = Reader(manifest), Reader(local)
    assert reader.read(shuffled) == [read_sample(local, s.id) for s in shuffled] == beside.read(shuffled)
    assert reader.counts == beside.counts and reader.counts.bytes > 10_000
    assert reader.read([]) == []
    name = wanted[0].shard
    (objects / name).write_bytes(bytes(len((objects / name).read_bytes())))  # control: these objects are what is read
    with pytest.raises(DataError, match="sha256 of the manifest; put the shard there"):
        reader.read([wanted[0]])


def test_a_hundredth_of_the_images_costs_a_hundredth_of_the_traffic(tmp_path):
    """As the server counts it, headers and requests for sizes aside."""
    pytest.importorskip("aiohttp")
    local = pictures(tmp_path / "shards", retain=792, forget=8, third_party=0, per_shard=100)
    with serving(tmp_path / "shards") as server:
        manifest = bare(local, tmp_path, server.url)
        images = store(manifest, cache_mib=1)
        assert images.load("forget")
        members = sum(s.bytes for name, s in manifest.shard_files.items() if name.startswith("members"))
        assert 0 < sum(server.sent.values()) <= 0.015 * members
        assert images.pool.counts.bytes == sum(server.sent.values()) and images.pool.counts.images == 8
        gets = [name for method, name, _ in server.asked if method == "GET"]
        heads = [name for method, name, _ in server.asked if method == "HEAD"]
        assert len(gets) == images.pool.counts.reads <= 8 and sorted(heads) == sorted(set(gets))
        images.load("retain")
        assert sum(server.sent.values()) > 0.5 * members  # control: the count does count


def test_requests_of_a_piece_are_under_way_together(remote, server):
    """Two that wait for each other: the first answer comes only when the second request is there."""
    wanted = samples(remote, "retain")
    first, other = wanted[0], next(s for s in wanted if s.shard != wanted[0].shard)
    server.plan(first.shard, "hang")
    began = server.asked.append

    class Asked(list):
        def append(self, entry):
            began(entry)
            if entry[:2] == ("GET", other.shard):
                server.release.set()

    server.asked = Asked()
    reader = Reader(remote)
    assert reader.read([first, other]) == [read_sample_at(server, s) for s in (first, other)]
    assert server.fired["hang"] == 1 and reader.counts.repeated == 0


def read_sample_at(server: ObjectServer, sample: Sample) -> bytes:
    return (server.folder / sample.shard).read_bytes()[sample.offset :][: sample.length]


def as_s3(server: ObjectServer, monkeypatch) -> str:
    """Have the S3 driver, where it is installed, take this server for its endpoint; a URL that no other test has."""
    pytest.importorskip("s3fs")
    for name, value in (("AWS_ENDPOINT_URL", server.url.removesuffix("/bucket/set")), ("AWS_REGION", "us-east-1"),
                        ("AWS_ACCESS_KEY_ID", "none"), ("AWS_SECRET_ACCESS_KEY", "none")):  # fmt: skip
        monkeypatch.setenv(name, value)
    return f"s3://bucket/set/{server.server_port}"


# -- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults", [("503", "503"), ("drop", "drop"), ("truncate", "500"), ("short",), ("503", "drop", "truncate", "short")]
)
def test_what_fails_for_a_moment_is_asked_for_again(remote, server, waits, faults):
    first, *others = samples(remote, "forget", "retain")
    server.plan(first.shard, *faults)
    reader = Reader(remote)
    found = reader.read([first, *others])
    assert found == [read_sample_at(server, s) for s in (first, *others)]
    assert sum(server.fired.values()) == len(faults) and set(server.fired) == set(faults)  # every fault was met
    assert waits == [0.25 * 2**n for n in range(len(waits))] and 1 <= len(waits) <= len(faults)
    # Where a connection that was kept open turns out to be gone, aiohttp itself asks once more.
    assert len(faults) - faults.count("drop") <= reader.counts.repeated <= len(faults)
    whole = [run for method, run, status in server.asked if method == "GET" and status == "206"]
    assert len(whole) < 2 * len({s.shard for s in others}) + 4 * len(faults)  # what had come is not asked for again


def test_a_store_that_fails_for_good_ends_the_run(remote, server, waits):
    wanted = samples(remote, "forget")[:1]
    server.plan(wanted[0].shard, *["503"] * 50)
    with pytest.raises(DataError, match=f"image '{wanted[0].id}' could not be read 3 times from http.*HTTP status 503"):
        Reader(remote, retries=2).read(wanted)
    assert server.fired["503"] == 3 and waits == [0.25, 0.5]
    with pytest.raises(DataError, match="could not be read from"):
        Reader(remote, retries=0).read(wanted)
    assert server.fired["503"] == 4


def test_a_store_that_is_gone_is_told(local, tmp_path, objects, waits):
    pytest.importorskip("aiohttp")
    with serving(objects) as server:
        manifest = bare(local, tmp_path, server.url)
    with pytest.raises(DataError, match="could not be read 3 times .*check the network"):
        Reader(manifest, retries=2).read(samples(manifest, "forget"))
    assert waits == [0.25, 0.5]


def test_a_store_that_does_not_answer_is_not_waited_for(remote, server, waits, monkeypatch):
    monkeypatch.setattr(stores, "TIMEOUT", 0.3)
    wanted = samples(remote, "forget")[:1]
    server.plan(wanted[0].shard, "hang", "hang")
    began = time.monotonic()
    with pytest.raises(DataError, match=r"2 times .*\(no answer in time\)"):
        Reader(remote, retries=1).read(wanted)
    assert time.monotonic() - began < 20 and server.fired["hang"] == 2
    server.plan(wanted[0].shard, "hang")
    assert Reader(remote, retries=1).read(wanted) == [read_sample_at(server, wanted[0])]


@pytest.mark.parametrize(
    ("fault", "told"), [("404", "is missing from http"), ("403", "may not be read .*HTTP status 403")]
)
def test_what_cannot_pass_is_refused_at_once(remote, server, waits, fault, told):
    wanted = samples(remote, "forget")[:1]
    server.plan(wanted[0].shard, fault)
    with pytest.raises(DataError, match=f"{wanted[0].shard} {told}"):
        Reader(remote).read(wanted)
    assert server.fired[fault] == 1 and waits == []


def _error(name: str, base: type = Exception, cause: BaseException | None = None, **facts) -> BaseException:
    """An error of a driver that may not be installed: what counts is its name and what it states."""
    error = type(name, (base,), facts)()
    error.__cause__ = cause
    return error


def _boto(status: int) -> BaseException:
    return _error("ClientError", response={"ResponseMetadata": {"HTTPStatusCode": status}})


def test_errors_of_all_drivers_are_told_apart():
    passing = [
        _boto(503), _boto(429), _error("HttpError", code=502), _error("HttpResponseError", status_code=500),
        _error("ServiceRequestError"), FSTimeoutError(), ConnectionResetError(), OSError(errno.EBUSY, "slow down"),
        _error("ReadTimeout", type("HTTPClientError", (Exception,), {})),
        _error("X", FileNotFoundError, _error("ClientResponseError", status=503)),  # as the HTTP driver tells it
        _error("RequestTimeout", TimeoutError, _boto(400)),  # S3 says so with this status
        _error("ClientPayloadError", cause=_error("ContentLengthError", code=400)),  # a code that is no status
    ]  # fmt: skip
    final = [
        _boto(403), _boto(404), _error("HttpError", code="401"), _error("HttpResponseError", status_code=404),
        FileNotFoundError("x"), PermissionError(errno.EACCES, "no"), ValueError("no"), _error("NoCredentialsError"),
        _error("ClientConnectorCertificateError", type("ClientSSLError", (ConnectionError,), {})),
        _error("Y", OSError, _boto(416)),
    ]  # fmt: skip
    assert [is_transient(error) for error in passing] == [True] * len(passing)
    assert [is_transient(error) for error in final] == [False] * len(final)
    signed = reason(ValueError("no https://host/x?X-Amz-Signature=s3cret&y here\n"))
    assert "s3cret" not in signed and "\n" not in signed and signed.startswith("no https://host/x?...")


def test_failures_reach_the_run_from_its_workers(remote, server):
    server.plan(remote.shards()[0], *["403"] * 9)
    for workers in (0, 2):
        with pytest.raises(DataError, match=f"^The shard {remote.shards()[0]} may not be read from http"):
            batches(remote, workers)
    assert server.fired["403"] >= 2


def test_a_missing_object_is_named_by_the_check_of_sizes(remote, server, waits, objects):
    name = remote.shards()[1]
    (objects / name).unlink()
    for check in (lambda: verify_objects(remote, deep=False), lambda: Reader(remote).read(remote.in_shard(name))):
        with pytest.raises(DataError, match=f"{name} is missing from {server.url}"):
            check()
    assert waits == []


def test_a_server_that_is_busy_when_asked_for_a_size_is_asked_again(remote, server, waits, monkeypatch):
    """The HTTP driver calls every failure of that request a missing file."""
    heads = []

    def busy(handler):
        heads.append(handler.path)
        return handler._send("HEAD", handler.path, 503, b"") if len(heads) <= 2 else handler._answer("HEAD")

    monkeypatch.setattr(server.RequestHandlerClass, "do_HEAD", busy)
    name = remote.shards()[0]
    server.plan(name, "503", "503")  # after HEAD the driver tries GET
    assert ObjectStore(server.url).sizes([name], Counts()) == [remote.shard_files[name].bytes]
    assert len(heads) == 3 and server.fired["503"] == 2 and waits == [0.25, 0.5]


def test_a_server_without_ranges_is_refused(remote, server, waits):
    wanted = samples(remote, "forget")[:1]
    server.plan(wanted[0].shard, "whole")
    with pytest.raises(DataError, match="more of .* than the range .* serves ranges"):
        Reader(remote).read(wanted)
    assert server.fired["whole"] == 1 and waits == []


def test_an_object_that_is_replaced(remote, server, objects, waits):
    """By a shorter one, a longer one, and one of other bytes: before it is opened and while it is read."""
    shard = remote.shards()[0]
    first, *_, last = remote.in_shard(shard)
    content = (objects / shard).read_bytes()
    reader = Reader(remote)
    reader.read([first])
    for cut in (last.offset + 3, last.offset - 600):  # within the image that is asked for, and before it (HTTP 416)
        (objects / shard).write_bytes(content[:cut])
        with pytest.raises(DataError, match=f"ends at byte {cut}, within image '{last.id}' or after"):
            reader.read([last])
    for other in (content[:-512], content + bytes(512)):
        (objects / shard).write_bytes(other)
        with pytest.raises(DataError, match=f"{shard} .* has {len(other)} bytes; expected {len(content)}"):
            Reader(remote).read([first])
        with pytest.raises(DataError, match=f"has {len(other)} bytes"):
            verify_objects(remote, deep=False)
    damaged = bytearray(content)
    damaged[first.offset + 20] ^= 1
    (objects / shard).write_bytes(damaged)
    verify_objects(remote, deep=False)
    with pytest.raises(DataError, match=f"{shard} .* does not have the sha256 of the manifest"):
        verify_objects(remote, deep=True)
    for reads in (reader, Reader(remote)):
        with pytest.raises(DataError, match=f"'{first.id}' .* sha256"):
            reads.read([first])
    (objects / shard).write_bytes(content)
    verify_objects(remote, deep=True)
    assert waits == [] and reader.read([first]) == [content[first.offset :][: first.length]]


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
    own, real = os.getpid(), stores._file_system
    monkeypatch.setattr(stores, "_file_system", lambda url, pid: real(url, own))
    with pytest.raises(DataError, match="fork"):  # control: the parent's file system does not do
        batches(manifest, 1)


def batches(manifest: Manifest, workers: int) -> list:
    images = store(manifest, workers=workers)
    feeds = feeder(images, roles=("retain", "forget"))
    try:
        found = [feeds.batch_at(step) for step in range(8)]
    finally:
        feeds.close()
        images.close()
    assert images.pool.counts.images >= 64
    return [(batch.ids, batch.images.numpy().tobytes()) for batch in found]


WATCHED = """
import pickle, sys
from distunlearn.data.manifest import Manifest
from distunlearn.data.reading import Reader
from distunlearn.data.stores import Remote
from distunlearn.data.store_cache import verify_objects
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


# -- an index ------------------------------------------------------------------------------------------------------

ALL = DataConfig(source="webdataset", members=0, forget=6, holdout=6, calibration=4, third_party=4, third_party_audit=4)


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_an_index_of_a_store_is_that_of_the_local_shards(tmp_path, scheme):
    img2dataset(tmp_path / "there")
    here, expected = tmp_path / "here", tmp_path / "local"
    here.mkdir()
    shutil.copytree(tmp_path / "there", expected)
    if scheme == "http":
        pytest.importorskip("aiohttp")
    with serving(tmp_path / "there") as server:
        url = server.url if scheme == "http" else (tmp_path / "there").as_uri()
        for workers in (1, 2):
            manifest = index_shards(dataclasses.replace(ALL, store=url, prepare_workers=workers), 0, here)
        assert manifest.fingerprint == index_shards(ALL, 0, expected).fingerprint
        assert sorted(path.name for path in here.iterdir()) == ["manifest.jsonl", "summary.json"]
        assert (here / "summary.json").read_bytes() == (expected / "summary.json").read_bytes()
        verify_objects(manifest, deep=True)
        wanted = samples(manifest, "forget")
        assert Reader(manifest).read(wanted) == [read_sample(Manifest.load(expected), s.id) for s in wanted]
        (tmp_path / "there" / "00001.tar").write_bytes(b"no tar" * 1000)
        with pytest.raises(DataError, match="^00001.tar"):
            index_shards(dataclasses.replace(ALL, store=url), 0, here)
        for path in (tmp_path / "there").glob("*.tar"):
            path.unlink()
        with pytest.raises(DataError, match="lists no .tar files"):
            index_shards(dataclasses.replace(ALL, store=url), 0, here)
    assert not (here / ".index.partial").exists()


def test_an_index_that_was_interrupted_goes_on(tmp_path):
    pytest.importorskip("aiohttp")
    img2dataset(tmp_path / "there")
    here = tmp_path / "here"
    here.mkdir()

    def interrupt(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with serving(tmp_path / "there") as server:
        cfg = dataclasses.replace(ALL, store=server.url, prepare_workers=1)
        first, second = server.folder / "00000.tar", server.folder / "00001.tar"
        with pytest.raises(KeyboardInterrupt):
            index_shards(cfg, 0, here, interrupt)
        assert server.sent[first.name] == first.stat().st_size and not server.sent[second.name]
        assert not list(here.rglob("*.tar"))
        with pytest.raises(KeyboardInterrupt):  # what was read is known, unless the object is another now
            index_shards(cfg, 0, here, interrupt)
        assert server.sent[first.name] == first.stat().st_size
        first.write_bytes(first.read_bytes() + bytes(512))
        index_shards(cfg, 0, here)
        assert server.sent[first.name] == 2 * first.stat().st_size - 512
        assert server.sent[second.name] == second.stat().st_size


# -- the verbs -----------------------------------------------------------------------------------------------------


def prepared(tmp_path: Path) -> tuple[Path, Path]:
    """(local folder with the manifest alone, folder of its shards) of a tiny run."""
    folder, objects = tmp_path / "shards", tmp_path / "bucket"
    assert main(["prepare", "digits", "--out", str(tmp_path / "x"), *tiny.settings(f"data.shards={folder}")]) == 0
    objects.mkdir()
    for path in folder.glob("*.tar"):
        path.rename(objects / path.name)
    return folder, objects


def test_verbs_look_for_the_shards_where_they_are(tmp_path, capsys):
    folder, objects = prepared(tmp_path)
    there = tiny.settings(f"data.shards={folder}", f"data.store={objects.as_uri()}")
    out = tmp_path / "run"
    assert main(["plan", "digits", "--out", str(out), *there]) == 0
    assert main(["prepare", "digits", "--out", str(out), *there]) == 0
    capsys.readouterr()
    assert main(["plan", "digits", "--out", str(out), *tiny.settings(f"data.shards={folder}")]) == 3  # control
    assert "missing from" in capsys.readouterr().err
    out.mkdir()
    save_config(load_config("digits", None, there[1::2]), out / "run.yaml")
    pipeline._refuse_other_settings(load_config("digits", None, [*tiny.TINY]), out)  # shards may move, a seed may not
    with pytest.raises(ConfigError, match="seed: 0 there, 1 now"):
        pipeline._refuse_other_settings(load_config("digits", None, [*tiny.TINY, "seed=1"]), out)
    assert main(["purge", str(out), "--apply"]) == 2
    assert f"lie in {objects.as_uri()}, and only local shards can be purged" in capsys.readouterr().err
    reusing = load_config("digits", None, [*tiny.TINY, f"reuse={out}"])  # its shards, so its store too
    assert shards_remote(reusing).url == objects.as_uri() and find_manifest(reusing, tmp_path).remote is not None
    victim = sorted(objects.iterdir())[2]
    content = victim.read_bytes()
    for spoilt, told in ((content[:-512], "bytes; expected"), (content[:-1] + b"x", "does not have the sha256")):
        victim.write_bytes(spoilt)
        pipeline._VERIFIED.clear()
        assert main(["plan", "digits", "--out", str(out), *there]) == 3
        assert victim.name in (said := capsys.readouterr().err) and told in said
    for path in folder.iterdir():
        path.unlink()
    assert main(["prepare", "digits", "--out", str(out), *there]) == 3
    assert "holds no manifest of the shards in file:///" in capsys.readouterr().err and not any(folder.iterdir())


@pytest.mark.slow
def test_a_run_through_a_store_is_the_run_on_local_shards(tmp_path):
    """Training, audit and a run that is done again, to the bit; the streams go through two workers."""
    pytest.importorskip("aiohttp")
    folder, objects = prepared(tmp_path)
    streamed = ("data.cache_mib=0", "data.workers=2", f"data.shards={folder}")
    with serving(objects) as server:
        out = tmp_path / "remote"
        done = tiny.run(out, *streamed, f"data.store={server.url}")
        assert done.returncode in (0, 6, 7) and "Traceback" not in done.stderr, done.stderr
        assert sum(server.sent.values()) > 2 * sum(path.stat().st_size for path in objects.iterdir())
        victim = sorted(objects.iterdir())[0]
        content = victim.read_bytes()
        victim.write_bytes(content[:-1] + b"x")
        again = tiny.run(out, *streamed, f"data.store={server.url}")
        assert again.returncode == 3 and "does not have the sha256 of the manifest" in again.stderr
        victim.write_bytes(content)
    for path in objects.iterdir():
        path.rename(folder / path.name)
    local = tiny.run(tmp_path / "local", *streamed)
    assert local.returncode == done.returncode, local.stderr
    for name in ("original", ".", "retrained"):
        there, here = (json.loads((tmp_path / run / name / "done.json").read_text()) for run in ("remote", "local"))
        assert there["state_sha256"] == here["state_sha256"], name
    there, here = (json.loads((tmp_path / run / "audit/summary.json").read_text()) for run in ("remote", "local"))
    assert there["gates"] == here["gates"]


@pytest.mark.slow
def test_ranks_share_a_cache(tmp_path):
    """Two ranks with a worker each fetch every shard once, and train what they train without a cache."""
    pytest.importorskip("aiohttp")
    folder, objects = prepared(tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    digests = []
    for cache in ([], [f"data.store_cache={tmp_path / 'copies'}"]):
        with serving(objects) as server:
            out = tmp_path / f"run{len(cache)}"
            settings = ("backend=ddp", "data.cache_mib=0", "data.workers=1", f"data.shards={folder}", *cache)
            command = [*launcher, "-m", "distunlearn", "pretrain", "digits", "--out", str(out)]
            command += tiny.settings(*settings, f"data.store={server.url}")
            done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=tiny.environment())
            assert done.returncode == 0, done.stderr
        digests.append(json.loads((out / "original" / "done.json").read_text())["state_sha256"])
        sizes = {path.name: path.stat().st_size for path in objects.iterdir()}
        assert server.sent == sizes if cache else sum(server.sent.values()) > 2 * sum(sizes.values())
    assert digests[0] == digests[1]
