"""Tar shards as others write them, whole and broken, and an ear for what a process should never do."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

FORBIDDEN = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pickle.find_class",
    "socket.connect", "socket.getaddrinfo", "urllib.Request",
}  # fmt: skip
_heard: list[str] = []
_listening: list[bool] = []


def _hook(event: str, args: tuple) -> None:
    if _listening and event in FORBIDDEN:
        _heard.append(f"{event} {args!r:.200}")


@contextmanager
def heard() -> Iterator[list[str]]:
    """Names of forbidden things that were done inside: processes, sockets, classes looked up by a pickle."""
    if _hook not in _installed:
        sys.addaudithook(_hook)
        _installed.append(_hook)
    _heard.clear()
    _listening.append(True)
    try:
        yield _heard
    finally:
        _listening.clear()


_installed: list[object] = []


def jpeg(number: int, size: tuple[int, int] = (24, 20)) -> bytes:
    """A small photo-like image, another for every number."""
    blocks = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


Part = tuple[str, bytes] | tarfile.TarInfo


def sample(number: int, key: str | None = None) -> list[Part]:
    """The parts that img2dataset writes for one image."""
    key = key or f"{number:09d}"
    facts = json.dumps({"key": key, "caption": f"picture {number}", "status": "success", "width": 24}).encode()
    return [(f"{key}.jpg", jpeg(number)), (f"{key}.json", facts), (f"{key}.txt", f"picture {number}".encode())]


def write_tar(path: Path, parts: Sequence[Part]) -> Path:
    """An uncompressed archive of these members, in order."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for part in parts:
            if isinstance(part, tarfile.TarInfo):
                tar.addfile(part)
            else:
                member = tarfile.TarInfo(part[0])
                member.size = len(part[1])
                tar.addfile(member, io.BytesIO(part[1]))
    return path


def img2dataset(folder: Path, shards: int = 2, each: int = 30) -> list[Path]:
    """A folder of shards with `each` images each, and the side files of img2dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(shards):
        parts = [part for k in range(each) for part in sample(number * 10_000 + k)]
        paths.append(write_tar(folder / f"{number:05d}.tar", parts))
        (folder / f"{number:05d}_stats.json").write_text('{"count": 30}')
    return paths


def link(name: str, kind: bytes, target: str = "", size: int = 0) -> tarfile.TarInfo:
    """A member that is not a plain file."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, target, size
    return member
