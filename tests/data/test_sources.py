from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from distunlearn.config.schema import DataConfig
from distunlearn.data.sources.sources import FASHION_MNIST_ROOT, open_source, open_sources
from distunlearn.errors import ConfigError, DataError

LIMIT = 1_000_000


def pixels(source, sample_id):
    data, kind = source.read(sample_id)
    assert kind == "png"
    return np.asarray(Image.open(io.BytesIO(data)))


def idx(array):
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def write_fashion(root, zipped=True, n=4):
    rng = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    images = {}
    for stem in ("train", "t10k"):
        images[stem] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        for name, array in (("images-idx3", images[stem]), ("labels-idx1", np.arange(n, dtype=np.uint8))):
            data = idx(array)
            path = root / f"{stem}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(data) if zipped else data)
    return images


def write_png(path, value=0, size=(5, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path, "PNG")


def test_digits_are_scaled_to_bytes():
    source = open_source("digits", None, LIMIT)
    digits = load_digits()
    assert len(source.samples) == 1797 and source.labels_known
    assert source.samples[123] == ("digits/000123", int(digits.target[123]))
    for i in (0, 123, 1796):
        assert np.array_equal(pixels(source, f"digits/{i:06d}"), np.rint(digits.images[i] * 255 / 16))
    assert source.read("digits/000005") == source.read("digits/000005")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
def test_fashion_mnist_layouts(tmp_path, zipped, below):
    images = write_fashion(tmp_path / below, zipped)
    source = open_source("fashion_mnist", str(tmp_path), LIMIT)
    assert [i for i, _ in source.samples][3:5] == ["fashion_mnist/train-000003", "fashion_mnist/test-000000"]
    assert [label for _, label in source.samples] == [0, 1, 2, 3] * 2
    assert np.array_equal(pixels(source, "fashion_mnist/train-000002"), images["train"][2])
    assert np.array_equal(pixels(source, "fashion_mnist/test-000001"), images["t10k"][1])


@pytest.mark.skipif(not os.path.isdir(FASHION_MNIST_ROOT), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian():
    source = open_source("fashion_mnist", None, LIMIT)
    assert len(source.samples) == 70_000 and pixels(source, "fashion_mnist/test-009999").shape == (28, 28)
    assert source.samples[0][1] == 9 and source.samples[60_000][1] == 9  # the published first labels


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: None, "is not in"),
        (lambda data: data[:7], "truncated or damaged"),
        (lambda data: data[:-1], "expected"),
        (lambda data: data + b"x", "expected"),
        (lambda data: b"\0\0\x08\x01" + data[4:], "0x00000801"),
        (lambda data: data[:4] + b"\xff" * 12, "claims"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, damage, message):
    write_fashion(tmp_path, zipped=False)
    path = tmp_path / "train-images-idx3-ubyte"
    data = damage(path.read_bytes())
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        open_source("fashion_mnist", str(tmp_path), LIMIT)


def test_truncated_gzip_and_unequal_counts_are_refused(tmp_path):
    write_fashion(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError, match="truncated or damaged"):
        open_source("fashion_mnist", str(tmp_path), LIMIT)
    path.write_bytes(gzip.compress(idx(np.zeros((3, 28, 28), dtype=np.uint8))))
    with pytest.raises(DataError, match="3 test images but 4 labels"):
        open_source("fashion_mnist", str(tmp_path), LIMIT)


def with_md5(monkeypatch, kind, folder, files):
    """Write files of torchvision's layout and declare their sums, so that its own integrity check runs on them."""
    folder.mkdir(parents=True)
    sums = {}
    for name, data in files.items():
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[name, sums[name]] for name, _ in kind.test_list])
    if hasattr(kind, "meta"):
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums[kind.meta["filename"]]})


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_through_torchvision(tmp_path, monkeypatch, name):
    from torchvision import datasets

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    rng = np.random.default_rng(0)
    arrays, files = {}, {}
    for file, _ in kind.train_list + kind.test_list:
        arrays[file] = rng.integers(0, 256, (2, 3072), dtype=np.uint8)
        labels = "labels" if name == "cifar10" else "fine_labels"
        files[file] = pickle.dumps({"data": arrays[file], labels: [4, 7]})
    files[kind.meta["filename"]] = pickle.dumps({kind.meta["key"]: [f"class{i}" for i in range(10)]})
    with_md5(monkeypatch, kind, tmp_path / kind.base_folder, files)

    source = open_source(name, str(tmp_path), LIMIT)
    assert source.samples[1] == (f"{name}/train-000001", 7) and source.samples[-1] == (f"{name}/test-000001", 7)
    assert len(source.samples) == 2 * len(arrays) and source.classes[4] == "class4"
    first = arrays[kind.train_list[0][0]][1].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(pixels(source, f"{name}/train-000001"), first)

    (tmp_path / kind.base_folder / kind.test_list[0][0]).write_bytes(b"\x80damaged")
    with pytest.raises(DataError, match=f"files of {name} are missing or damaged"):
        open_source(name, str(tmp_path), LIMIT)


def test_stl10_through_torchvision(tmp_path, monkeypatch):
    from torchvision import datasets

    kind = datasets.STL10
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 3, 96, 96), dtype=np.uint8)
    files = {name: bytes([1, 10]) if name.endswith("y.bin") else images.tobytes() for name, _ in kind.train_list}
    files |= {name: bytes([3, 4]) if name.endswith("y.bin") else images.tobytes() for name, _ in kind.test_list}
    with_md5(monkeypatch, kind, tmp_path / kind.base_folder, files)
    (tmp_path / kind.base_folder / kind.class_names_file).write_text("airplane\nbird\n")

    source = open_source("stl10", str(tmp_path), LIMIT)
    assert [label for _, label in source.samples] == [0, 9, 2, 3]
    assert source.classes == ["airplane", "bird"]
    # STL-10 stores columns first: rows and columns change places (torchvision documents the same).
    assert np.array_equal(pixels(source, "stl10/test-000001"), images[1].transpose(2, 1, 0))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "imagefolder"])
def test_a_root_is_needed_and_must_exist(tmp_path, name):
    with pytest.raises(ConfigError, match="set data.root"):
        open_source(name, None, LIMIT)
    with pytest.raises(DataError, match="does not exist"):
        open_source(name, str(tmp_path / "none"), LIMIT)
    with pytest.raises(DataError, match="check data.root|missing or damaged"):
        open_source(name, str(tmp_path), LIMIT)


def test_unknown_source_is_a_config_error():
    with pytest.raises(ConfigError, match="mnist is not known"):
        open_source("mnist", None, LIMIT)


def test_imagefolder_sorts_labels_and_counts_what_it_skips(tmp_path):
    write_png(tmp_path / "dog" / "b.png", 2)
    write_png(tmp_path / "cat" / "deep" / "a.PNG", 1)
    Image.new("RGB", (8, 8)).save(tmp_path / "dog" / "a.jpeg")
    (tmp_path / "dog" / "notes.txt").write_text("x")
    source = open_source("imagefolder", str(tmp_path), LIMIT)
    assert source.samples == [("cat/deep/a.PNG", 0), ("dog/a.jpeg", 1), ("dog/b.png", 1)]
    assert source.classes == ["cat", "dog"] and dict(source.skipped) == {".txt": 1} and source.labels_known
    assert source.read("dog/a.jpeg")[1] == "jpg"
    assert source.read("dog/b.png") == ((tmp_path / "dog" / "b.png").read_bytes(), "png")


def test_imagefolder_goes_by_content_not_by_name(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", "JPEG")
    source = open_source("imagefolder", str(tmp_path), LIMIT)
    assert source.samples == [("a.png", None)] and not source.labels_known
    assert source.read("a.png")[1] == "jpg"


def test_imagefolder_refuses_what_it_cannot_use(tmp_path):
    write_png(tmp_path / "a" / "x.png")
    write_png(tmp_path / "loose.png")
    with pytest.raises(DataError, match="'loose.png' lie beside the class folders"):
        open_source("imagefolder", str(tmp_path), LIMIT)
    (tmp_path / "loose.png").unlink()
    whole = (tmp_path / "a" / "x.png").read_bytes()
    (tmp_path / "a" / "broken.png").write_bytes(whole[: whole.index(b"IDAT") + 8])  # cut within the pixels
    source = open_source("imagefolder", str(tmp_path), LIMIT)
    with pytest.raises(DataError, match="'a/broken.png'"):
        source.read("a/broken.png")
    with pytest.raises(DataError, match="'a/x.png' claims 5 x 4"):
        open_source("imagefolder", str(tmp_path), 19).read("a/x.png")
    write_png(tmp_path / "a" / "esc\x1b.png")
    with pytest.raises(DataError, match="control character"):
        open_source("imagefolder", str(tmp_path), LIMIT)


def test_imagefolder_refuses_link_loops(tmp_path):
    write_png(tmp_path / "a" / "x.png")
    os.symlink(tmp_path, tmp_path / "a" / "loop")
    with pytest.raises(DataError, match="reached twice"):
        open_source("imagefolder", str(tmp_path), LIMIT)


def test_two_sources_keep_their_ids_apart(tmp_path):
    write_png(tmp_path / "one" / "a" / "x.png", 1)
    write_png(tmp_path / "two" / "a" / "x.png", 2)
    cfg = DataConfig(
        source="imagefolder",
        root=str(tmp_path / "one"),
        third_party_source="imagefolder",
        third_party_root=str(tmp_path / "two"),
    )
    opened = open_sources(cfg)
    members, guest = opened.members, opened.third_party
    assert members.samples == [("a/x.png", 0)] and guest.samples == [("third_party/a/x.png", 0)]
    assert guest.read("third_party/a/x.png")[0] == (tmp_path / "two" / "a" / "x.png").read_bytes()
    write_png(tmp_path / "one" / "third_party" / "a" / "x.png", 1)
    with pytest.raises(DataError, match="Two sources have an image with the id 'third_party/a/x.png'"):
        open_sources(cfg)


def test_members_cannot_be_strangers_to_themselves(tmp_path):
    with pytest.raises(ConfigError, match="the very images of the members"):
        open_sources(DataConfig(third_party_source="digits"))
    write_png(tmp_path / "a" / "x.png")
    os.symlink(tmp_path, tmp_path.parent / f"{tmp_path.name}-link")
    cfg = DataConfig(
        source="imagefolder",
        root=str(tmp_path),
        third_party_source="imagefolder",
        third_party_root=str(tmp_path.parent / f"{tmp_path.name}-link"),
    )
    with pytest.raises(ConfigError, match="the very images of the members"):
        open_sources(cfg)
