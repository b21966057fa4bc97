"""The readers on bytes that somebody made up: an answer or a sentence, soon, and in little memory.

By default a few inputs of every reader, always the same. The long run, which keeps what it finds in `.hypothesis`:

    FUZZ_EXAMPLES=20000 pytest -m matrix tests/faults/test_fuzz.py
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import tarfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile_tars import jpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from distunlearn.config.yaml import read_yaml
from distunlearn.data.manifest.ids import IdTable
from distunlearn.data.manifest.manifest import Manifest, Shard
from distunlearn.data.manifest.records import Sample
from distunlearn.data.prepare.forget_list import resolve_list
from distunlearn.data.sources.decode import decode_image
from distunlearn.data.sources.tar_index import read_tar
from distunlearn.encoders.checkpoint_file import read_checkpoint
from distunlearn.errors import ConfigError, DataError, DistunlearnError
from distunlearn.verify.ledger import coverage, effective_steps, read_ledger
from distunlearn.verify.records import read_record
from distunlearn.verify.scores import read_scores
from distunlearn.verify.states import read_tensors

SECONDS, BYTES = 10, 1 << 30
TABLE = IdTable.of([f"a/{number}.png" for number in range(20)])
TOKENS = [
    b"\n", b"\r\n", b"\x00", b"\xff\xfe", b"\xff\xda", b'"', b"{", b"[" * 300, b"9" * 5000, b"1e999", b"NaN", b"-1",
    b"null", b"../", b"\x1b[31m", b"PK\x03\x04", b"\x80\x02", b"ustar\x0000", b",", b"=cmd()", b"&a [*a, *a]", b": ",
]  # fmt: skip


def images() -> list[bytes]:
    found = [jpeg(1)]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    for kind, more in (("PNG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {}), ("TIFF", {"compression": "tiff_lzw"}),
                       ("JPEG", {"progressive": True})):  # fmt: skip
        buffer = io.BytesIO()
        picture.save(buffer, kind, **more)
        found.append(buffer.getvalue())
    return found


def tar(form: int, long: int = 120) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in (
            ("x" * long + "ä.jpg", jpeg(2)),
            ("b.json", b'{"id": "b"}'),
            ("b.png", b"x"),
            ("b.cls", b"1"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def weights(**options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"a.weight": torch.ones(2, 3), "b": torch.zeros(1)}, "epoch": 3}, buffer, **options)
    return buffer.getvalue()


LINES = [
    {"event": "code", "version": "1", "digest": "d"}, {"event": "start", "phase": "unlearn", "step": 0, "attempt": 1},
    {"event": "step", "phase": "unlearn", "step": 0, "count": {"forget": 1}, "forget": ["a"]},
    {"event": "done", "phase": "unlearn", "step": 1},
]  # fmt: skip


def chained(lines: list[dict]) -> bytes:
    """The bytes of a ledger of these lines."""
    found: list[bytes] = []
    for number, line in enumerate(lines):
        before = hashlib.sha256(found[-1]).hexdigest() if found else None
        found.append(json.dumps({"n": number, "prev": before, **line}).encode())
    return b"".join(line + b"\n" for line in found)


SCORES = {
    "encoder": "original",
    "state": "s",
    "signs": {"x": 1},
    "samples": {"a": {"role": "forget", "label": 1, "x": 0.5}},
}


def manifest_files(folder: Path) -> dict[str, bytes]:
    sample = Sample("a", "members-000000.tar", 512, 10, "0" * 64, "retain", 1)
    made = Manifest(folder, [sample], {"members-000000.tar": Shard(2048, "1" * 64, 1)}, {})
    made.save(folder)
    made.save_request(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def of_ledger(path: Path) -> None:
    lines = read_ledger(path)
    effective_steps(lines, "unlearn")
    coverage(lines, ["a", "b"])


def of_image(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, of metadata
        decode_image(path.read_bytes(), "x", 10**6, 3)


# reader -> (name of the file, contents to begin with, what reads it)
READERS: dict[str, tuple[str, list[bytes], Callable[[Path], object]]] = {
    "record": ("done.json", [b'{"phase": "x", "steps": 1}'], lambda path: read_record(path, {"steps": int})),
    "ledger": ("ledger.jsonl", [chained(LINES)], of_ledger),
    "scores": ("scores-original.json", [json.dumps(SCORES).encode()], lambda path: read_scores(path.parent)),
    "lines": ("list.txt", [b"a/1.png\na/2.png\n", "a/1.png\n".encode("utf-16")], lambda p: resolve_list(p, TABLE)),
    "csv": ("list.csv", [b"id,role\na/1.png,forget\n", b'"a/1.png";2\n'], lambda path: resolve_list(path, TABLE)),
    "jsonl": ("list.jsonl", [b'{"id": "a/1.png"}\n'], lambda path: resolve_list(path, TABLE)),
    "settings": ("run.yaml", [b"seed: 3\ndata: {forget: 2, roots: [a, b]}\n"], read_yaml),
    "tar": ("a.tar", [tar(tarfile.PAX_FORMAT), tar(tarfile.GNU_FORMAT), tar(tarfile.USTAR_FORMAT, 60)], read_tar),
    "image": ("a.img", images(), of_image),
    "safetensors": ("a.safetensors", [save({"a": torch.ones(2), "b": torch.zeros(3, 1)})], read_checkpoint),
    "states": ("b.safetensors", [save({"a": torch.ones(2), "b": torch.zeros(3, 1)})], read_tensors),
    "weights": ("a.pth", [weights(), weights(_use_new_zipfile_serialization=False)], read_checkpoint),
}  # fmt: skip


@st.composite
def broken(draw: st.DrawFn, contents: list[bytes]) -> bytes:
    """One of the contents with a few changes, or bytes at random."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=600))
    data = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "cut", "insert", "repeat", "remove"])):
            case "flip" if at < len(data):
                data[at] = draw(st.integers(0, 255))
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.sampled_from(TOKENS) | st.binary(max_size=12))
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 600))] * draw(st.integers(1, 40))
            case _:
                del data[at : at + draw(st.integers(1, 600))]
    return bytes(data)


def read(path: Path, data: bytes, reader: Callable[[Path], object]) -> None:
    """An answer or a sentence. Seconds are of the processor, for which long runs wait; hangs are the deadline's."""
    path.write_bytes(data)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        reader(path)
    except (DataError, ConfigError) as error:
        assert isinstance(error, DistunlearnError) and str(error) and "\n" not in str(error), error
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < BYTES, f"{grown} bytes for a file of {len(data)}"
    assert time.process_time() - began < SECONDS, f"{time.process_time() - began} s for a file of {len(data)}"


COMMON = {"suppress_health_check": list(HealthCheck)}
SHORT = settings(max_examples=60, derandomize=True, database=None, deadline=1000 * SECONDS, **COMMON)
LONG = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "5000")), print_blob=True, deadline=12_000 * SECONDS, **COMMON
)


def fuzz(kind: str, folder: Path, how: settings) -> None:
    name, contents, reader = READERS[kind]

    @how
    @given(broken(contents))
    def run(data: bytes) -> None:
        read(folder / name, data, reader)

    run()


def fuzz_manifest(folder: Path, how: settings) -> None:
    files = manifest_files(folder)

    @how
    @given(st.sampled_from(sorted(files)), st.data())
    def run(name: str, data: st.DataObject) -> None:
        for other, content in files.items():
            (folder / other).write_bytes(content)
        read(folder / name, data.draw(broken([files[name]])), lambda path: Manifest.load(path.parent, run=path.parent))

    run()


@pytest.mark.parametrize("kind", [*READERS, "manifest"])
def test_made_up_bytes_are_answered_or_refused_in_a_sentence(tmp_path, kind):
    fuzz_manifest(tmp_path, SHORT) if kind == "manifest" else fuzz(kind, tmp_path, SHORT)


@pytest.mark.matrix
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", [*READERS, "manifest"])
def test_many_made_up_bytes(tmp_path, kind):
    fuzz_manifest(tmp_path, LONG) if kind == "manifest" else fuzz(kind, tmp_path, LONG)


@pytest.mark.parametrize("kind", READERS)
def test_the_contents_to_begin_with_are_good(tmp_path, kind):
    """Control: what is refused is refused for the change."""
    name, contents, reader = READERS[kind]
    for content in contents:
        (tmp_path / name).write_bytes(content)
        reader(tmp_path / name)
