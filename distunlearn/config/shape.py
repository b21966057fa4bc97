"""What keys a config has, and configs as plain data: values by key, differences, digest, what fields say of themselves.

The keys depend on the parts that the config names: `method.forget_weight` is there with the methods that have it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import typing
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from distunlearn.config import registry
from distunlearn.config.registry import KINDS, Kind
from distunlearn.config.schema import RunConfig

Path = tuple[str, ...]  # a key, split at its dots


def digest(cfg: RunConfig) -> str:
    """sha256 (hex) of all settings that decide results, as canonical JSON: equal for configs that mean the same run."""
    free = set(marked(cfg, "affects"))
    deciding = {key: value for key, value in settings(cfg).items() if key not in free}
    text = json.dumps(deciding, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def field_diff(a: RunConfig, b: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, with both values (None where one has no such key); empty for equal configs."""
    left, right = settings(a), settings(b)
    return {key: (left.get(key), right.get(key)) for key in {**left, **right} if left.get(key) != right.get(key)}


def settings(cfg: RunConfig) -> dict[str, Any]:
    """Every key with its value, as plain data, in the order of schema.py."""
    tree = plain(canonical(cfg))
    return {".".join(path): get(tree, path) for path in shape(tuple(parts(cfg).items())).fields}


def known_keys() -> list[str]:
    """Every key that `--set` takes with one part or another, with dots, in the order of schema.py."""
    found = {".".join(path): None for path in shape(tuple(parts(RunConfig()).items())).fields}
    return [*found, *(key for kind in KINDS for key in part_keys(kind) if key not in found)]


def part_keys(kind: Kind) -> dict[str, list[str]]:
    """Every key of the section of this kind, with the names of the parts that have it."""
    found: dict[str, list[str]] = {}
    for name in registry.names(kind):
        for field in dataclasses.fields(registry.settings_class(kind, name)):
            found.setdefault(f"{kind.section}.{field.name}", []).append(name)
    return found


def marked(cfg: RunConfig, mark: str) -> list[str]:
    """Keys whose field says this of itself: "affects" (other values give the same results, up to rounding), "local"
    or "path" (see `schema.py`).
    """
    fields = shape(tuple(parts(cfg).items())).fields
    return [".".join(path) for path, annotation in fields.items() if mark in marks(annotation)]


def without_effect(section: Any) -> set[str]:
    """Names of the fields of one section that affect no result, beyond rounding."""
    hints = typing.get_type_hints(type(section), include_extras=True)
    return {field.name for field in dataclasses.fields(section) if "affects" in marks(hints[field.name])}


class Shape(NamedTuple):
    fields: dict[Path, Any]  # annotations of the settings
    sections: dict[Path, type]


def parts(cfg: RunConfig) -> dict[str, type]:
    """The class of the settings of each section that has one of its own."""
    return {kind.section: type(getattr(cfg, kind.section)) for kind in KINDS}


@functools.cache
def shape(parts: tuple[tuple[str, type], ...]) -> Shape:
    """Settings and sections of a config whose parts have these settings classes."""
    shape = Shape({}, {})

    def walk(cls: type, at: Path) -> None:
        hints = typing.get_type_hints(cls, include_extras=True)
        for field in dataclasses.fields(cls):
            path = (*at, field.name)
            kind = dict(parts).get(field.name, hints[field.name]) if not at else hints[field.name]
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                shape.sections[path] = kind
                walk(kind, path)
            else:
                shape.fields[path] = kind

    walk(RunConfig, ())
    return shape


def marks(annotation: Any) -> dict[str, Any]:
    """What a field says of itself, see `schema.py`."""
    if typing.get_origin(annotation) is not typing.Annotated:
        return {}
    infos = [info for info in typing.get_args(annotation)[1:] if isinstance(info, FieldInfo)]
    return {key: value for info in infos for key, value in (info.json_schema_extra or {}).items()}  # type: ignore[union-attr]


def plain(part: Any) -> dict[str, Any]:
    """Plain data of a config or a part of it, as JSON would hold it (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(part)))


@functools.cache
def _adapter() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


def validate(tree: dict[str, Any]) -> RunConfig:
    """JSON mode, since strict mode takes a dict for a dataclass from JSON only."""
    return _adapter().validate_json(json.dumps(tree))


def canonical(cfg: RunConfig) -> RunConfig:
    """`cfg` with every number in the type of its field, so that lr=1 and lr=1.0 are one config."""
    return validate(plain(cfg))


def get(tree: Any, path: Path) -> Any:
    return functools.reduce(lambda node, key: node[key], path, tree)
