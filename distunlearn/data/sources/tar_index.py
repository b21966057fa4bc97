"""Existing WebDataset shards: their headers walked strictly, their members grouped into samples as webdataset does it.

A sample is a run of members whose names agree up to the first dot of their last part; where that gives a run without an
image and all its parts have dots in their endings (`IMG_2021.05.jpg`), up to the last dot. Its id is the text `id` in
its `.json`, if there is one, else that common part. Folders, hidden files, files without ending, webdataset's metadata
(`__x__`) and samples without an image are left out, counted by cause. Nothing is extracted and nothing is unpickled: of
every sample only the image, the `.cls` and the `.json` are ever read.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from distunlearn.data.manifest.ids import check_id, normal_id
from distunlearn.data.sources.decode import SUFFIXES
from distunlearn.data.sources.image_folder import is_hidden
from distunlearn.errors import DataError
from distunlearn.verify.records import open_plain

IMAGE_KINDS = tuple(SUFFIXES)
MAX_MEMBER = 1 << 30  # bytes; no image, label or caption is larger
_MAX_TEXT = 1 << 20  # bytes of a .json or .cls
MAX_EXTENDED = 1 << 20  # bytes of a long name, or of a pax header
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE
)  # fmt: skip
_MAX_CLASS = 200  # characters of a class's name
_META = re.compile(r"__[^/]*__($|/)")  # what webdataset skips

Part = TypeVar("Part")


@dataclass(frozen=True, slots=True)
class Member:
    """A plain file in an archive: `start` is where its header begins, `offset` and `size` are those of its data."""

    name: str
    start: int
    offset: int
    size: int


@dataclass(slots=True)
class TarSample:
    """A sample of an archive: its parts by extension, its id, and its class as it is written.

    named: the id is from the `.json`, else it is the key. facts: what else the `.json` says.
    """

    key: str
    parts: dict[str, Member]
    id: str = ""
    named: bool = False
    label: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def image(self) -> Member:
        """The member that holds the image."""
        return next(member for kind, member in self.parts.items() if kind in IMAGE_KINDS)


def _place(name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member's name; or ("", why it belongs to no sample)."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    if any(is_hidden(part) for part in name.split("/") if part != ".") and ".." not in name.split("/"):
        return "", "hidden"
    if _META.match(name):
        return "", "metadata"
    return (f"{folder}{slash}{stem}", extension.lower()) if extension and stem else ("", "files without ending")


def group_samples(
    members: Iterable[tuple[str, Part]], where: str, left_out: Counter[str]
) -> Iterator[tuple[str, dict[str, Part]]]:
    """(key, {extension: part}) of every sample with an image, in order; see the top of this file.

    Args:
        members: (name, whatever stands for it) of the plain files of one archive. left_out: what is left out is added.

    Raises:
        DataError: a member twice, the parts of a sample in two places, or two images in one.
    """
    seen: set[str] = set()
    run: dict[str, Part] = {}
    key = ""

    def finish() -> Iterator[tuple[str, dict[str, Part]]]:
        groups = {key: run} if run else {}
        if run and all("." in kind for kind in run):
            groups = {}
            for kind, part in run.items():
                stem, _, ending = kind.rpartition(".")
                groups.setdefault(f"{key}.{stem}", {})[ending] = part
        for name, parts in groups.items():
            images = [kind for kind in parts if kind in IMAGE_KINDS]
            if len(images) > 1:
                raise DataError(
                    f"{where}: the sample {name[:80]!r} has {len(images)} images ({' and '.join(images)}); keep one."
                )
            if images:
                yield name, parts
            else:
                left_out["samples without an image"] += 1

    for name, part in members:
        at, kind = _place(name)
        if not at:
            left_out[kind] += 1
            continue
        if at != key:
            yield from finish()
            if at in seen:
                raise DataError(
                    f"{where}: {name[:80]!r} lies apart from the rest of its sample; put all parts next to each other."
                )
            key, run = at, {}
            seen.add(at)
        if kind in run:
            raise DataError(f"{where}: {name[:80]!r} is in it twice; keep one.")
        run[kind] = part
    yield from finish()


def walk_tar(path: Path, left_out: Counter[str] | None = None) -> Iterator[Member]:
    """All plain files of an uncompressed archive; folders are counted in `left_out`.

    Raises:
        DataError: it is no archive, ends early, has a damaged header (which tarfile alone takes for its end), or a
            member that is neither file nor folder or is larger than MAX_MEMBER.
    """
    found = 0
    try:
        with open_plain(path) as handle, open_tar(handle) as tar:
            while (member := tar.next()) is not None:
                if member.isdir():
                    if left_out is not None:
                        left_out["folders"] += 1
                    continue
                if not member.isreg() or member.issparse():
                    what = f"{_kind(member)} {member.name[:80]!r}"
                    raise DataError(f"{path.name}: {what} is in it; expected plain files only.")
                if member.size > MAX_MEMBER:
                    raise DataError(
                        f"{path.name}: {member.name[:80]!r} claims {member.size} bytes; expected at most {MAX_MEMBER}."
                    )
                found += 1
                yield Member(member.name, member.offset, member.offset_data, member.size)
                tar.members = []  # type: ignore[attr-defined]  # else they would pile up
            _check_end(handle, tar.offset, path, found)
    except (tarfile.TarError, RecursionError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path.name} is no whole tar file ({error}): it ends or breaks after {found} members; write it again."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check the disk and the path.") from error


class BoundedMember(tarfile.TarInfo):
    """A member whose extended headers, which tarfile reads as a whole, are of the size of a name and a few numbers."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENDED and not 0 <= self.size <= MAX_EXTENDED:
            raise tarfile.ReadError(
                f"an extended header at byte {self.offset} claims {self.size} bytes, expected at most {MAX_EXTENDED}"
            )
        return super()._proc_member(tar)  # type: ignore[misc]


def open_tar(handle: BinaryIO) -> tarfile.TarFile:
    """An uncompressed archive, as tarfile reads it, with bounded headers. tarfile.TarError: it is none."""
    return tarfile.open(fileobj=handle, mode="r:", tarinfo=BoundedMember)


def _kind(member: tarfile.TarInfo) -> str:
    names = ("symbolic link", "issym"), ("hard link", "islnk"), ("device", "isdev")
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


def read_tar(path: Path, left_out: Counter[str] | None = None) -> list[TarSample]:
    """The samples of a shard, in file order. left_out: what is left out is added, by cause.

    Raises:
        DataError: `walk_tar` or `group_samples` refuses it, an id cannot be one, a `.json` is not JSON.
    """
    counted: Counter[str] = Counter() if left_out is None else left_out
    members = ((member.name, member) for member in walk_tar(path, counted))
    samples = [TarSample(key, parts) for key, parts in group_samples(members, path.name, counted)]
    with open_plain(path) as handle:
        for sample in samples:
            _finish(sample, handle, path)
    return samples


def _finish(sample: TarSample, handle: BinaryIO, path: Path) -> None:
    where = f"{path.name}: the sample {sample.key[:80]!r}"
    if "json" in sample.parts:
        try:
            content = json.loads(_text(handle, sample.parts["json"], where))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} has a .json that is not JSON; correct or remove it.") from error
        sample.facts = content if isinstance(content, dict) else {}
    named = sample.facts.get("id")
    sample.named = isinstance(named, str)
    sample.id = str(named) if sample.named else sample.key
    check_id(sample.id, where)
    if "cls" in sample.parts:
        sample.label = _text(handle, sample.parts["cls"], where).strip() or None
        if sample.label and len(sample.label) > _MAX_CLASS:
            raise DataError(f"{where} has a class of {len(sample.label)} characters; expected at most {_MAX_CLASS}.")


def number_labels(written: Sequence[str | int | None]) -> tuple[list[int | None], list[str]]:
    """(number of each label, names of the classes by number): numbered as they occur, in order; -1 is no label.

    >>> number_labels(["500", "7", None, "-1", "500"])
    ([1, 0, None, None, 1], ['7', '500'])
    """
    known = {text for text in map(str, (value for value in written if value is not None)) if text != "-1"}
    numeric = all(re.fullmatch(r"[+-]?\d{1,18}", text) for text in known)
    names = sorted(known, key=(lambda text: (int(text), text)) if numeric else None)
    number = {name: code for code, name in enumerate(names)}
    return [None if value is None else number.get(str(value)) for value in written], names


def unique_ids(samples: Sequence[tuple[str, str, bool]]) -> list[str]:
    """Ids of (shard, id, whether it is from a `.json`): where keys begin anew in each shard, with the shard's name.

    >>> unique_ids([("0.tar", "a", False), ("1.tar", "a", False), ("1.tar", "b", False)])
    ['0/a', '1/a', 'b']

    Raises:
        DataError: two samples have one id for all that.
    """
    count = Counter(normal_id(sample_id) for _, sample_id, _ in samples)
    ids = [
        f"{shard.removesuffix('.tar')}/{sample_id}" if not named and count[normal_id(sample_id)] > 1 else sample_id
        for shard, sample_id, named in samples
    ]
    seen: dict[str, str] = {}
    for (shard, _, _), sample_id in zip(samples, ids, strict=True):
        known = normal_id(sample_id)
        if known in seen:
            raise DataError(f"{shard}: the id {sample_id[:80]!r} is in {seen[known]} too; ids must be unique.")
        seen[known] = shard
    return ids


def _text(handle: BinaryIO, member: Member, where: str) -> str:
    if member.size > _MAX_TEXT:
        raise DataError(f"{where} has a text of {member.size} bytes; expected at most {_MAX_TEXT}.")
    try:
        return os.pread(handle.fileno(), member.size, member.offset).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} has a text that is not UTF-8; correct it.") from error
