"""Pipes, devices and files of hostile sizes, as images, lists, settings and shards."""

from __future__ import annotations

import io
import os
import tarfile
import time

import numpy as np
import pytest
from PIL import Image
from refused import TINY, refusal, sets

from distunlearn.cli.main import main
from distunlearn.data.sources.decode import decode_image
from distunlearn.data.sources.tar_index import MAX_EXTENDED, read_tar
from distunlearn.errors import DataError, UndecodableError


def scans(count: int) -> bytes:
    """A progressive JPEG of 400 x 400 with its last scan repeated."""
    buffer = io.BytesIO()
    Image.new("L", (400, 400), 7).save(buffer, "JPEG", progressive=True, quality=30)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + b"\xff\xd9"


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded():
    assert decode_image(scans(5), "x", 10**6, 1).shape == (1, 400, 400)  # control
    began = time.monotonic()
    with pytest.raises(UndecodableError, match="a JPEG of more than 100 scans"):
        decode_image(scans(3000), "x", 10**6, 1)
    assert time.monotonic() - began < 2
    # What follows the image, such as a film of a phone, is not a part of it.
    assert decode_image(scans(5) + b"\xff\xda" * 3000, "x", 10**6, 1).shape == (1, 400, 400)


@pytest.mark.parametrize("kind", ["pipe", "device", "scans"])
def test_special_files_among_images_neither_hang_nor_fill_the_memory(tmp_path, capsys, kind):
    """They are no images: counted among what is skipped, or refused by name."""
    root, generator = tmp_path / "images", np.random.default_rng(0)
    for number in range(60):
        path = root / f"c{number % 2}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    place = root / "c0" / "zz.jpg"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    else:
        place.write_bytes(scans(3000))
    arguments = [
        "prepare",
        "imagefolder",
        "--out",
        str(tmp_path / "run"),
        *sets(*TINY, "data.members=null", f"data.root={root}"),
    ]
    began = time.monotonic()
    if kind == "scans":
        assert "c0/zz.jpg" in refusal(capsys, arguments)
    else:
        assert main(arguments) == 0
        assert "1 special files" in capsys.readouterr().out
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("name", ["list.txt", "settings.yaml"])
def test_special_files_as_lists_and_settings_neither_hang_nor_fill_the_memory(tmp_path, capsys, kind, name):
    path = tmp_path / name
    {"pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"), "folder": path.mkdir}[kind]()
    given = ["--config", str(path)] if name.endswith("yaml") else sets(f"data.forget={path}")
    code = 2 if name.endswith("yaml") else 3
    assert name in refusal(capsys, ["plan", "digits", *sets(*TINY), *given], code=code)


@pytest.mark.parametrize("kind", ["x", "g", "L", "K"])
def test_an_extended_header_of_4_gib_is_refused_unread(tmp_path, kind):
    path = tmp_path / "a.tar"
    for size in (4 << 30, MAX_EXTENDED + 1):
        member = tarfile.TarInfo("x")
        member.type, member.size = kind.encode(), size
        with path.open("wb") as handle:
            handle.write(member.tobuf(tarfile.GNU_FORMAT))
            handle.truncate(512 + size + 1024)
        with pytest.raises(DataError, match=f"an extended header at byte 0 claims {size} bytes"):
            read_tar(path)


def test_a_name_of_many_kilobytes_is_read_as_before(tmp_path):
    name = "a/" * 2000 + "x.txt"
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo(name))
    assert read_tar(tmp_path / "a.tar") == []
