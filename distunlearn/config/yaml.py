"""YAML as configuration needs it: plain data, one meaning, nothing executed.

A file is at most 1 MiB of UTF-8 and holds one document of mappings, lists and scalars. Tags, anchors,
aliases and duplicate keys are refused. Scalars follow the YAML 1.2 core schema with decimal numbers only,
so `1e-3` is a float, `yes` and `2024-01-01` are text and `010` is ten. Everything written by `dump_yaml`
reads back equal.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from distunlearn.common.text import printable
from distunlearn.errors import ConfigError

__all__ = ["MAX_BYTES", "dump_yaml", "parse_scalar", "parse_yaml", "read_yaml"]

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_DIGITS = 300  # Python refuses to convert integers of more than 4300 digits; no setting needs this many

# (tag, pattern, first characters); the first that matches a plain scalar gives its type
_SCALARS = (
    ("tag:yaml.org,2002:null", re.compile(r"^(?:null|Null|NULL|~|)$"), ["n", "N", "~", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+(?:_[0-9]+)*$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader without tags, anchors, aliases and duplicate keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, f"alias *{event.anchor} is not allowed", event.start_mark)
        if event.anchor is not None:
            raise yaml.composer.ComposerError(None, None, f"anchor &{event.anchor} is not allowed", event.start_mark)
        if event.tag is not None:
            raise yaml.composer.ComposerError(None, None, f"tag {event.tag!r} is not allowed", event.start_mark)
        if self.depth >= MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {MAX_DEPTH} levels", event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} is given more than once", key.start_mark
                )
            seen.add(key.value)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}

    def construct_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(None, None, "a number is too long", node.start_mark)
        return int(node.value)

    def construct_float(self, node: yaml.ScalarNode) -> float:
        value = float(node.value)
        if not math.isfinite(value):
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value} is too large for a number", node.start_mark
            )
        return value


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes whatever this module, or a YAML 1.1 reader, would take for something else."""

    yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_yaml_map)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_float)


def parse_yaml(text: str, origin: str) -> Any:
    """The data of one YAML document.

    Args:
        text: the document, at most `MAX_BYTES` once encoded.
        origin: what the errors call it (a file name, "--set a=b").

    Raises:
        ConfigError: for everything this module does not accept, naming `origin`, line and column.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{origin}{place}: not valid YAML ({printable(error.problem or error.context)})") from None
    except yaml.reader.ReaderError as error:
        code = error.character if isinstance(error.character, int) else ord(error.character)
        raise ConfigError(f"{origin}: the character U+{code:04X} at position {error.position} is not allowed") from None


def parse_scalar(text: str, origin: str) -> Any:
    """The value behind `--set key=`: a plain scalar, taken whole, or quoted text, `[...]` or `{...}` as YAML.

    A plain value is never cut at `#` or `: `, so paths need no quotes beyond those of the shell.
    """
    if text[:1] in ("'", '"', "[", "{"):
        return parse_yaml(text, origin)
    node = yaml.ScalarNode("", text, style=None)
    for tag, pattern, _ in _SCALARS:
        if pattern.match(text):
            node.tag = tag
            try:
                return _Loader("").construct_object(node)
            except yaml.constructor.ConstructorError as error:
                raise ConfigError(f"{origin}: {error.problem}") from None
    return text


def read_yaml(path: Path) -> Any:
    """The data of a YAML file.

    Raises:
        ConfigError: the file cannot be read, is larger than `MAX_BYTES`, is not UTF-8 (with the offset of
            the first wrong byte), or holds something that `parse_yaml` does not accept.
    """
    try:
        with path.open("rb") as handle:
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
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=4096, default_flow_style=False)
