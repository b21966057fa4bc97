"""Where images come from: each source lists (id, label) and reads one image as encoded bytes.

* digits: embedded in scikit-learn, no root; ids digits/000123.
* fashion_mnist: root holds the four IDX files (.gz or not), or torchvision's FashionMNIST/raw; ids
  fashion_mnist/train-000123 and test-000123 (both parts are one pool, roles are drawn from it).
* cifar10, cifar100: torchvision's root; nothing is downloaded, torchvision checks the MD5 sums; ids
  cifar10/train-000123 and test-000123. stl10: the same, its labelled train and test parts.
* imagefolder: any folder, the first folder level is the class; the id is the path below the root, with /. Hidden files
  and folders (`.x`, `@eaDir`, `__MACOSX`) are no images.
* package.module:Name, path/to/file.py:Name: the user's own, see `open_source`; ids of a Dataset are Name/000123.
* webdataset: a folder of tar files as img2dataset writes them (see `data.tars`); the class is that of `.cls`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from distunlearn.common import plugins
from distunlearn.common.text import printable
from distunlearn.config.checks import HANDED_OVER, SOURCE_GROUP, SOURCES
from distunlearn.config.schema import DataConfig
from distunlearn.data.sources.dataset import DatasetSource
from distunlearn.data.sources.image_folder import FolderSource, without_list
from distunlearn.data.sources.tar_folder import ShardSource
from distunlearn.errors import ConfigError, DataError, DistunlearnError

FASHION_MNIST_ROOT = "/usr/share/datasets/fashion-mnist"  # Debian's dataset-fashion-mnist
_MAX_IDX_BYTES = 1 << 30


class Source(Protocol):
    """A listed set of images.

    name: of the source. samples: (id, label or None), in a fixed order. labels_known: no label is None.
    classes: names by label, may be empty. skipped: files that were not taken for images, by ending or cause.
    A source can be sent to another process. It may also have `stamp(sample_id)`, a short text that changes when the
    image does and costs less than reading it (DataError if it is gone), and `reader()`, a source that reads the same
    but lists nothing, so that little is sent.
    """

    name: str
    samples: list[tuple[str, int | None]]
    labels_known: bool
    classes: list[str]

    @property
    def skipped(self) -> Mapping[str, int]: ...

    def read(self, sample_id: str) -> tuple[bytes, str]:
        """(encoded image, its kind, as "png"); DataError if it cannot be read, UndecodableError if not decoded."""
        ...


class ArraySource:
    """Images held as one uint8 array [N, H, W] or [N, H, W, 3]; read as PNG.

    parts: (part name or "", images, labels [N]) in order; ids are name/part-000123 or name/000123.
    """

    def __init__(self, name: str, parts: list[tuple[str, np.ndarray, np.ndarray]], prefix: str = "") -> None:
        self.name = name
        self.classes: list[str] = []
        self.labels_known = True
        self.skipped: Counter[str] = Counter()
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
        return without_list(self)


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


@dataclass(frozen=True)
class Sources:
    """The opened sources of a run; their ids never collide. holdout: of the non-members, None: the members' own."""

    members: Source
    holdout: Source | None = None
    third_party: Source | None = None

    @property
    def all(self) -> list[Source]:
        return [source for source in (self.members, self.holdout, self.third_party) if source is not None]

    @property
    def skipped(self) -> Counter[str]:
        """Files that were not taken for images, by ending or cause."""
        return sum((Counter(source.skipped) for source in self.all), Counter())


def open_sources(cfg: DataConfig) -> Sources:
    """The members' source, and those that are set for the non-members and the third party.

    Raises:
        ConfigError: one of these is another one, under its own name; see also `open_source`.
    """
    opened = {"members": (cfg.source, cfg.root, open_source(cfg.source, cfg.root, cfg.max_pixels))}
    taken = {sample_id for sample_id, _ in opened["members"][2].samples}
    holdout = cfg.holdout_source or (cfg.source if cfg.holdout_root is not None else None)
    for key, name, root in (
        ("holdout", holdout, cfg.holdout_root), ("third_party", cfg.third_party_source, cfg.third_party_root),
    ):  # fmt: skip
        if name is None:
            continue
        for other, (known, place, _) in opened.items():
            if name == known and (name == "digits" or _same_folder(root, place)):
                raise ConfigError(
                    f"data.{key}_source is {name}, the very images of the {other}; leave it out, so that roles are "
                    "drawn from them disjointly, or give other images."
                )
        # A folder's ids are bare paths, which could even spell an id of another source: mark the guest.
        kinds = {known for known, _, _ in opened.values()}
        marked = name in kinds or bool({"imagefolder", "webdataset"} & {name, *kinds})
        guest = open_source(name, root, cfg.max_pixels, f"{key}/" if marked else "")
        clash = next((sample_id for sample_id, _ in guest.samples if sample_id in taken), None)
        if clash is not None:
            raise DataError(f"Two sources have an image with the id {clash!r}; rename a folder of one of them.")
        taken.update(sample_id for sample_id, _ in guest.samples)
        opened[key] = (name, root, guest)
    return Sources(**{key: source for key, (_, _, source) in opened.items()})


def names_by(source: Source, by: str, known: Mapping[str, str] | None = None) -> list[list[str]] | None:
    """By what each image of a source may be meant, in order; None for `by` = id. known: sha256 by id, not read again.

    Raises:
        ConfigError: the source knows no such names.
    """
    if by == "id":
        return None
    facts = getattr(source, "facts", None)
    if by != "sha256":
        if facts is None:
            raise ConfigError(
                f"data.forget_by={by} needs shards whose samples have it, but the source is {source.name}; list ids."
            )
        return [[str(fact[by])] if fact.get(by) is not None else [] for fact in facts]
    known = known or {}
    digests = [known.get(i) or hashlib.sha256(read_bytes(source, i)).hexdigest() for i, _ in source.samples]
    told = [fact.get("sha256") for fact in facts] if facts else [None] * len(digests)
    return [[digest, *([str(other)] if other else [])] for digest, other in zip(digests, told, strict=True)]


def read_bytes(source: Source, sample_id: str) -> bytes:
    """The encoded bytes; undecoded where the source can do that."""
    return source.bytes_of(sample_id) if hasattr(source, "bytes_of") else source.read(sample_id)[0]


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
