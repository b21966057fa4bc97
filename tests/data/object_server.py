"""A local HTTP server of a folder, with ranges, that counts what it sends and fails where a test wants it to."""

from __future__ import annotations

import re
import socket
import threading
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pictures import feeder, store

from distunlearn.data.manifest.manifest import Manifest, Sample
from distunlearn.data.manifest.records import Remote

FAULTS = ("503", "500", "403", "404", "drop", "truncate", "short", "whole", "hang")


class ObjectServer(ThreadingHTTPServer):
    """faults: for each object, what the next GETs meet, in order. fired: faults that were met. asked: requests as
    (method, object, status or fault). sent: bytes of bodies, by object. url: of the folder."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}/bucket/set"
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.fired: Counter[str] = Counter()
        self.asked: list[tuple[str, str, str]] = []
        self.sent: Counter[str] = Counter()
        self.release = threading.Event()
        self.lock = threading.Lock()
        self._connections: list[socket.socket] = []

    def get_request(self):
        request, address = super().get_request()
        self._connections.append(request)
        return request, address

    def handle_error(self, request, client_address) -> None:
        """Clients that go away are none of a test's business."""

    def plan(self, name: str, *faults: str) -> None:
        assert set(faults) <= set(FAULTS), faults
        self.faults[name] += faults

    def stop(self) -> None:
        self.release.set()
        self.shutdown()
        self.server_close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ObjectServer

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def _answer(self, method: str) -> None:
        name = self.path.rsplit("/", 1)[-1]
        with self.server.lock:
            planned = self.server.faults[name]
            fault = planned.pop(0) if planned and method == "GET" else None
            if fault:
                self.server.fired[fault] += 1
        path = self.server.folder / name
        status = int(fault) if fault and fault.isdigit() else 200
        if self.path == "/bucket/set/":
            links = "".join(f'<a href="{each.name}">{each.name}</a>' for each in sorted(self.server.folder.iterdir()))
            return self._send(method, name, status, links.encode(), {"Content-Type": "text/html"})
        if status == 200 and not (self.path.startswith("/bucket/set/") and path.is_file()):
            status = 404
        if status != 200:
            return self._send(method, name, status, b"<html>an error page that is no image</html>")
        data = path.read_bytes()
        extra = {"ETag": f'"{zlib.crc32(data):08x}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and fault != "whole":
            start, stop = int(asked[1]), min(int(asked[2]) + 1, len(data))
            if start >= len(data):
                return self._send(method, name, 416, b"")
            extra["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data, status = data[start:stop], 206
        if fault == "hang":
            self.server.release.wait(60)
        if fault == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault == "short":
            data = data[: len(data) // 2]
        self._send(method, name, status, data, extra, cut=fault == "truncate")

    def _send(self, method: str, name: str, status: int, data: bytes, extra=None, cut: bool = False) -> None:
        with self.server.lock:
            self.server.asked.append((method, name, str(status)))
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for key, value in (extra or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if method == "HEAD":
            return
        if cut:
            data = data[: len(data) // 2]
        self.wfile.write(data)
        with self.server.lock:
            self.server.sent[name] += len(data)
        if cut:
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[ObjectServer]:
    """A server of this folder for as long as the block lasts."""
    server = ObjectServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(10)


def bare(local: Manifest, tmp_path: Path, url: str, **options) -> Manifest:
    """The manifest in a folder without shards, which lie at the URL."""
    folder = tmp_path / "manifest"
    folder.mkdir(exist_ok=True)
    local.save(folder)
    local.save_request(folder)
    assert not list(folder.glob("*.tar"))
    return Manifest.load(folder, Remote(url, **options), folder)


def samples(manifest: Manifest, *roles: str) -> list[Sample]:
    return [manifest.by_id[i] for i in manifest.ids(roles)]


def read_sample_at(server: ObjectServer, sample: Sample) -> bytes:
    return (server.folder / sample.shard).read_bytes()[sample.offset :][: sample.length]


def as_s3(server: ObjectServer, monkeypatch) -> str:
    """Have the S3 driver take this server for its endpoint; a URL that no other test has."""
    for name, value in (("AWS_ENDPOINT_URL", server.url.removesuffix("/bucket/set")), ("AWS_REGION", "us-east-1"),
                        ("AWS_ACCESS_KEY_ID", "none"), ("AWS_SECRET_ACCESS_KEY", "none")):  # fmt: skip
        monkeypatch.setenv(name, value)
    return f"s3://bucket/set/{server.server_port}"


def batches(manifest: Manifest, workers: int) -> list:
    images = store(manifest, workers=workers)
    feeds = feeder(images, roles=("retain", "forget"))
    try:
        found = [feeds.batch_at(step) for step in range(8)]
    finally:
        feeds.close()
        images.close()
    assert images.counts.images >= 64
    return [(batch.ids, batch.crops.numpy().tobytes()) for batch in found]
