"""A folder of image files as a source, and what in it is no image."""

from __future__ import annotations

import copy
import os
import stat
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from distunlearn.common.text import printable
from distunlearn.data.manifest.ids import check_id
from distunlearn.data.sources.decode import SUFFIXES, check_header, decode_image
from distunlearn.errors import DataError
from distunlearn.verify.records import read_plain

MAX_IMAGE = 1 << 30  # bytes of one encoded image
_HIDDEN = ("@eaDir", "__MACOSX")  # thumbnails of a NAS, and what macOS packs beside files


class FolderSource:
    """Image files below a folder; the name of the first folder level is the class.

    Images that lie directly in the root have no class; then no image may have one. Other files, and hidden ones, are
    counted in `skipped`, by ending or cause. Reading decodes each image once, so that a damaged one is found now.
    """

    def __init__(self, root: Path, max_pixels: int, prefix: str = "") -> None:
        self.name = "imagefolder"
        self.skipped: Counter[str] = Counter()
        self._root = root
        self._prefix = prefix
        self._max_pixels = max_pixels
        paths = self._find(root)
        if not paths:
            raise DataError(f"The folder {root} holds no images{left_out(self.skipped)}; check data.root.")
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
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                raise DataError(f"The folder {folder!r} is reached twice by symbolic links; remove the link.")
            seen.add((status.st_dev, status.st_ino))
            for name in filter(is_hidden, folders):
                self.skipped["hidden"] += sum(len(inside) for _, _, inside in os.walk(Path(folder, name)))
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            for name in files:
                cause = _why_skipped(folder, name)
                if cause is not None:
                    self.skipped[cause] += 1
                    continue
                path = Path(folder, name).relative_to(root).as_posix()
                check_id(path, f"The folder {root}")
                found.append(path)
        return sorted(found)

    def read(self, sample_id: str) -> tuple[bytes, str]:
        data = self.bytes_of(sample_id)
        return data, checked(data, sample_id, self._max_pixels)

    def bytes_of(self, sample_id: str) -> bytes:
        try:
            data = read_plain(self._root / sample_id.removeprefix(self._prefix), MAX_IMAGE)
        except OSError as error:
            raise DataError(f"The image {sample_id!r} cannot be read ({error.strerror or error}).") from error
        return data

    def stamp(self, sample_id: str) -> str:
        return file_stamp(self._root / sample_id.removeprefix(self._prefix), sample_id)

    def reader(self) -> FolderSource:
        return without_list(self)


def left_out(skipped: Mapping[str, int]) -> str:
    """' (left out: 3 .txt, 2 hidden)', the most first, or nothing."""
    most = Counter(skipped).most_common(10)
    return f" (left out: {printable(', '.join(f'{count} {cause}' for cause, count in most))})" if most else ""


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _HIDDEN


def _why_skipped(folder: str, name: str) -> str | None:
    """Why a file is not taken for an image; None: it is."""
    if is_hidden(name):
        return "hidden"
    ending = os.path.splitext(name)[1].lower()
    kind = SUFFIXES.get(ending[1:])
    if kind is None:
        return ending if 1 < len(ending) <= 10 else "without a usual ending"
    if kind == "heic" and find_spec("pillow_heif") is None:
        return f"{ending} (install distunlearn[heif])"
    try:
        return None if stat.S_ISREG(os.stat(os.path.join(folder, name)).st_mode) else "special files"
    except OSError:
        return "broken links"


def checked(data: bytes, sample_id: str, max_pixels: int) -> str:
    """The kind of an image that can be decoded."""
    kind = check_header(data, sample_id, max_pixels)
    decode_image(data, sample_id, max_pixels, channels=3)
    return kind


def file_stamp(path: Path, sample_id: str) -> str:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"The image {sample_id!r} cannot be read ({error.strerror or error}).") from error
    return f"{status.st_size}:{status.st_mtime_ns}"


def without_list(source):  # type: ignore[no-untyped-def]
    light = copy.copy(source)
    light.samples = []
    return light


def _refuse_unreadable(error: OSError) -> None:
    raise DataError(f"The folder {error.filename!r} cannot be read ({error.strerror}).") from error
