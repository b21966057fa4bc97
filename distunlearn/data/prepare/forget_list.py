"""Which images a list means: its entries against the ids of a source, with every spelling that can mean one image only.

Ids are compared in their normal form (`manifest.ids`): Unicode form and the kind of slash do not matter, case does. An
entry that is no id may be an absolute path below `data.root`. Where no entry at all is an id, all of them may have one
folder before it (`photos/`), or be the names of files alone. With `data.forget_by` entries are URLs, keys or digests,
and mean every image that has them. In a .txt a line that begins with # is an id if an image has it, else a comment.

A list is read as a stream, its ids become row numbers, 8 bytes each, and it is refused with all its faults at once.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from distunlearn.data.manifest.ids import WINDOW, IdTable, check_id, hash_ids, normal_id, refused, texts
from distunlearn.data.manifest.records import ROLES
from distunlearn.data.prepare.list_file import Faults, entries, sniff
from distunlearn.errors import DataError

NON_MEMBER = "non_member"  # in a list: never trained on, whatever role it is dealt
LIST_ROLES = (*ROLES, NON_MEMBER)
LOOKED_UP = WINDOW  # ids that are held as texts and looked up together
_MISSING_KEPT = 10_000  # ids that the images lack and that are named; all of them are counted
_TRIED = 100  # entries by which a folder before all ids is found


@dataclass(frozen=True)
class Resolved:
    """A list against a table of ids.

    rows: by role, int64, in the order of the list, each once. entries: lines that mean an image. missing: ids that the
    table lacks, the first few. num_missing: how many. sha256: of the file. understood: how it was read, for people.
    """

    rows: dict[str, np.ndarray]
    entries: int
    missing: list[str] = field(default_factory=list)
    num_missing: int = 0
    duplicates: int = 0
    sha256: str = ""
    understood: str = ""

    @property
    def forget(self) -> np.ndarray:
        return self.rows["forget"]

    def facts(self) -> dict[str, Any]:
        """Counts and digest as plain JSON."""
        return {
            "understood": self.understood,
            "sha256": self.sha256,
            "entries": self.entries,
            **{role: len(rows) for role, rows in self.rows.items() if len(rows) or role in ("forget", "retain")},
            "duplicates": self.duplicates,
            "missing": self.num_missing,
            "missing_ids": self.missing,
        }


def resolve_list(
    path: str | Path,
    table: IdTable,
    *,
    root: str | None = None,
    column: str | None = None,
    by: str = "id",
    names: Sequence[Collection[str]] | None = None,
    allow_missing: bool = False,
    skipped: str = "",
) -> Resolved:
    """Rows of the images that a list names, in memory bounded by 16 bytes an id and the table's own.

    Args:
        root: folder of the source, taken off absolute paths. column: `data.forget_column`. by: `data.forget_by`;
            names: unless it is id, the texts by which each image of the table may be meant.
        allow_missing: ids that no image has are recorded. skipped: what the source left out, for the message.

    Raises:
        DataError: the list cannot be read or is unclear, or has faults, all of which are named: lines that are
            malformed, ids that cannot be one, that no image has, that mean two images or have two roles.
    """
    path = Path(path)
    finder = Finder(table, root, names)
    form = sniff(path, column, by, lambda some_texts: (finder.plain(some_texts) >= 0).tolist())
    faults = Faults(path)
    read = _look_up(entries(path, form, faults), finder, form.kind == "lines", faults, plain_ids=names is None)
    num_missing = len(np.unique(np.concatenate([np.zeros(0, dtype="<u8"), *read.lost])))
    if num_missing and not allow_missing:
        faults.add(_missing_words(read.missing, num_missing, table, skipped), num_missing)
    result = {role: _each_once(finder.all_of(np.concatenate([np.zeros(0, np.int64), *parts])))
              for role, parts in read.found.items()}  # fmt: skip
    _refuse_two_roles(result, table, faults)
    faults.refuse()
    if not read.total:
        raise DataError(f"The list {path} holds no ids, so there is nothing to forget; list at least one id.")
    skips = [f"{read.comments} comment lines skipped"] if read.comments else []
    rows = np.concatenate([np.zeros(0, np.int64), *(part for parts in read.found.values() for part in parts)])
    duplicates = len(rows) - len(np.unique(rows)) + sum(map(len, read.lost)) - num_missing
    words = "; ".join([form.words(), *finder.words(), *skips])
    return Resolved(result, read.total, list(read.missing), num_missing, duplicates, list_sha256(path), words)


@dataclass
class _Read:
    """What a list says: rows by role, hashes and the first of the ids that no image has, and how many entries."""

    found: dict[str, list[np.ndarray]] = field(default_factory=lambda: {role: [] for role in LIST_ROLES})
    lost: list[np.ndarray] = field(default_factory=list)
    missing: dict[str, None] = field(default_factory=dict)
    total: int = 0
    comments: int = 0


def _look_up(
    stream: Iterator[tuple[int, str, str]], finder: Finder, comments: bool, faults: Faults, *, plain_ids: bool
) -> _Read:
    """All entries of a list, a part at a time. comments: whether a `#` line that names no image is one."""
    read = _Read()
    while chunk := list(islice(stream, LOOKED_UP)):
        rows = finder.find([text for _, text, _ in chunk], faults)
        absent = []
        by_role: dict[str, list[int]] = {}
        for (line, text, role), row in zip(chunk, rows.tolist(), strict=True):
            if row == -1 and comments and text.startswith("#"):
                read.comments += 1
                continue
            read.total += 1
            role = "forget" if role == "" else role.lower().replace("-", "_").replace(" ", "_")
            if role not in read.found:
                faults.add(f"line {line}: role is {role[:40]!r}; expected forget, retain, {NON_MEMBER} or a role")
            elif row >= 0:
                by_role.setdefault(role, []).append(row)
            elif row == -1:
                absent.append((line, text))
        for role, these in by_role.items():
            read.found[role].append(np.array(these, dtype=np.int64))
        absent = _without_impossible(absent, faults) if plain_ids else absent
        read.lost.append(hash_ids(text for _, text in absent))
        for _, text in absent:
            if len(read.missing) < _MISSING_KEPT:
                read.missing[normal_id(text) if plain_ids else text] = None
    return read


class Finder:
    """Rows of texts that mean an image; -1: none has it, -2: it is a fault, which was told."""

    def __init__(self, table: IdTable, root: str | None, names: Sequence[Collection[str]] | None) -> None:
        self.table = table
        self.roots = _spellings(root)
        self.counts: Counter[str] = Counter()  # how entries were understood that are no plain id
        self.direct = False  # whether an entry was an id as it stands, or below the root
        self.prefix: str | None = None  # folder before all ids
        self.bare: dict[str, int] | None = None  # rows by the name of the file alone; -2 for several
        self.owners: list[list[int]] = []  # with names: rows that have one text, by number of the text
        self.number: dict[str, int] | None = None
        if names is not None:
            self.number = {}
            for row, own in enumerate(names):
                for text in own:
                    at = self.number.setdefault(text, len(self.owners))
                    if at == len(self.owners):
                        self.owners.append([])
                    self.owners[at].append(row)

    def plain(self, some_texts: list[str]) -> np.ndarray:
        """As ids alone, or below the root."""
        if self.number is not None:
            return np.array([self.number.get(text, -1) for text in some_texts], dtype=np.int64)
        return self._below_root(some_texts, self._ids(some_texts, None))

    def find(self, some_texts: list[str], faults: Faults) -> np.ndarray:
        if self.number is not None:
            return self.plain(some_texts)
        rows = self._ids(some_texts, faults)
        rows = self._below_root(some_texts, rows, count=True)
        self.direct = self.direct or bool((rows >= 0).any())
        lost = [p for p in np.flatnonzero(rows == -1).tolist() if not some_texts[p].startswith("#")]
        if lost and not self.direct:
            self._learn([some_texts[p] for p in lost[:_TRIED]])
        if self.prefix is not None:
            inside = [p for p in lost if normal_id(some_texts[p]).startswith(self.prefix)]
            rows[inside] = self._ids([normal_id(some_texts[p])[len(self.prefix) :] for p in inside], faults)
            self.counts[f"{self.prefix!r} taken off"] += int((rows[inside] >= 0).sum())
        elif self.bare is not None:
            for p in lost:
                rows[p] = self.bare.get(normal_id(some_texts[p]), -1)
                if rows[p] == -2:
                    faults.add(f"{some_texts[p][:80]!r} is the name of several images; give their paths")
            self.counts["names of files alone, for"] += int((rows[lost] >= 0).sum())
        return rows

    def all_of(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the table for what `find` gave."""
        if self.number is None:
            return rows
        return np.array([row for at in rows.tolist() for row in self.owners[at]], dtype=np.int64)

    def words(self) -> list[str]:
        return [f"{how} {count} entries" for how, count in self.counts.items() if count]

    def _ids(self, some_texts: list[str], faults: Faults | None) -> np.ndarray:
        try:
            return self.table.find(some_texts)
        except DataError:  # an id that two images share
            rows = np.full(len(some_texts), -1, dtype=np.int64)
            for place, text in enumerate(some_texts):
                try:
                    rows[place] = self.table.find([text])[0]
                except DataError as error:
                    rows[place] = -2
                    if faults is not None:
                        faults.add(str(error).rstrip("."))
            return rows

    def _below_root(self, some_texts: list[str], rows: np.ndarray, count: bool = False) -> np.ndarray:
        for place in np.flatnonzero(rows == -1).tolist() if self.roots else ():
            text = some_texts[place].replace("\\", "/")
            text = unquote(text.removeprefix("file://")) if text.startswith("file://") else text
            root = next((root for root in self.roots if normal_id(text).startswith(f"{root}/")), None)
            if root is not None:
                rows[place] = self._ids([normal_id(text)[len(root) + 1 :]], None)[0]
                if count and rows[place] >= 0:
                    self.counts["data.root taken off"] += 1
        return rows

    def _learn(self, lost: list[str]) -> None:
        """The one folder before all ids, or that names of files alone are meant; nothing where it is not clear."""
        found = set()
        for text in lost:
            parts = normal_id(text).split("/")
            rests = ["/".join(parts[k:]) for k in range(1, len(parts))] if ".." not in parts else []
            hits = np.flatnonzero(self._ids(rests, None) >= 0).tolist() if rests else []
            if hits:
                found.add("/".join(parts[: hits[0] + 1]) + "/")
        if len(found) == 1 and self.prefix is None:
            self.prefix = found.pop()
        elif not found and self.prefix is None and self.bare is None and not any("/" in normal_id(t) for t in lost):
            self.bare = {}
            for row, sample_id in enumerate(self.table):
                name = normal_id(sample_id).rpartition("/")[2]
                self.bare[name] = -2 if name in self.bare else row


def _spellings(root: str | None) -> list[str]:
    """A folder as it may stand before an id, in normal form."""
    if root is None:
        return []
    path = Path(root).expanduser()
    forms = dict.fromkeys(normal_id(str(p)) for p in (root, path, path.absolute(), path.resolve()))
    return [form for form in forms if form]


def _without_impossible(absent: list[tuple[int, str]], faults: Faults) -> list[tuple[int, str]]:
    """Those that could be ids; the others are faults."""
    odd = set(refused(texts([text for _, text in absent]))) if absent else set()
    for line, text in absent:
        if text in odd or not text:
            try:
                check_id(text, f"line {line}")
            except DataError as error:
                faults.add(str(error).rstrip("."))
    return [entry for entry in absent if entry[1] not in odd and entry[1]]


def _missing_words(missing: Mapping[str, None], count: int, table: IdTable, skipped: str) -> str:
    """What is said of ids that no image has, with a hint where they differ in case only."""
    wanted = {sample_id.casefold() for sample_id in missing}
    match = next((sample_id for sample_id in table if sample_id.casefold() in wanted), None)
    near = "" if match is None else f" (but {match[:80]!r} differs only in case)"
    return (
        f"{some(missing, count)} which the source does not have{near}{skipped}; correct the list, or set "
        "data.allow_missing=true to leave such ids out and have them recorded"
    )


def _refuse_two_roles(rows: Mapping[str, np.ndarray], table: IdTable, faults: Faults) -> None:
    together = np.concatenate(list(rows.values()))
    values, count = np.unique(together, return_counts=True)
    both = values[count > 1]
    if len(both):
        roles = [role for role, own in rows.items() if np.isin(own, both).any()]
        what = "both to forget and to retain" if roles == ["retain", "forget"] else f"as {' and as '.join(roles)}"
        faults.add(f"it lists {some(table.at(both[:6]), len(both))} {what}; keep each id once", len(both))


def _each_once(rows: np.ndarray) -> np.ndarray:
    """Without repetitions, in order of first appearance."""
    _, first = np.unique(rows, return_index=True)
    return rows[np.sort(first)]


def some(ids: Collection[str], count: int | None = None, most: int = 5) -> str:
    """'3 ids ('a', 'b', 'c')', sorted, cut after a few, escaped. count: of all, if `ids` are only the first."""
    count = len(ids) if count is None else count
    shown = ", ".join(repr(sample_id) for sample_id in sorted(ids)[:most])
    more = ", ..." if count > most else ""
    return f"{count} id{'s' if count > 1 else ''} ({shown}{more})"


def list_sha256(path: str | Path) -> str:
    """sha256 of the file; DataError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as handle:
            while piece := handle.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"The list of ids {path} cannot be read ({reason}); check the path.") from error
    return digest.hexdigest()
