"""YAML as configuration needs it: plain data, one meaning, nothing executed.

A file is at most 1 MiB of UTF-8 and holds one document of mappings with text keys, lists and scalars. ruamel.yaml
reads it; tags, anchors, aliases and duplicate keys are refused. Scalars follow the YAML 1.2 core schema with decimal
numbers only, so `1e-3` is a float, `yes` and `2024-01-01` are text and `010` is ten. What `dump_yaml` writes reads
back equal, and no YAML 1.1 reader takes its text for a number, a date or a truth value.
"""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import MappingNode, ScalarNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import BaseResolver, implicit_resolvers

from distunlearn.common.text import printable
from distunlearn.errors import ConfigError
from distunlearn.verify.records import open_plain

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
_OTHER_LINE_ENDS = re.compile("[\x85\u2028\u2029]")
MAX_DIGITS = 300  # Python refuses to convert integers of more than 4300 digits; no setting needs this many

# (tag, pattern, first characters) of plain scalars; ruamel's own list has hexadecimal numbers, dates and merges, too
_SCALARS = (
    ("null", r"(?:null|Null|NULL|~|)\Z", ["n", "N", "~", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)\Z", list("tTfF")),
    ("int", r"[-+]?[0-9]+(?:_[0-9]+)*\Z", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z", list("-+.0123456789")),
)


class _Resolver(BaseResolver):
    """Types of plain scalars by `_SCALARS` alone, whatever version a document names."""

    processing_version = (1, 2)

    def __init__(self, version: Any = None, loader: Any = None) -> None:
        super().__init__(loader)


class _DumpResolver(_Resolver):
    """Knows also what another reader would take for something else, so that such text is quoted."""


for _name, _pattern, _first in _SCALARS:
    _Resolver.add_implicit_resolver_base(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), _first)
for _, _tag, _regexp, _first in implicit_resolvers:
    _DumpResolver.add_implicit_resolver_base(_tag, _regexp, _first)


class _Composer(Composer):
    """Refuses tags, anchors, aliases and deep nesting where they begin; keys are text."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event, refused = self.parser.peek_event(), None
        if isinstance(event, AliasEvent):
            refused = f"alias *{event.anchor} is not allowed"
        elif event.anchor is not None:
            refused = f"anchor &{event.anchor} is not allowed"
        elif event.tag is not None:
            refused = f"tag {event.tag!r} is not allowed"
        elif self.depth >= MAX_DEPTH:
            refused = f"nested deeper than {MAX_DEPTH} levels"
        node = None if refused else super().compose_node(parent, index)
        if node is not None and isinstance(parent, MappingNode) and index is None:
            refused = None if isinstance(node, ScalarNode) else "a key must be plain text"
            node.ctag = _Resolver.DEFAULT_SCALAR_TAG
        if refused:
            raise ComposerError(None, None, refused, event.start_mark)
        return node


class _Constructor(SafeConstructor):
    """Numbers of bounded length and size."""

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > MAX_DIGITS:
            raise ConstructorError(None, None, "a number is too long", node.start_mark)
        return int(node.value)

    def construct_yaml_float(self, node: Any) -> float:
        if not math.isfinite(value := float(node.value)):
            raise ConstructorError(None, None, f"{node.value} is too large for a number", node.start_mark)
        return value


class _Representer(SafeRepresenter):
    """Writes no aliases, and escapes what a reader may take for the end of a line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: Any) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:str", data, '"' if _OTHER_LINE_ENDS.search(data) else None)


_Representer.add_representer(str, _Representer.represent_str)
for _name in ("int", "float"):
    _Constructor.add_default_constructor(_name)


def _reader() -> YAML:
    reader = YAML(typ="safe", pure=True)
    reader.Resolver, reader.Composer, reader.Constructor = _Resolver, _Composer, _Constructor
    return reader


def parse_yaml(text: str, origin: str) -> Any:
    """The data of one YAML document.

    Args:
        text: the document, at most `MAX_BYTES` once encoded.
        origin: what the errors call it (a file name, "--set a=b").

    Raises:
        ConfigError: for everything this module does not accept, naming `origin`, line and column.
    """
    try:
        return _reader().load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{origin}{place}: not valid YAML ({printable(error.problem or error.context)})") from None
    except ReaderError as error:
        code = error.character if isinstance(error.character, int) else ord(error.character)
        raise ConfigError(f"{origin}: the character U+{code:04X} at position {error.position} is not allowed") from None


def parse_scalar(text: str, origin: str) -> Any:
    """The value behind `--set key=`: a plain scalar, taken whole, or quoted text, `[...]` or `{...}` as YAML.

    A plain value is never cut at `#` or `: `, so paths need no quotes beyond those of the shell.
    """
    if text[:1] in ("'", '"', "[", "{"):
        return parse_yaml(text, origin)
    reader = _reader()
    try:
        node = ScalarNode(reader.resolver.resolve(ScalarNode, text, (True, False)), text)
        return reader.constructor.construct_object(node)
    except ConstructorError as error:
        raise ConfigError(f"{origin}: {error.problem}") from None


def read_yaml(path: Path) -> Any:
    """The data of a YAML file.

    Raises:
        ConfigError: the file cannot be read, is larger than `MAX_BYTES`, is not UTF-8 (with the offset of
            the first wrong byte), or holds something that `parse_yaml` does not accept.
    """
    try:
        with open_plain(path) as handle:
            data = handle.read(MAX_BYTES + 1)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"{path}: the config file cannot be read ({reason})") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: a config file may have at most {MAX_BYTES} bytes; this one is larger")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}); save the file as UTF-8"
        ) from None
    return parse_yaml(text.removeprefix("\ufeff"), str(path))


def dump_yaml(data: Any) -> str:
    """`data` (dicts, lists, text, numbers, booleans, None) as YAML text, keys in their own order."""
    writer = YAML(typ="safe", pure=True)
    writer.Resolver, writer.Representer = _DumpResolver, _Representer
    writer.default_flow_style, writer.width = False, 4096
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.dump(data, stream := io.StringIO())
    return stream.getvalue()
