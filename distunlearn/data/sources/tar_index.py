"""Existing WebDataset shards: their headers walked strictly, their members grouped into samples.

A sample is a run of members whose names agree up to the first dot of their last part, as webdataset groups them. Its id
is the text `id` in its `.json`, if there is one, else that common part. Nothing is extracted and nothing is unpickled:
of every sample only the image, the `.cls` and the `.json` are ever read.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from distunlearn.data.manifest.ids import check_id
from distunlearn.errors import DataError

IMAGE_KINDS = ("png", "jpg", "jpeg", "webp")
MAX_MEMBER = 1 << 30  # bytes; no image, label or caption is larger
_MAX_TEXT = 1 << 20  # bytes of a .json or .cls


@dataclass(frozen=True, slots=True)
class Member:
    """A plain file in an archive: `start` is where its header begins, `offset` and `size` are those of its data."""

    name: str
    start: int
    offset: int
    size: int


@dataclass(slots=True)
class TarSample:
    """A sample of an archive: its id, its parts by extension, and which of them is the image."""

    key: str
    parts: dict[str, Member] = field(default_factory=dict)
    id: str = ""
    label: int | None = None

    @property
    def image(self) -> Member:
        """The member that holds the image."""
        return next(member for kind, member in self.parts.items() if kind in IMAGE_KINDS)


def key_of(name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member's name; the extension is "" if there is none."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def walk_tar(path: Path) -> Iterator[Member]:
    """All members of an uncompressed archive.

    Raises:
        DataError: it is no archive, ends early, has a damaged header (which tarfile alone takes for its end), or a
            member that is not a plain file or is larger than MAX_MEMBER.
    """
    found = 0
    try:
        with path.open("rb") as handle, _open_tar(handle) as tar:
            while (member := tar.next()) is not None:
                if not member.isreg() or member.issparse():
                    what = f"{_kind(member)} {member.name[:80]!r}"
                    raise DataError(f"{path.name}: {what} is in it; expected plain files only.")
                if member.size > MAX_MEMBER:
                    raise DataError(
                        f"{path.name}: {member.name[:80]!r} claims {member.size} bytes; expected at most {MAX_MEMBER}."
                    )
                found += 1
                yield Member(member.name, member.offset, member.offset_data, member.size)
                tar.members = []  # else they would pile up
            _check_end(handle, tar.offset, path, found)
    except tarfile.TarError as error:
        raise DataError(
            f"{path.name} is no whole tar file ({error}): it ends or breaks after {found} members; write it again."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check the disk and the path.") from error


def _open_tar(handle: BinaryIO) -> tarfile.TarFile:
    return tarfile.open(fileobj=handle, mode="r:")


def _kind(member: tarfile.TarInfo) -> str:
    names = ("folder", "isdir"), ("symbolic link", "issym"), ("hard link", "islnk"), ("device", "isdev")
    return next((f"a {word}" for word, test in names if getattr(member, test)()), "a sparse or unknown member")


def _check_end(handle: BinaryIO, offset: int, path: Path, found: int) -> None:
    """After the last header nothing but zeros may follow."""
    handle.seek(offset)
    while piece := handle.read(1 << 20):
        if piece.count(0) != len(piece):
            raise DataError(
                f"{path.name}: the header at byte {offset} is damaged, so that only {found} members before it can be "
                "read; write the file again."
            )


def read_tar(path: Path) -> list[TarSample]:
    """The samples of one archive, in order.

    Raises:
        DataError: as `walk_tar`; a member without extension or twice, a sample in two places, without image or with
            several, an id that is no id.
    """
    samples: dict[str, TarSample] = {}
    last: TarSample | None = None
    for member in walk_tar(path):
        key, kind = key_of(member.name)
        where = f"{path.name}: the member {member.name[:80]!r}"
        if not kind or not key.rpartition("/")[2]:
            raise DataError(f"{where} has no extension, so it belongs to no sample; take it out.")
        if last is None or key != last.key:
            if key in samples:
                raise DataError(f"{where} lies apart from the rest of its sample; put all parts next to each other.")
            last = samples[key] = TarSample(key)
        if kind in last.parts:
            raise DataError(f"{where} is in it twice; keep one.")
        last.parts[kind] = member
    with path.open("rb") as handle:
        for sample in samples.values():
            _finish(sample, handle, path)
    return list(samples.values())


def _finish(sample: TarSample, handle: BinaryIO, path: Path) -> None:
    where = f"{path.name}: the sample {sample.key[:80]!r}"
    images = [kind for kind in sample.parts if kind in IMAGE_KINDS]
    if len(images) != 1:
        found = " and ".join(images) or "none"
        raise DataError(f"{where} has {len(images)} images ({found}); expected one of {', '.join(IMAGE_KINDS)}.")
    sample.id = _id(sample, handle, where) or sample.key
    check_id(sample.id, where)
    if "cls" in sample.parts:
        text = _text(handle, sample.parts["cls"], where).strip()
        try:
            sample.label = int(text)
        except ValueError as error:
            raise DataError(f"{where} has the class {text[:40]!r}; expected a whole number.") from error
        if not 0 <= sample.label < 2**31:
            raise DataError(f"{where} has the class {text[:40]!r}; expected 0 or more.")


def _id(sample: TarSample, handle: BinaryIO, where: str) -> str | None:
    if "json" not in sample.parts:
        return None
    try:
        content = json.loads(_text(handle, sample.parts["json"], where))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} has a .json that is not JSON; correct or remove it.") from error
    named = content.get("id") if isinstance(content, dict) else None
    return named if isinstance(named, str) else None


def _text(handle: BinaryIO, member: Member, where: str) -> str:
    if member.size > _MAX_TEXT:
        raise DataError(f"{where} has a text of {member.size} bytes; expected at most {_MAX_TEXT}.")
    try:
        return os.pread(handle.fileno(), member.size, member.offset).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} has a text that is not UTF-8; correct it.") from error
