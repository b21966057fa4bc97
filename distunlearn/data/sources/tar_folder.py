"""A folder of WebDataset shards of others as a source."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from distunlearn.data.sources.image_folder import checked, file_stamp, without_list
from distunlearn.data.sources.tar_index import Member, TarSample, number_labels, read_tar, unique_ids
from distunlearn.errors import DataError

_OURS = ("index.arrow", "summary.json", ".index.partial")


class ShardSource:
    """Existing WebDataset shards: all .tar files of a folder; classes are those of `.cls`, numbered as they occur.

    Reading decodes each image once, so that a damaged one is found now. Other files of the folder, and what `read_tar`
    leaves out of the shards, are counted in `skipped`.

    Raises:
        DataError: there is no shard, `read_tar` refuses one, or two samples have one id.
    """

    def __init__(self, root: Path, max_pixels: int, prefix: str = "") -> None:
        self.name = "webdataset"
        self._root = root
        self._max_pixels = max_pixels
        names = tar_names(root)
        self.skipped = other_files(file_names(root))
        found: list[tuple[str, TarSample]] = []
        for name in names:
            found += [(name, sample) for sample in read_tar(root / name, self.skipped)]
        ids = unique_ids([(name, sample.id, sample.named) for name, sample in found])
        labels, self.classes = number_labels([sample.label for _, sample in found])
        self.samples: list[tuple[str, int | None]] = [
            (prefix + sample_id, label) for sample_id, label in zip(ids, labels, strict=True)
        ]
        self.facts = [{"key": sample.key, **sample.facts} for _, sample in found]
        self._places: dict[str, tuple[str, Member]] = {
            prefix + sample_id: (name, sample.image) for sample_id, (name, sample) in zip(ids, found, strict=True)
        }
        self.labels_known = all(label is not None for label in labels)

    def read(self, sample_id: str) -> tuple[bytes, str]:
        data = self.bytes_of(sample_id)
        return data, checked(data, sample_id, self._max_pixels)

    def bytes_of(self, sample_id: str) -> bytes:
        name, member = self._places[sample_id]
        try:
            with (self._root / name).open("rb") as handle:
                data = os.pread(handle.fileno(), member.size, member.offset)
        except OSError as error:
            raise DataError(f"The image {sample_id!r} of {name} cannot be read ({error.strerror or error}).") from error
        return data

    def stamp(self, sample_id: str) -> str:
        name, member = self._places[sample_id]
        return f"{file_stamp(self._root / name, sample_id)}:{member.offset}"

    def reader(self) -> ShardSource:
        light = without_list(self)
        light.facts = []
        return light


def tar_names(root: Path) -> list[str]:
    """Names of the .tar files of a folder that are not hidden, sorted; DataError if there are none."""
    try:
        names = sorted(entry.name for entry in root.iterdir() if entry.suffix == ".tar" and entry.name[0] != ".")
    except OSError as error:
        raise DataError(f"The folder {root} cannot be read ({error.strerror or error}); check the path.") from error
    if not names:
        raise DataError(f"The folder {root} holds no .tar files; give the folder that holds the shards.")
    return names


def file_names(root: Path) -> list[str]:
    """Names of the files of a folder."""
    return [entry.name for entry in root.iterdir() if entry.is_file()]


def other_files(names: Iterable[str]) -> Counter[str]:
    """Files of a folder of shards that are no shards, by ending: such as .tgz, which is not read."""
    endings = (Path(name).suffix.lower() if name[0] != "." else "hidden" for name in names if name not in _OURS)
    return Counter(ending or "without ending" for ending in endings if ending != ".tar")
