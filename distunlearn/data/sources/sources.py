"""Where images come from: each source lists (id, label) and reads one image as encoded bytes.

* digits: embedded in scikit-learn, no root; ids digits/000123.
* fashion_mnist: root holds the four IDX files (.gz or not), or torchvision's FashionMNIST/raw; ids
  fashion_mnist/train-000123 and test-000123 (both parts are one pool, roles are drawn from it).
* cifar10, cifar100: torchvision's root; nothing is downloaded, torchvision checks the MD5 sums; ids
  cifar10/train-000123 and test-000123. stl10: the same, its labelled train and test parts.
* imagefolder: any folder, the first folder level is the class; the id is the path below the root, with /.
* package.module:Name, path/to/file.py:Name: the user's own, see `open_source`; ids of a Dataset are Name/000123.
* webdataset: a folder of tar files as img2dataset writes them (see `data.tars`); the class is that of `.cls`.
"""

from __future__ import annotations

import copy
import gzip
import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from distunlearn.common import plugins
from distunlearn.common.text import printable
from distunlearn.config.checks import HANDED_OVER, SOURCE_GROUP, SOURCES
from distunlearn.config.schema import DataConfig
from distunlearn.data.manifest.ids import check_id
from distunlearn.data.sources.dataset import DatasetSource
from distunlearn.data.sources.decode import check_header, decode_image
from distunlearn.data.sources.tar_index import Member, read_tar
from distunlearn.errors import ConfigError, DataError, DistunlearnError

FASHION_MNIST_ROOT = "/usr/share/datasets/fashion-mnist"  # Debian's dataset-fashion-mnist
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
_MAX_IDX_BYTES = 1 << 30


class Source(Protocol):
    """A listed set of images.

    name: of the source. samples: (id, label or None), in a fixed order. labels_known: no label is None.
    classes: names by label, may be empty. skipped: files that were not taken for images.
    A source can be sent to another process. It may also have `stamp(sample_id)`, a short text that changes when the
    image does and costs less than reading it (DataError if it is gone), and `reader()`, a source that reads the same
    but lists nothing, so that little is sent.
    """

    name: str
    samples: list[tuple[str, int | None]]
    labels_known: bool
    classes: list[str]
    skipped: int

    def read(self, sample_id: str) -> tuple[bytes, str]:
        """(encoded image, "png" | "jpg" | "webp"); DataError if it cannot be read or decoded."""
        ...


class ArraySource:
    """Images held as one uint8 array [N, H, W] or [N, H, W, 3]; read as PNG.

    parts: (part name or "", images, labels [N]) in order; ids are name/part-000123 or name/000123.
    """

    def __init__(self, name: str, parts: list[tuple[str, np.ndarray, np.ndarray]], prefix: str = "") -> None:
        self.name = name
        self.classes: list[str] = []
        self.labels_known = True
        self.skipped = 0
        self.samples: list[tuple[str, int | None]] = []
        self._images: dict[str, np.ndarray] = {}
        for part, images, labels in parts:
            assert images.dtype == np.uint8 and len(images) == len(labels), (part, images.dtype, len(labels))
            start = f"{prefix}{name}/{part}-" if part else f"{prefix}{name}/"
            for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
                sample_id = f"{start}{number:06d}"
                self.samples.append((sample_id, label))
                self._images[sample_id] = image

    def read(self, sample_id: str) -> tuple[bytes, str]:
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(self._images[sample_id])).save(buffer, "PNG")
        return buffer.getvalue(), "png"

    def stamp(self, sample_id: str) -> str:
        return f"{zlib.crc32(self._images[sample_id].tobytes()):08x}"

    def reader(self) -> ArraySource:
        return _without_list(self)


class FolderSource:
    """PNG, JPEG and WebP files below a folder; the name of the first folder level is the class.

    Images that lie directly in the root have no class; then no image may have one. Other files are
    counted in `skipped`. Reading decodes each image once, so that a damaged one is found now.
    """

    def __init__(self, root: Path, max_pixels: int, prefix: str = "") -> None:
        self.name = "imagefolder"
        self.skipped = 0
        self._root = root
        self._prefix = prefix
        self._max_pixels = max_pixels
        paths = self._find(root)
        if not paths:
            raise DataError(f"The folder {root} holds no .png, .jpg or .webp images; check data.root.")
        self.classes = sorted({path.split("/")[0] for path in paths if "/" in path})
        self.labels_known = bool(self.classes)
        loose = [path for path in paths if "/" not in path]
        if loose and self.classes:
            raise DataError(
                f"{len(loose)} images such as {loose[0]!r} lie beside the class folders of {root}; "
                "move each image into a class folder."
            )
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.samples: list[tuple[str, int | None]] = [
            (prefix + path, numbers[path.split("/")[0]] if self.classes else None) for path in paths
        ]

    def _find(self, root: Path) -> list[str]:
        """Relative POSIX paths of the images, sorted; symbolic links are followed, loops refused."""
        found: list[str] = []
        seen: set[tuple[int, int]] = set()
        for folder, folders, files in os.walk(root, followlinks=True, onerror=_refuse_unreadable):
            folders.sort()
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                raise DataError(f"The folder {folder!r} is reached twice by symbolic links; remove the link.")
            seen.add((status.st_dev, status.st_ino))
            for name in files:
                if os.path.splitext(name)[1].lower() not in _IMAGE_SUFFIXES:
                    self.skipped += 1
                    continue
                path = Path(folder, name).relative_to(root).as_posix()
                check_id(path, f"The folder {root}")
                found.append(path)
        return sorted(found)

    def read(self, sample_id: str) -> tuple[bytes, str]:
        try:
            data = (self._root / sample_id.removeprefix(self._prefix)).read_bytes()
        except OSError as error:
            raise DataError(f"The image {sample_id!r} cannot be read ({error.strerror or error}).") from error
        return data, _checked(data, sample_id, self._max_pixels)

    def stamp(self, sample_id: str) -> str:
        return _stamp(self._root / sample_id.removeprefix(self._prefix), sample_id)

    def reader(self) -> FolderSource:
        return _without_list(self)


class ShardSource:
    """Existing WebDataset shards: all .tar files of a folder, every sample with one image.

    Reading decodes each image once, so that a damaged one is found now. Other files are counted in `skipped`.

    Raises:
        DataError: there is no shard, `read_tar` refuses one, or two samples have one id.
    """

    def __init__(self, root: Path, max_pixels: int, prefix: str = "") -> None:
        self.name = "webdataset"
        self.classes: list[str] = []
        self._root = root
        self._max_pixels = max_pixels
        self.samples: list[tuple[str, int | None]] = []
        self._places: dict[str, tuple[str, Member]] = {}
        names = tar_names(root)
        self.skipped = sum(1 for entry in root.iterdir() if entry.is_file()) - len(names)
        for name in names:
            for sample in read_tar(root / name):
                sample_id = prefix + sample.id
                if sample_id in self._places:
                    raise DataError(
                        f"{name}: the id {sample.id[:80]!r} is in {self._places[sample_id][0]} too; ids must be unique."
                    )
                self.samples.append((sample_id, sample.label))
                self._places[sample_id] = (name, sample.image)
        self.labels_known = all(label is not None for _, label in self.samples)

    def read(self, sample_id: str) -> tuple[bytes, str]:
        name, member = self._places[sample_id]
        try:
            with (self._root / name).open("rb") as handle:
                data = os.pread(handle.fileno(), member.size, member.offset)
        except OSError as error:
            raise DataError(f"The image {sample_id!r} of {name} cannot be read ({error.strerror or error}).") from error
        return data, _checked(data, sample_id, self._max_pixels)

    def stamp(self, sample_id: str) -> str:
        name, member = self._places[sample_id]
        return f"{_stamp(self._root / name, sample_id)}:{member.offset}"

    def reader(self) -> ShardSource:
        return _without_list(self)


def tar_names(root: Path) -> list[str]:
    """Names of the .tar files of a folder, sorted; DataError if there are none."""
    try:
        names = sorted(entry.name for entry in root.iterdir() if entry.suffix == ".tar")
    except OSError as error:
        raise DataError(f"The folder {root} cannot be read ({error.strerror or error}); check the path.") from error
    if not names:
        raise DataError(f"The folder {root} holds no .tar files; give the folder that holds the shards.")
    return names


def _checked(data: bytes, sample_id: str, max_pixels: int) -> str:
    """The kind of an image that can be decoded."""
    kind = check_header(data, sample_id, max_pixels)
    decode_image(data, sample_id, max_pixels, channels=3)
    return kind


def _stamp(path: Path, sample_id: str) -> str:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"The image {sample_id!r} cannot be read ({error.strerror or error}).") from error
    return f"{status.st_size}:{status.st_mtime_ns}"


def _without_list(source):  # type: ignore[no-untyped-def]
    light = copy.copy(source)
    light.samples = []
    return light


def open_source(name: str, root: str | None, max_pixels: int, prefix: str = "") -> Source:
    """Open a source by its config name.

    Args:
        name: digits, fashion_mnist, cifar10, cifar100, stl10, imagefolder or webdataset; or an own one by
            package.module:Name, path/to/file.py:Name or entry point: a class or function, given the root where there
            is one, that returns a `Source` or a map-style torch Dataset.
        root: see above; None: the source's default place, if it has one.
        max_pixels: images above are refused from their header.
        prefix: put before every id, to keep two roots of one source apart.

    Raises:
        ConfigError: unknown name, or a root is needed. DataError: missing or damaged files.
    """
    if name == "digits":
        return _open_digits(prefix)
    if name == "fashion_mnist":
        return _open_fashion_mnist(Path(root or FASHION_MNIST_ROOT), prefix)
    if name == HANDED_OVER:
        raise ConfigError(
            "the images of this run were handed over from Python, and only its shards have them; call "
            "distunlearn.unlearn with the datasets, or set data.source."
        )
    if name not in SOURCES:
        return _open_own(name, root, max_pixels, prefix)
    if root is None:
        raise ConfigError(f"The source {name} needs a folder; set data.root.")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"The folder {folder} of source {name} does not exist; check data.root.")
    if name == "imagefolder":
        return FolderSource(folder, max_pixels, prefix)
    if name == "webdataset":
        return ShardSource(folder, max_pixels, prefix)
    return _open_torchvision(name, folder, prefix)


def open_sources(cfg: DataConfig) -> tuple[Source, Source | None]:
    """(members' source, third-party source or None); their ids never collide.

    Raises:
        ConfigError: the third-party source is the members' own, under its own name; see also `open_source`.
    """
    members = open_source(cfg.source, cfg.root, cfg.max_pixels)
    if cfg.third_party_source is None:
        return members, None
    same = cfg.third_party_source == cfg.source
    if same and (cfg.source == "digits" or _same_folder(cfg.root, cfg.third_party_root)):
        raise ConfigError(
            f"data.third_party_source is {cfg.source}, the members' own images; leave it out, so that both are drawn "
            "from them disjointly."
        )
    # A folder's ids are bare paths, which could even spell an id of another source: mark the guest.
    marked = same or bool({"imagefolder", "webdataset"} & {cfg.source, cfg.third_party_source})
    prefix = "third_party/" if marked else ""
    guest = open_source(cfg.third_party_source, cfg.third_party_root, cfg.max_pixels, prefix)
    own_ids = {sample_id for sample_id, _ in members.samples}
    clash = next((sample_id for sample_id, _ in guest.samples if sample_id in own_ids), None)
    if clash is not None:
        raise DataError(f"Both sources have an image with the id {clash!r}; rename a folder of the members' source.")
    return members, guest


def _open_own(name: str, root: str | None, max_pixels: int, prefix: str) -> Source:
    make = plugins.resolve(name, dict.fromkeys(SOURCES, ""), None, SOURCE_GROUP, "data.source", counted=False)
    try:
        made = make() if root is None else make(root)
    except DistunlearnError:
        raise
    except Exception as error:
        raise DataError(
            f"The source {name} cannot be opened ({type(error).__name__}: {printable(str(error), 200)}); correct it, "
            "or set data.root, with which it is called."
        ) from error
    if not hasattr(made, "samples") or not hasattr(made, "read"):
        made = DatasetSource({name.rpartition(":")[2]: made}, max_pixels, prefix)
    made.code = plugins.origin(make)
    return made


def _same_folder(first: str | None, second: str | None) -> bool:
    if first is None or second is None:
        return first is second
    return os.path.realpath(os.path.expanduser(first)) == os.path.realpath(os.path.expanduser(second))


def _refuse_unreadable(error: OSError) -> None:
    raise DataError(f"The folder {error.filename!r} cannot be read ({error.strerror}).") from error


def _open_digits(prefix: str) -> Source:
    """1,797 images of 8 x 8 pixels, values 0..16 scaled to 0..255 (UCI optical digits, as scikit-learn has them)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return ArraySource("digits", [("", images, digits.target)], prefix)


def _open_fashion_mnist(root: Path, prefix: str) -> Source:
    parts = []
    for part, stem in (("train", "train"), ("test", "t10k")):
        images = _read_idx(root, f"{stem}-images-idx3-ubyte", 3)
        labels = _read_idx(root, f"{stem}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise DataError(f"{root} has {len(images)} {part} images but {len(labels)} labels; copy the files again.")
        parts.append((part, images, labels))
    return ArraySource("fashion_mnist", parts, prefix)


def _read_idx(root: Path, name: str, dims: int) -> np.ndarray:
    """A uint8 array from an IDX file (Y. LeCun's MNIST page), plain or gzip, never reading past its declared size."""
    folders = (root, root / "FashionMNIST" / "raw", root / "raw")
    places = [folder / file for folder in folders for file in (name, name + ".gz")]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise DataError(f"The file {name}[.gz] is not in {root}; install dataset-fashion-mnist or set data.root.")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as handle:
            magic, *shape = struct.unpack(f">{1 + dims}I", handle.read(4 * (1 + dims)))
            if magic != 0x0800 + dims:
                raise DataError(f"{path} starts with {magic:#010x}; expected {0x0800 + dims:#010x} of an IDX file.")
            size = int(np.prod(shape, dtype=object))
            if size > _MAX_IDX_BYTES:
                raise DataError(f"{path} claims {size} bytes; expected at most {_MAX_IDX_BYTES}.")
            data = handle.read(size + 1)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise DataError(f"{path} is truncated or damaged; copy the file again.") from error
    if len(data) != size:
        raise DataError(f"{path} holds {len(data)} bytes of data at least; expected {size}; copy the file again.")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _open_torchvision(name: str, root: Path, prefix: str) -> Source:
    """CIFAR and STL-10 through torchvision, which checks the files' MD5 before it unpickles CIFAR's."""
    from torchvision import datasets

    parts = []
    classes: list[str] = []
    for part in ("train", "test"):
        try:
            with warnings.catch_warnings():
                # The original CIFAR pickles spell a dtype flag in a way newer NumPy complains about.
                warnings.simplefilter("ignore")
                if name == "stl10":
                    dataset = datasets.STL10(str(root), split=part, download=False)
                    images = np.transpose(dataset.data, (0, 2, 3, 1))
                    labels = np.asarray(dataset.labels, dtype=np.int64)
                else:
                    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
                    dataset = kind(str(root), train=part == "train", download=False)
                    images, labels = dataset.data, np.asarray(dataset.targets, dtype=np.int64)
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            raise DataError(
                f"The files of {name} are missing or damaged below {root}; put torchvision's files there and retry."
            ) from error
        parts.append((part, images, labels))
        classes = list(getattr(dataset, "classes", []))
    source = ArraySource(name, parts, prefix)
    source.classes = classes
    return source
