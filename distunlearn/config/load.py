"""RunConfig in and out: recipe, then config file, then `--set`, checked as a whole before anything else happens.

Every problem is found before the first is reported, and each names where the value came from, the key, what
was found and what was expected. The resolved config is saved as YAML and reads back to the same digest.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import os
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from distunlearn.common.text import printable
from distunlearn.config.checks import PATH_KEYS, SOURCES, cross_checks, forget_is_file
from distunlearn.config.recipes import RECIPES
from distunlearn.config.schema import RunConfig
from distunlearn.config.yaml import dump_yaml, parse_scalar, read_yaml
from distunlearn.errors import ConfigError

__all__ = [
    "SOURCES", "cross_checks", "digest", "dump_config", "field_diff", "known_keys", "load_config", "load_source",
    "save_config", "settings",
]  # fmt: skip

KEY = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
BOUNDS = (("gt", "greater than"), ("ge", "at least"), ("lt", "less than"), ("le", "at most"))
NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}

Path_ = tuple[str, ...]  # a key, split at its dots


@dataclasses.dataclass
class _Draft:
    """A config under construction: plain data, where each given value came from, and what is wrong so far."""

    tree: dict[str, Any]
    base: str
    origins: dict[Path_, str] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    refused: set[str] = dataclasses.field(default_factory=set)

    def origin(self, path: Path_) -> str:
        """Where the value at `path` was given; the recipe if nowhere else."""
        return self.origins.get(path, self.base)

    def refuse(self, path: Path_, origin: str, sentence: str) -> None:
        """Record a problem; the key is left out of the checks that follow."""
        self.problems.append(f"{origin}: {sentence}")
        self.refused.add(".".join(path))


def load_config(
    recipe: str | None, config_file: Path | None, overrides: list[str], *, world: int | None = None
) -> RunConfig:
    """Resolve and check one run.

    Args:
        recipe: a name in RECIPES; None: the one named in the file, else the default recipe.
        config_file: YAML that replaces single values of the recipe, such as the run.yaml of another run.
        overrides: `key=value` texts as given to `--set`, applied last and in order; values are YAML scalars
            (or `[...]`, `{...}`), and an empty value is null.
        world: number of processes the batches are shared by. None: what the launcher announced in
            WORLD_SIZE, since this runs before any process group exists.

    Raises:
        ConfigError: with all problems of the resolved config, each in one sentence.
    """
    data: dict[str, Any] = {}
    if config_file is not None:
        loaded = read_yaml(config_file)
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"{config_file}: found {_show(loaded)}, expected settings such as 'seed: 1'")
        data = loaded or {}
    base = _base(recipe, config_file, data)
    draft = _Draft(_tree(base), base=f"recipe {base.recipe}")
    _merge(draft, data, str(config_file))
    for text in overrides:
        _override(draft, text)
    cfg = _validated(draft, base)
    checks = cross_checks(cfg, _world_announced() if world is None else world)
    draft.problems += [check for check in checks if not any(key in check for key in draft.refused)]
    _raise(draft.problems)
    return cfg


def load_source(source: str | None, config_file: Path | None, overrides: list[str]) -> RunConfig:
    """`load_config` where a source of images may stand in the place of a recipe; a recipe of that name goes first."""
    if source in SOURCES and source not in RECIPES:
        return load_config(None, config_file, [f"data.source={source}", *overrides])
    return load_config(source, config_file, overrides)


def dump_config(cfg: RunConfig) -> str:
    """The resolved config as YAML text; `load_config` of it gives an equal config."""
    return dump_yaml(_tree(_canonical(cfg)))


def save_config(cfg: RunConfig, path: Path) -> None:
    """Write `dump_config` to `path`, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as handle:
            handle.write(dump_config(cfg))
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# Settings that came later, at the value that changes nothing: left out, so that older results keep their digest.
NEUTRAL = {
    ("audit", "stress"): None, ("constraint", "memory"): 0, ("method", "anchor_weight"): 0.0,
    ("unlearn", "third_party_draw"): "uniform",
}  # fmt: skip


def digest(cfg: RunConfig) -> str:
    """sha256 (hex) of the config as canonical JSON: equal for configs that mean the same run."""
    tree = _tree(_canonical(cfg))
    for (part, key), value in NEUTRAL.items():
        if tree[part][key] == value:
            del tree[part][key]
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def field_diff(a: RunConfig, b: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, with both values, in the order of config.py; empty for equal configs."""
    left, right = (dict(_leaves(_tree(_canonical(cfg)))) for cfg in (a, b))
    return {".".join(path): (left[path], right[path]) for path in left if left[path] != right[path]}


def settings(cfg: RunConfig) -> dict[str, Any]:
    """Every key with its value, as plain data, in the order of config.py."""
    return {".".join(path): value for path, value in _leaves(_tree(_canonical(cfg)))}


def known_keys() -> list[str]:
    """Every key that `--set` takes, with dots, in the order of config.py."""
    return [".".join(path) for path in _fields()]


# Resolving: recipe, file, overrides


def _base(recipe: str | None, config_file: Path | None, data: dict[str, Any]) -> RunConfig:
    """The recipe everything starts from; `recipe` in the file must agree with the one asked for."""
    named = data.get("recipe")
    if named is not None and recipe is not None and named != recipe:
        raise ConfigError(f"{config_file}: recipe is {_show(named)}, but {recipe} was asked for; name only one of them")
    name, origin = (recipe, "") if recipe is not None else (named, f"{config_file}: ")
    if name is None:
        name = RunConfig().recipe
    if not isinstance(name, str) or name not in RECIPES:
        close = difflib.get_close_matches(str(name), RECIPES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(RECIPES)}"
        raise ConfigError(f"{origin}unknown recipe {_show(name)}; {hint}")
    return dataclasses.replace(RECIPES[name](), recipe=name)


def _merge(draft: _Draft, data: dict[str, Any], origin: str, at: Path_ = ()) -> None:
    """Lay the values of a config file over the draft; unknown keys and broken sections become problems."""
    for key, value in data.items():
        path = (*at, key)
        if path in _sections():
            if isinstance(value, dict):
                _merge(draft, value, origin, path)
            else:
                draft.refuse(path, origin, f"{_name(path)}: found {_show(value)}, expected a group of settings")
        elif path in _fields():
            _put(draft, path, value, origin)
        else:
            draft.refuse(path, origin, _unknown(path))


def _override(draft: _Draft, text: str) -> None:
    """Apply one `key=value`. A key below a free dict (encoder.args.depth) sets that entry only."""
    key, equals, value_text = text.partition("=")
    key = key.strip()
    origin = f"--set {printable(text, 80)}"
    if not equals or not KEY.fullmatch(key):
        draft.problems.append(f"{origin}: expected key=value, such as seed=1 or pretrain.lr=1e-3")
        return
    path = tuple(key.split("."))
    try:
        value = parse_scalar(value_text, origin)
    except ConfigError as error:
        draft.problems.append(str(error))
        draft.refused.add(key)
        return
    if path in _sections():
        draft.refuse(path, origin, f"{key} is a group of settings; set one of them, such as {_first_key(path)}")
    elif path == ("recipe",) and value != draft.tree["recipe"]:
        draft.refuse(path, origin, "the recipe is chosen by its name on the command line, not with --set")
    elif path in _fields():
        _put(draft, path, value, origin)
    elif _fields().get(path[:-1]) == dict[str, Any] and isinstance(_get(draft.tree, path[:-1]), dict):
        _put(draft, path, value, origin)
        draft.origins[path[:-1]] = origin
    else:
        draft.refuse(path, origin, _unknown(path))


def _put(draft: _Draft, path: Path_, value: Any, origin: str) -> None:
    is_path = _name(path) in PATH_KEYS or (_name(path) == "data.forget" and forget_is_file(value))
    if is_path and isinstance(value, str):
        value = os.path.expanduser(value)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        draft.refuse(path, origin, f"{_name(path)}: found {_show(value)}, which is not valid Unicode")
        return
    _get(draft.tree, path[:-1])[path[-1]] = value
    draft.origins[path] = origin
    draft.refused.discard(_name(path))


def _get(tree: Any, path: Path_) -> Any:
    return functools.reduce(lambda node, key: node[key], path, tree)


def _unknown(path: Path_) -> str:
    """The sentence for an unknown key, with the nearest that exist: in its own section first, then anywhere."""
    keys = [*_fields(), *_sections()]
    beside = {key[-1]: key for key in keys if key[:-1] == path[:-1]}
    close = [beside[name] for name in difflib.get_close_matches(path[-1], beside, n=1)]
    if not close:
        by_name = {_name(key): key for key in keys}
        close = [by_name[name] for name in difflib.get_close_matches(_name(path), by_name, n=1, cutoff=0.8)]
    if not close:
        leaves = difflib.get_close_matches(path[-1], [key[-1] for key in _fields()], n=1, cutoff=0.75)
        close = [key for key in _fields() if key[-1] in leaves][:3]
    hint = f"did you mean {' or '.join(map(_name, close))}?" if close else f"expected one of {', '.join(beside)}"
    return f"unknown key {_name(path)}; {hint}" if close or beside else f"unknown key {_name(path)}"


def _world_announced() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"WORLD_SIZE is {text!r}, expected the number of processes")
    return int(text)


def _raise(problems: list[str]) -> None:
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("\n  - ".join([f"{len(problems)} problems in the configuration:", *problems]))


# Checking types and ranges


@functools.cache
def _adapter() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


def _validate(tree: dict[str, Any]) -> RunConfig:
    """JSON mode, since strict mode takes a dict for a dataclass from JSON only."""
    return _adapter().validate_json(json.dumps(tree))


def _validated(draft: _Draft, base: RunConfig) -> RunConfig:
    """The draft as a RunConfig. A wrong value becomes a problem and gives way to the recipe's, for later checks."""
    given, fallback = dict(_leaves(draft.tree)), dict(_leaves(_tree(base)))
    wrong = [path for path, value in given.items() if _misses_literal(_fields()[path], value)]
    try:
        _validate(draft.tree)
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=False):
            loc = tuple(str(part) for part in detail["loc"])
            # a union adds the names of its members to the location, a dict its keys
            path = next((loc[:end] for end in range(len(loc), 0, -1) if loc[:end] in _fields()), loc)
            if path not in wrong:
                wrong.append(path)
    for path in wrong:
        if path not in given:
            raise AssertionError(f"no such setting: {path}")
        expected = f"expected {_describe(_fields()[path])}{_nearest_choice(_fields()[path], given[path])}"
        draft.refuse(path, draft.origin(path), f"{_name(path)}: found {_show(given[path])}, {expected}")
        _get(draft.tree, path[:-1])[path[-1]] = fallback[path]
    try:
        return _validate(draft.tree)
    except ValidationError:
        _raise(draft.problems)  # the recipe's own values are wrong too
        raise


def _misses_literal(annotation: Any, value: Any) -> bool:
    """Whether a choice is equal to an offered value but of another type: True == 1 must not pass for 1."""
    options = typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()
    return bool(options) and not any(type(option) is type(value) and option == value for option in options)


def _describe(annotation: Any) -> str:
    """What a setting takes, in words."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        metas = [meta for info in args[1:] if isinstance(info, FieldInfo) for meta in info.metadata]
        words = [f"{word} {getattr(meta, bound):g}" for meta in metas for bound, word in BOUNDS if hasattr(meta, bound)]
        return " ".join([_describe(args[0]), *([" and ".join(words)] if words else [])])
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_describe, args))
    if origin is tuple:
        return f"a list (each {_describe(args[0])})"
    if origin is dict:
        return "a group of settings"
    return NAMES[annotation]


def _nearest_choice(annotation: Any, value: Any) -> str:
    if typing.get_origin(annotation) is not Literal or not isinstance(value, str):
        return ""
    close = difflib.get_close_matches(value, [str(option) for option in typing.get_args(annotation)], n=1)
    return f"; did you mean {close[0]}?" if close else ""


# The shape of RunConfig, and configs as plain data


@functools.cache
def _sections() -> dict[Path_, type]:
    return {path: kind for path, kind in _walk(RunConfig) if dataclasses.is_dataclass(kind)}


@functools.cache
def _fields() -> dict[Path_, Any]:
    return {path: kind for path, kind in _walk(RunConfig) if not dataclasses.is_dataclass(kind)}


def _walk(cls: type, at: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        path = (*at, field.name)
        yield path, hints[field.name]
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _walk(hints[field.name], path)


def _leaves(tree: dict[str, Any]) -> Iterator[tuple[Path_, Any]]:
    for path in _fields():
        yield path, _get(tree, path)


def _first_key(section: Path_) -> str:
    return _name(next(path for path in _fields() if path[: len(section)] == section))


def _tree(cfg: RunConfig) -> dict[str, Any]:
    """Plain data of a config, as JSON would hold it (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def _canonical(cfg: RunConfig) -> RunConfig:
    """`cfg` with every number in the type of its field, so that lr=1 and lr=1.0 are one config."""
    return _validate(_tree(cfg))


def _name(path: Path_) -> str:
    return printable(".".join(path), 120)


def _show(value: Any) -> str:
    return printable(json.dumps(value, ensure_ascii=False), 80)
