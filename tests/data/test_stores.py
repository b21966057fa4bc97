"""Shards in an object store: the same bytes as from a disk, little traffic, and every failure a sentence."""

from __future__ import annotations

import dataclasses
import errno
import time

import numpy as np
import pytest
from fsspec.exceptions import FSTimeoutError
from object_server import as_s3, bare, batches, read_sample_at, samples, serving
from pictures import pictures, store

from distunlearn.cli.main import main
from distunlearn.common.store_url import DRIVERS, url_problem
from distunlearn.config.checks import cross_checks
from distunlearn.config.schema import DataConfig, RunConfig
from distunlearn.data.loading.shard_reader import Reader
from distunlearn.data.loading.verify import read_sample
from distunlearn.data.storage import object_store
from distunlearn.data.storage.object_store import ObjectStore
from distunlearn.data.storage.object_store_cache import verify_objects
from distunlearn.data.storage.retry import Counts, is_transient, reason
from distunlearn.errors import ConfigError, DataError

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
    monkeypatch.setattr(object_store, "_file_system", None)
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
    monkeypatch.setattr(object_store.importlib.util, "find_spec", lambda name: None)
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
    local = pictures(tmp_path / "shards", retain=792, forget=8, third_party=0, per_shard=100)
    with serving(tmp_path / "shards") as server:
        manifest = bare(local, tmp_path, server.url)
        images = store(manifest, cache_mib=1)
        images.plain(local.ids("forget"))
        members = sum(s.bytes for name, s in manifest.shard_files.items() if name.startswith("members"))
        assert 0 < sum(server.sent.values()) <= 0.015 * members
        assert images.counts.bytes == sum(server.sent.values()) and images.counts.images == 8
        gets = [name for method, name, _ in server.asked if method == "GET"]
        heads = [name for method, name, _ in server.asked if method == "HEAD"]
        assert len(gets) == images.counts.reads <= 8 and sorted(heads) == sorted(set(gets))
        images.plain(local.ids("retain"))
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
    with serving(objects) as server:
        manifest = bare(local, tmp_path, server.url)
    with pytest.raises(DataError, match="could not be read 3 times .*check the network"):
        Reader(manifest, retries=2).read(samples(manifest, "forget"))
    assert waits == [0.25, 0.5]


def test_a_store_that_does_not_answer_is_not_waited_for(remote, server, waits, monkeypatch):
    monkeypatch.setattr(object_store, "TIMEOUT", 0.3)
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
    short = f"5 times from .*[(]3 of {last.length} bytes came[)]; put the shard there"
    for cut, told in (
        (3, short),
        (-600, "from .*HTTP status 416[)]; put the shard there"),
    ):  # within the image, before it
        (objects / shard).write_bytes(content[: last.offset + cut])
        with pytest.raises(DataError, match=f"{shard} with image '{last.id}' could not be read {told}"):
            reader.read([last])
    assert waits == [0.25, 0.5, 1.0, 2.0]  # an answer that is cut off looks like a shard that ends there
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
    assert len(waits) == 4 and reader.read([first]) == [content[first.offset :][: first.length]]
