"""Broken and hostile shards: refused by name with exit code 3 before anything is computed, and nothing of them is run.

Every test first shows that its fault is one: that a common reader would lose images, run something, or not notice.
"""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hostile_tars import heard, img2dataset, jpeg, link, sample, write_tar
from PIL import Image
from refused import TINY, folder_of, index, plan, refusal, sets

from distunlearn.cli.main import main
from distunlearn.common import files
from distunlearn.data.loading.verify import read_sample, verify_shards
from distunlearn.data.loading.webdataset_pipeline import webdataset
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.manifest.records import ROLES
from distunlearn.data.sources.decode import decode_image
from distunlearn.errors import DataError


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run directory with prepared shards, shared: take a copy."""
    out = tmp_path_factory.mktemp("made") / "run"
    assert main(["prepare", "digits", "--out", str(out), *sets(*TINY)]) == 0
    return out


@pytest.fixture
def run(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def victim(run: Path) -> Path:
    return run / "shards" / "members-000001.tar"


def count_silently(path: Path) -> int:
    """Images that Python's tarfile finds without an error."""
    with tarfile.open(path) as tar:
        return sum(member.name.endswith((".png", ".jpg")) for member in tar)


def test_what_is_whole_is_accepted(run, tmp_path, capsys):
    """Negative control of everything below, and the ear does hear."""
    assert main(plan(run)) == 0
    assert json.loads(capsys.readouterr().out)["roles"]["forget"] == 10
    img2dataset(tmp_path / "shards")
    with heard() as done:
        assert main(index(tmp_path / "shards")) == 0
    assert not done
    with heard() as done:
        subprocess.run(["true"], check=True)
        pickle.loads(pickle.dumps(Path("x")))
    assert {entry.split()[0] for entry in done} >= {"subprocess.Popen", "pickle.find_class"}


# -- shards against their manifest -----------------------------------------------------------------------------------


def broken_header(run: Path, number: int) -> int:
    """Break the header of one image in the middle of a shard; returns its place."""
    manifest = Manifest.of_run(run)
    start = manifest.in_shard(victim(run).name)[number].offset - tarfile.BLOCKSIZE
    content = bytearray(victim(run).read_bytes())
    content[start + 148 : start + 156] = b"garbage!"  # its checksum
    victim(run).write_bytes(content)
    return start


def test_s01_a_header_broken_in_mid_shard(run, capsys):
    """A reader that goes from header to header ends there and says nothing: most of the shard is lost."""
    start = broken_header(run, 7)
    assert count_silently(victim(run)) == 7  # the fault: 13 of 20 images are gone without an error
    message = refusal(capsys, plan(run), run)
    assert victim(run).name in message and f"byte {start}" in message
    assert "found: 7, expected: 20" in message


def test_s01_is_found_by_whoever_reads_the_shard_even_where_digests_are_not_asked_for(run):
    broken_header(run, 7)
    manifest = Manifest.of_run(run)
    verify_shards(manifest, deep=False)  # sizes are as they were
    with pytest.raises(DataError, match="members-000001.tar gave 7 samples; expected 20"):
        list(webdataset(manifest, ROLES))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[: len(data) // 2], "bytes; expected"),
        (lambda data: b"", "has 0 bytes"),
        (lambda data: (b"<html><body>404 not found</body></html>" + bytes(len(data)))[: len(data)], "sha256"),
        (None, "is missing"),
    ],
    ids=["truncated", "empty", "html", "missing"],
)
def test_s02_a_shard_that_is_not_whole(run, capsys, damage, words):
    data = victim(run).read_bytes()
    victim(run).unlink()
    if damage is not None:
        victim(run).write_bytes(damage(data))
    message = refusal(capsys, plan(run), run)
    assert victim(run).name in message and words in message


def test_s03_other_bytes_of_the_same_size_are_found_by_the_digest_of_the_image_too(run, capsys):
    manifest = Manifest.of_run(run)
    sample = manifest.in_shard(victim(run).name)[3]
    content = bytearray(victim(run).read_bytes())
    content[sample.offset + sample.length // 2] ^= 1
    victim(run).write_bytes(content)
    assert count_silently(victim(run)) == 20  # the fault: sizes and headers are right
    verify_shards(manifest, deep=False)
    with pytest.raises(DataError, match="does not have the sha256 of the manifest"):
        read_sample(manifest, sample.id)
    message = refusal(capsys, plan(run), run)
    assert victim(run).name in message and repr(sample.id) in message and f"byte {sample.offset}" in message


@pytest.mark.parametrize("fault", ["older manifest", "extra shard", "summary of another"])
def test_s04_a_manifest_that_is_not_of_these_shards(run, tmp_path, capsys, fault):
    other = tmp_path / "other"
    assert main(["prepare", "digits", "--out", str(other), *sets(*TINY, "seed=1")]) == 0
    if fault == "older manifest":
        for name in ("index.arrow", "summary.json"):
            shutil.copy(other / "shards" / name, run / "shards" / name)
        words = "to the images of another index"
    elif fault == "extra shard":
        shutil.copy(victim(other), run / "shards" / "members-000009.tar")
        words = "members-000009.tar"
    else:
        shutil.copy(other / "shards" / "summary.json", run / "shards" / "summary.json")
        words = "index.arrow does not have the sha256"
    message = refusal(capsys, plan(run), run)
    assert words in message and ("prepare again" in message or fault == "older manifest")


def test_a_disk_error_while_shards_are_verified_is_a_data_error(run, capsys, monkeypatch):
    """Not an internal error: the user can do something about the disk."""
    fired = []

    def bad(self: Path, **how):
        if self.suffix == ".tar":
            fired.append(self.name)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return stat(self, **how)

    stat = Path.stat
    monkeypatch.setattr(Path, "stat", bad)
    assert main(plan(run)) == 3
    assert fired and f"The shard {fired[0]} cannot be read (Input/output error)" in capsys.readouterr().err


def test_a_disk_error_while_a_shard_is_hashed_is_a_data_error(run, capsys, monkeypatch):
    class Bad(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            fired.append(size)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    fired: list[int | None] = []
    monkeypatch.setattr(files, "open_plain", lambda *how: Bad())
    assert main(plan(run)) == 3
    assert fired and "Input/output error" in capsys.readouterr().err


# -- shards of others ------------------------------------------------------------------------------------------------

FIRST = sample(0)
HOSTILE = {
    "member twice": ([*FIRST, ("000000000.jpg", jpeg(5))], "'000000000.jpg' is in it twice"),
    "sample in two places": ([*FIRST[:2], *sample(1), FIRST[2]], "'000000000.txt' lies apart"),
    "two images": ([*FIRST, ("000000000.png", b"x")], "'000000000' has 2 images"),
    "climbs": (sample(1, "../../etc/cron.d/x"), "absolute or climbs"),
    "absolute": (sample(1, "/etc/x"), "absolute or climbs"),
    "symbolic link": ([*FIRST, link("1.jpg", tarfile.SYMTYPE, "/etc/passwd")], "a symbolic link '1.jpg'"),
    "hard link": ([*FIRST, link("1.jpg", tarfile.LNKTYPE, "000000000.jpg")], "a hard link '1.jpg'"),
    "device": ([*FIRST, link("1.jpg", tarfile.CHRTYPE)], "a device '1.jpg'"),
    "pipe": ([*FIRST, link("1.jpg", tarfile.FIFOTYPE)], "a device '1.jpg'"),
    "sparse": ([*FIRST, link("1.jpg", tarfile.GNUTYPE_SPARSE)], "'1.jpg' is in it; expected plain files"),
    "claims 2 GB": ([*FIRST, link("1.jpg", tarfile.REGTYPE, size=2 << 30)], "claims 2147483648 bytes"),
    "claims more than there is": ([*FIRST, link("1.jpg", tarfile.REGTYPE, size=1 << 20)], "no whole tar file"),
    "class of many words": ([*FIRST, ("000000000.cls", b"cat" * 99)], "a class of 297 characters"),
    "json that is none": ([("1.jpg", jpeg(1)), ("1.json", b"{")], "not JSON"),
    "nothing": ([], "holds no sample"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_s05_s06_a_member_that_is_not_as_it_should_be(tmp_path, capsys, fault):
    parts, words = HOSTILE[fault]
    folder = tmp_path / "shards"
    img2dataset(folder, shards=1)
    write_tar(folder / "00009.tar", parts)
    message = refusal(capsys, index(folder), tmp_path)
    assert "00009.tar" in message and words in message
    message = refusal(
        capsys,
        ["prepare", "webdataset", "--out", str(tmp_path / "run"), *sets(*TINY, f"data.root={folder}")],
        tmp_path,
    ) if fault != "nothing" else message  # an empty shard among others gives nothing to prepare  # fmt: skip
    assert "00009.tar" in message and not (tmp_path / "run").exists()


def test_s05_one_key_in_two_shards(tmp_path, capsys):
    folder = tmp_path / "shards"
    paths = img2dataset(folder)
    write_tar(folder / "00002.tar", sample(7))
    with tarfile.open(paths[0]) as tar:
        assert "000000007.jpg" in tar.getnames()  # the fault
    write_tar(folder / "00003.tar", sample(99, "caf\u00e9"))
    write_tar(folder / "00004.tar", sample(98, "cafe\u0301"))  # one key in two Unicode forms
    assert main(index(folder)) == 0
    ids = {s.id: s.shard for s in Manifest.load(folder).samples}
    assert ids["00000/000000007"] == "00000.tar" and ids["00002/000000007"] == "00002.tar"
    assert ids["00003/caf\u00e9"] == "00003.tar" and ids["00004/cafe\u0301"] == "00004.tar"


@pytest.mark.parametrize("damage", ["header", "truncated", "gzip", "html", "empty"])
def test_s01_s02_a_broken_shard_of_others_is_never_indexed_in_part(tmp_path, capsys, damage):
    folder = tmp_path / "shards"
    path = img2dataset(folder)[1]
    data = bytearray(path.read_bytes())
    if damage == "header":
        with tarfile.open(path) as tar:
            start = tar.getmembers()[45].offset
        data[start + 148 : start + 156] = b"garbage!"
    broken = {"header": data, "truncated": data[:-9000], "gzip": gzip.compress(data), "html": b"<html>" * 99,
              "empty": b""}[damage]  # fmt: skip
    path.write_bytes(broken)
    if damage == "header":
        assert count_silently(path) == 15  # the fault: half of the images, no error
    message = refusal(capsys, index(folder), tmp_path)
    assert "00001.tar" in message
    if damage == "header":
        assert f"byte {start}" in message and "only 45 members" in message


@pytest.mark.parametrize("url", ["pipe:touch {marker}", "http://127.0.0.1:9/x.tar", "file:///etc/passwd", "s3://b/x"])
def test_s07_urls_and_commands_are_no_folders_and_no_shards(run, tmp_path, capsys, url):
    marker = tmp_path / "executed"
    url = url.format(marker=marker)
    message = refusal(capsys, index(url), tmp_path)
    assert url.split(":")[0] in message and not marker.exists()
    message = refusal(capsys, plan(run, "data.source=imagefolder", f"data.root={url}", f"data.shards={url}"), tmp_path)
    assert not marker.exists()
    summary = json.loads((run / "shards" / "summary.json").read_text())
    summary["shards"][f"{url}.tar"] = summary["shards"].pop("members-000001.tar")
    (run / "shards" / "summary.json").write_text(json.dumps(summary))
    message = refusal(capsys, plan(run), tmp_path)
    assert "not a plain file name ending in .tar" in message and not marker.exists()
    if url.startswith("pipe:"):
        subprocess.run(url.removeprefix("pipe:"), shell=True, check=True)
        assert marker.exists()  # the command does do something where it is run


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["pyd", "pkl", "pth", "pickle"])
def test_s08_pickles_among_the_parts_are_never_opened(tmp_path, kind):
    marker, folder = tmp_path / "executed", tmp_path / "shards"
    img2dataset(folder)
    bomb = pickle.dumps(_Touch(marker))
    parts = [p for k in range(5) for p in [*sample(70_000 + k), (f"{70_000 + k:09d}.{kind}", bomb)]]
    write_tar(folder / "00002.tar", parts)
    with heard() as done:
        assert main(index(folder)) == 0
        manifest = Manifest.load(folder)
        verify_shards(manifest, deep=True)
        for found in manifest.in_shard("00002.tar"):
            assert read_sample(manifest, found.id) == jpeg(int(found.id))
    assert not done and not marker.exists()
    assert len(manifest.in_shard("00002.tar")) == 5
    with heard() as done:
        pickle.loads(bomb)
    assert done and marker.exists()  # the payload does fire where a pickle is loaded carelessly


# -- images ----------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **how) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


PICTURE = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
BAD = {
    "truncated jpeg": jpeg(1)[:-200],
    "truncated png": encoded(PICTURE, "PNG")[:-30],
    "zero bytes": b"",
    "html": b"<html></html>",
    "truncated gif": encoded(PICTURE, "GIF")[:60],
    "truncated tiff": encoded(PICTURE, "TIFF")[:100],
    "icon": encoded(PICTURE, "ICO"),
    "pdf": b"%PDF-1.4\n%%EOF\n",
    "fits": b"SIMPLE  =                    T" + bytes(2850),
    "16-bit grey": encoded(Image.fromarray(np.arange(100, dtype=np.uint16).reshape(10, 10)), "PNG"),
    "10000 x 10000": encoded(Image.new("1", (10_000, 10_000)), "PNG"),
}


@pytest.mark.parametrize("fault", BAD)
def test_s09_s10_s11_an_image_that_cannot_be_used_is_named(tmp_path, capsys, fault):
    arguments = folder_of(tmp_path / "images", BAD[fault])
    message = refusal(capsys, arguments, tmp_path)
    assert "'class0/bad.jpg'" in message and not (tmp_path / "run").exists()


def test_s11_of_an_animation_the_first_frame_counts_and_profiles_do_not():
    from PIL import ImageCms

    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 10, 10), (10, 200, 10))]
    moving = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True, duration=50)
    assert getattr(Image.open(io.BytesIO(moving)), "n_frames", 1) == 2  # it does move
    assert decode_image(moving, "x", 100, 3).flatten(1).unique(dim=1).flatten().tolist() == [200, 10, 10]
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    with_profile = encoded(frames[0], "PNG", icc_profile=profile)
    assert Image.open(io.BytesIO(with_profile)).info["icc_profile"]
    assert decode_image(with_profile, "x", 100, 3).equal(decode_image(encoded(frames[0], "PNG"), "x", 100, 3))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
def test_s12_odd_shapes_are_prepared(tmp_path, size):
    arguments = folder_of(tmp_path / "images", encoded(Image.new("RGB", size, (9, 8, 7)), "PNG"))
    assert main(arguments) == 0
    manifest = Manifest.of_run(tmp_path / "run")
    assert Image.open(io.BytesIO(read_sample(manifest, "class0/bad.jpg"))).size == size


def test_s09_a_huge_claim_costs_no_memory(tmp_path):
    """60,000 x 60,000 pixels would be 10 GiB; the process that refuses them stays below half a GiB more."""
    header = bytearray(encoded(PICTURE, "PNG"))
    header[16:24] = (60_000).to_bytes(4, "big") * 2
    (tmp_path / "huge.png").write_bytes(header)
    code = (
        "import resource, sys\n"
        "from distunlearn.data.prepare.duplicates import perceptual_hash\n"
        "from distunlearn.data.sources.decode import decode_image\n"
        "from distunlearn.errors import DataError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "data, refused = open(sys.argv[1], 'rb').read(), 0\n"
        "for look in (lambda: decode_image(data, 'x', 10**8, 3), lambda: perceptual_hash(data, 'x', 10**8)):\n"
        "    try:\n        look()\n    except DataError as error:\n        refused += '60000' in str(error)\n"
        "print(refused, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "huge.png")], capture_output=True, text=True, timeout=120
    )
    refused, more = map(int, done.stdout.split())
    assert refused == 2 and more < 512 << 10, done.stderr  # KiB
