"""A list of images as people write it: how it is encoded, what separates its columns, which column names the images.

txt: one id a line. csv and tsv (and a txt with such a header): columns separated by comma, semicolon, tab or bar, found
from the header. jsonl: one object a line. UTF-8, UTF-16 or UTF-32 by its byte order mark, or UTF-16 by its zeros. The
column is `data.forget_column`, else the one with a usual name (`id`, `file`, `path` ...), else, without a header, the
one whose first values are images. What is not clear is refused. A list is read as a stream.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distunlearn.errors import DataError
from distunlearn.verify.records import open_plain

ENDINGS = (".txt", ".csv", ".tsv", ".jsonl")
_MAX_LINE = 65_536  # an id is a short relative name
_HEAD = 50  # lines that are looked at to find out how a list is written
_SHOWN = 20  # faults that are named; all of them are counted
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_NAMES = {
    "id", "file", "filename", "filepath", "image", "imagefile", "imageid", "imagename", "imagepath", "img", "imgpath",
    "key", "path", "photo", "picture", "relativepath", "sampleid", "sha256", "url",
}  # fmt: skip
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip

Known = Callable[[list[str]], list[bool]]  # which of some texts name an image


@dataclass
class Faults:
    """Everything that is wrong with a list: the first few in words, all of them counted."""

    path: Path
    shown: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, text: str, times: int = 1) -> None:
        self.count += times
        if len(self.shown) < _SHOWN:
            self.shown.append(text)

    def refuse(self) -> None:
        """DataError with all of them, if there are any."""
        if self.count:
            more = self.count - len(self.shown)
            rest = f"; and {more} more" if more > 0 else ""
            raise DataError(f"The list {self.path}: {'; '.join(self.shown)}{rest}.")


@dataclass
class Form:
    """How a list is written.

    kind: lines, table or jsonl. delimiter: of a table. column, role: place (table) or name (jsonl) of what names the
    image and of its role. width: columns. start: lines before the first entry. title: of the column.
    """

    kind: str
    encoding: str
    column: Any = None
    role: Any = None
    delimiter: str = ","
    width: int = 1
    start: int = 0
    title: str = ""

    def words(self) -> str:
        """What was understood, for people."""
        parts = [self.encoding.removesuffix("-sig").upper()]
        if self.kind == "lines":
            return f"one id a line, {parts[0]}"
        if self.kind == "table":
            parts.insert(0, f"{_DELIMITERS[self.delimiter]}-separated")
        named = f"column {self.title!r}" if self.title else f"column {self.column + 1} (there is no header)"
        return ", ".join([*parts, named, *(["roles"] if self.role is not None else [])])


def sniff(path: Path, column: str | None, by: str, known: Known) -> Form:
    """How the list is written. column: `data.forget_column`; by: `data.forget_by`.

    Raises:
        DataError: another ending, a header that names no column or several, a file that cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix not in ENDINGS:
        raise DataError(
            f"The list {path} ends in {path.suffix!r}; expected a .txt, .csv, .tsv or .jsonl file of ids: save a "
            "spreadsheet as CSV."
        )
    encoding = _encoding(path)
    head = []
    for number, line in _lines(path, encoding):
        if line.strip():
            head.append((number, line))
        if len(head) == _HEAD:
            break
    if suffix == ".jsonl":
        return _sniff_objects(path, encoding, column, by, [line for _, line in head])
    if not head:
        return Form("lines", encoding)
    start, delimiters = 0, tuple(_DELIMITERS)
    special = re.fullmatch(r"sep=([,;\t|])", head[0][1].strip(" "))  # what spreadsheets write for themselves
    if special:
        start, delimiters, head = head[0][0], (special.group(1),), head[1:]
    rows = {d: [_split(line, d) for _, line in head] for d in delimiters}
    if suffix == ".txt":
        wide = [d for d in delimiters if len(rows[d][0]) > 1 and _columns(rows[d][0], column)]
        if not wide or known([head[0][1].strip(" \t")])[0]:
            return Form("lines", encoding)
    table = _sniff_table(path, head[0], rows, column, by, known)
    table.encoding, table.start = encoding, head[0][0] if table.title else start
    return table


def with_column(path: Path, form: Form, name: str) -> Form:
    """The same form, whose entries have this column in the place of the role.

    Raises:
        DataError: there is no such column, or several.
    """
    if form.kind == "jsonl":
        return replace(form, role=name)
    header = next((line for number, line in _lines(path, form.encoding) if number == form.start), "")
    places = _columns(_split(header, form.delimiter), name) if form.kind == "table" and form.title else []
    if len(places) != 1:
        raise DataError(f"{path} has {len(places)} columns named {name!r}, expected one; set data.person_column.")
    return replace(form, role=places[0])


def entries(path: Path, form: Form, faults: Faults) -> Iterator[tuple[int, str, str]]:
    """(line number, text that names an image, role or "") of every entry; what is wrong is added to `faults`."""
    try:
        yield from {"lines": _read_lines, "table": _read_table, "jsonl": _read_objects}[form.kind](path, form, faults)
    except DataError as error:
        faults.add(str(error).removeprefix(str(path)).lstrip(", ").rstrip("."))


def _sniff_table(
    path: Path, first: tuple[int, str], rows: dict[str, list[list[str]]], column: str | None, by: str, known: Known
) -> Form:
    """Delimiter and column, from the header or else from the first rows."""
    found = [(len(table[0]), d, _columns(table[0], column)) for d, table in rows.items()]
    found = sorted((f for f in found if f[2]), key=lambda f: -f[0])
    if found:
        width, delimiter, places = found[0]
        header = rows[delimiter][0]
        if len(places) > 1:
            places = [p for p in places if _plain(header[p]) == _plain(by)] if by != "id" else places
            hits = {p: sum(known([row[p] for row in rows[delimiter][1:] if len(row) == width])) for p in places}
            places = [p for p in places if hits[p]] or [p for p in places if header[p].casefold() == "id"]
        roles = [p for p, name in enumerate(header) if _plain(name) == "role"]
        if len(places) != 1 or len(roles) > 1:
            raise DataError(
                f"{path}, line {first[0]}: the header is {first[1][:80]!r}, in which several columns may name the "
                "image or its role; expected one column named id, or data.forget_column."
            )
        return Form("table", "", places[0], roles[0] if roles else None, delimiter, width, title=header[places[0]])
    bare = []
    for delimiter, table in rows.items() if column is None else ():
        width = len(table[0])
        places = [p for p in range(width) if any(known([row[p] for row in table if len(row) == width]))]
        bare += [Form("table", "", place, None, delimiter, width) for place in places]
    bare = [form for form in bare if form.width == max(f.width for f in bare)]
    if bare and len({form.column for form in bare}) == 1:
        return bare[0]
    wanted = f"data.forget_column={column}" if column else "id (or file, path, image ...)"
    raise DataError(
        f"{path}, line {first[0]}: the header is {first[1][:80]!r}; expected one column named {wanted}; name the "
        "column of the images with data.forget_column."
    )


def _sniff_objects(path: Path, encoding: str, column: str | None, by: str, head: list[str]) -> Form:
    names: list[str] = []
    for line in head:
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue  # said where all lines are read
        if isinstance(content, dict):
            names = list(content)
            break
    places = _columns(names, column)
    if len(places) > 1:
        same = [p for p in places if _plain(names[p]) == _plain(by)]
        places = same or places
    if len(places) > 1:
        raise DataError(f"{path}: several of {', '.join(names)[:80]!r} may name the image; set data.forget_column.")
    name = names[places[0]] if places else column or "id"
    return Form("jsonl", encoding, name, next((n for n in names if _plain(n) == "role"), "role"), title=name)


def _columns(header: list[str], column: str | None) -> list[int]:
    if column is not None:
        return [p for p, name in enumerate(header) if name.strip() == column] or [
            p for p, name in enumerate(header) if _plain(name) == _plain(column)
        ]
    return [p for p, name in enumerate(header) if _plain(name) in _NAMES]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()


def _split(line: str, delimiter: str) -> list[str]:
    try:
        return [cell.strip(" \t") for cell in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return [line]


def _encoding(path: Path) -> str:
    try:
        with open_plain(path) as handle:
            head = handle.read(4096)
    except OSError as error:
        raise DataError(
            f"The list of ids {path} cannot be read ({error.strerror or error}); check the path."
        ) from error
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if min(even, odd) == 0 and max(even, odd) * 4 > len(head) >= 8:
        return "utf-16-be" if even else "utf-16-le"
    return "utf-8"


def _lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its line end), decoded strictly, in bounded memory."""
    try:
        with io.TextIOWrapper(open_plain(path), encoding=encoding) as handle:
            number = 0
            while line := handle.readline(_MAX_LINE + 2):
                number += 1
                if len(line) > _MAX_LINE + 1:
                    raise DataError(f"{path}, line {number} is longer than {_MAX_LINE} bytes; expected one id a line.")
                yield number, line.removesuffix("\n")
    except UnicodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise DataError(f"{path} is not {name} at byte {_bad_byte(path, encoding)}; save the list as UTF-8.") from error
    except OSError as error:
        raise DataError(
            f"The list of ids {path} cannot be read ({error.strerror or error}); check the path."
        ) from error


def _bad_byte(path: Path, encoding: str) -> int:
    """Offset of the first byte that cannot be decoded."""
    decoder = codecs.getincrementaldecoder(encoding.removesuffix("-sig"))()
    done = 0
    with open_plain(path) as handle:
        while True:
            piece = handle.read(1 << 16)
            waiting = len(decoder.getstate()[0])
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                return done - waiting + error.start
            if not piece:
                return done
            done += len(piece)


def _read_lines(path: Path, form: Form, faults: Faults) -> Iterator[tuple[int, str, str]]:
    for number, line in _lines(path, form.encoding):
        line = line.strip(" \t")
        if line:
            yield number, line, ""


def _read_table(path: Path, form: Form, faults: Faults) -> Iterator[tuple[int, str, str]]:
    lines = _lines(path, form.encoding)
    number = 0

    def texts() -> Iterator[str]:
        nonlocal number
        for number, line in lines:
            if number > form.start:
                yield line

    column, role, width = form.column, form.role, form.width
    rows = csv.reader(texts(), delimiter=form.delimiter, strict=True)
    began = form.start
    try:
        for row in rows:
            line, began = began + 1, number
            while len(row) > width and not row[-1].strip():
                row.pop()
            if len(row) == width and row[column]:
                yield line, row[column].strip(" \t"), "" if role is None else row[role].strip(" \t")
            elif any(cell.strip() for cell in row):
                if len(row) == width:
                    faults.add(f"line {line}: an id of 0 characters; expected 1 or more")
                else:
                    faults.add(f"line {line} has {len(row)} fields; the header has {width}")
    except csv.Error as error:
        faults.add(f"line {began + 1} is not valid csv ({error})")


def _read_objects(path: Path, form: Form, faults: Faults) -> Iterator[tuple[int, str, str]]:
    for number, line in _lines(path, form.encoding):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            faults.add(f"line {number} is not valid JSON; expected one object a line")
            continue
        text = record.get(form.column) if isinstance(record, dict) else None
        role = record.get(form.role) or "" if isinstance(record, dict) else ""
        if not isinstance(text, str) or not isinstance(role, str):
            faults.add(f'line {number} has no text "{form.column}"; expected {{"{form.column}": "..."}}')
            continue
        yield number, text, role.strip()
