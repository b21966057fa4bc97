"""RunConfig in and out: recipe, then config file, then `--set`, checked as a whole before anything else happens.

Every problem is found before the first is reported, and each names where the value came from, the key, what
was found and what was expected. The resolved config is saved as YAML and reads back to the same digest.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from distunlearn.common.files import write_atomic
from distunlearn.common.text import printable
from distunlearn.config import registry
from distunlearn.config.checks import SOURCES, cross_checks, forget_is_file
from distunlearn.config.preprocessing import PREPROCESSING, with_preprocessing
from distunlearn.config.recipes import RECIPES
from distunlearn.config.registry import KINDS, Kind
from distunlearn.config.schema import RunConfig
from distunlearn.config.shape import Path as Key
from distunlearn.config.shape import (
    canonical,
    get,
    marks,
    parts,
    plain,
    shape,
    validate,
)
from distunlearn.config.yaml import dump_yaml, parse_scalar, read_yaml
from distunlearn.errors import ConfigError

KEY = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


class _Given(NamedTuple):
    """A value as it was given: where, and in which layer (0: the file, 1: the command line)."""

    path: Key
    value: Any
    origin: str
    layer: int


@dataclasses.dataclass
class _Draft:
    """A config under construction: plain data, where each given value came from, and what is wrong so far.

    parts: the class of the settings of each section that has one of its own.
    """

    tree: dict[str, Any]
    base: str
    parts: dict[str, type]
    origins: dict[Key, str] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    refused: set[str] = dataclasses.field(default_factory=set)

    @property
    def fields(self) -> dict[Key, Any]:
        return shape(tuple(self.parts.items())).fields

    @property
    def sections(self) -> dict[Key, type]:
        return shape(tuple(self.parts.items())).sections

    def origin(self, path: Key) -> str:
        """Where the value at `path` was given; the recipe if nowhere else."""
        return self.origins.get(path, self.base)

    def refuse(self, path: Key, origin: str, sentence: str) -> None:
        """Record a problem; the key is left out of the checks that follow."""
        self.problems.append(f"{origin}: {sentence}")
        self.refused.add(".".join(path))


def load_config(
    recipe: str | None, config_file: Path | None, overrides: list[str], *, world: int | None = None, begun: bool = False
) -> RunConfig:
    """Resolve and check one run.

    Args:
        recipe: a name in RECIPES; None: the one named in the file, else the default recipe.
        config_file: YAML that replaces single values of the recipe, such as the run.yaml of another run.
        overrides: `key=value` texts as given to `--set`, applied last and in order; values are YAML scalars
            (or `[...]`, `{...}`), and an empty value is null.
        world: number of processes the batches are shared by. None: what the launcher announced in
            WORLD_SIZE, since this runs before any process group exists.
        begun: see `cross_checks`.

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
    draft = _Draft(plain(base), f"recipe {base.recipe}", parts(base))
    given = [*_flat(data, str(config_file)), *filter(None, (_override(draft, text) for text in overrides))]
    for kind in KINDS:
        given = _choose(draft, base, kind, given)
    fallback = json.loads(json.dumps(draft.tree))
    for value in given:
        _put(draft, value)
    if draft.tree["encoder"]["checkpoint"] is not None:  # the recipe cannot know how somebody's encoder sees its images
        draft.tree["encoder"] |= {k: None for k in PREPROCESSING if ("encoder", k) not in draft.origins}
    cfg = _validated(draft, fallback)
    cfg = dataclasses.replace(cfg, encoder=with_preprocessing(cfg.encoder))
    checks = cross_checks(cfg, _world_announced() if world is None else world, begun)
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
    return dump_yaml(plain(canonical(cfg)))


def require_inputs(cfg: RunConfig, out: Path) -> None:
    """ConfigError if a file or folder that the settings name, and that the run in `out` still needs, is not there."""
    shards = Path(cfg.data.shards).expanduser() if cfg.data.shards else Path(out) / "shards"
    named = {"encoder.checkpoint": cfg.encoder.checkpoint, "runtime.reuse": cfg.runtime.reuse}
    if not cfg.runtime.reuse and not (shards / "summary.json").exists():
        named |= {f"data.{key}": getattr(cfg.data, key) for key in ("root", "holdout_root", "third_party_root")}
    if forget_is_file(cfg.data.forget) and not (Path(out) / "request.json").exists():
        named["data.forget"] = str(cfg.data.forget)
    if not (Path(out) / "retrained" / "done.json").exists():
        named |= {f"audit.reference[{k}]": place for k, place in enumerate(cfg.audit.reference)}
    gone = [f"{key}={value}" for key, value in named.items() if value and not Path(value).expanduser().exists()]
    if gone:
        raise ConfigError(f"{', '.join(gone)}: there is no such file or folder; check the path.")


def save_config(cfg: RunConfig, path: Path) -> None:
    """Write `dump_config` to `path`, whole or not at all."""
    write_atomic(path, dump_config(cfg))


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


def _flat(data: dict[str, Any], origin: str, at: Key = ()) -> Iterator[_Given]:
    """The values of a config file, by key; a free group (encoder.args) is one value."""
    groups = {path for path in shape(tuple(parts(RunConfig()).items())).sections}
    for key, value in data.items():
        path = (*at, str(key))
        if path in groups and isinstance(value, dict):
            yield from _flat(value, origin, path)
        else:
            yield _Given(path, value, origin, 0)


def _override(draft: _Draft, text: str) -> _Given | None:
    """One `key=value` of the command line; None if it is none."""
    key, equals, value_text = text.partition("=")
    key = key.strip()
    origin = f"--set {printable(text, 80)}"
    if not equals or not KEY.fullmatch(key):
        draft.problems.append(f"{origin}: expected key=value, such as seed=1 or pretrain.lr=1e-3")
        return None
    path = tuple(key.split("."))
    try:
        value = parse_scalar(value_text, origin)
    except ConfigError as error:
        draft.problems.append(str(error))
        draft.refused.add(key)
        return None
    if path == ("recipe",) and value != draft.tree["recipe"]:
        draft.refuse(path, origin, "the recipe is chosen by its name on the command line, not with --set")
        return None
    return _Given(path, value, origin, 1)


def _choose(draft: _Draft, base: RunConfig, kind: Kind, given: list[_Given]) -> list[_Given]:
    """Give the section the settings of the part that is named last; returns the values that are left to be set.

    Where a layer names another part than those below it, their values for this section that the other part does not
    have are dropped: they belong to what they were written for. Values in the layer that names the part, or above it,
    are kept, to be refused if the part does not have them.
    """
    at = (kind.section, kind.key)
    named = [value for value in given if value.path == at]
    name = recipes = getattr(getattr(base, kind.section), kind.key)
    section = getattr(base, kind.section)
    floor = 0
    for choice in named:
        if choice.layer > 0 and choice.value != name and any(v.layer == 0 for v in named):
            floor = choice.layer  # a file that is about another part
        name = choice.value
    if name != recipes:
        try:
            chosen = registry.settings_class(kind, name)
        except ConfigError as error:
            draft.refuse(at, named[-1].origin, str(error))
            return [value for value in given if value.path[:1] != at[:1]]
        section = registry.switched(kind, section, name)
        draft.parts[kind.section] = chosen
        draft.tree[kind.section] = plain(section)
    known = {field.name for field in dataclasses.fields(section)}
    return [v for v in given if v.path[0] != kind.section or v.layer >= floor or v.path[-1] in known]


def _put(draft: _Draft, given: _Given) -> None:
    """Set one value; what is no setting becomes a problem. A key below a free group sets that entry only."""
    path, value, origin, _ = given
    name, free = _name(path), draft.fields.get(path[:-1]) == dict[str, Any]
    if path in draft.sections:
        kind = "a group of settings"
        first = _name(next(p for p in draft.fields if p[: len(path)] == path))
        draft.refuse(path, origin, f"{name}: found {_show(value)}, expected {kind}; set one of them, such as {first}")
        return
    if path not in draft.fields and not (free and isinstance(get(draft.tree, path[:-1]), dict)):
        draft.refuse(path, origin, _unknown(draft, path))
        return
    mark = {} if free else marks(draft.fields[path])
    is_path = "path" in mark or (name == "data.forget" and forget_is_file(value))
    if is_path and isinstance(value, str) and isinstance(get(draft.tree, path), list):
        value = value.split(",")
    if is_path and isinstance(value, str):
        value = _whole_path(value)
    elif is_path and isinstance(value, list):
        value = [_whole_path(part) if isinstance(part, str) else part for part in value]
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        draft.refuse(path, origin, f"{name}: found {_show(value)}, which is not valid Unicode")
        return
    get(draft.tree, path[:-1])[path[-1]] = value
    draft.origins[path] = origin
    if free:
        draft.origins[path[:-1]] = origin
    draft.refused.discard(name)


def _whole_path(value: str) -> str:
    """Absolute, so that a run directory can be used from any folder; a URL stays what it is."""
    return value if "://" in value or not value else os.path.abspath(os.path.expanduser(value))


def _unknown(draft: _Draft, path: Key) -> str:
    """The sentence for an unknown key: whose it is, and the nearest that exist, in its own section first."""
    keys = [*draft.fields, *draft.sections]
    beside = {key[-1]: key for key in keys if key[:-1] == path[:-1]}
    close = [beside[name] for name in difflib.get_close_matches(path[-1], beside, n=1)]
    if not close:
        by_name = {_name(key): key for key in keys}
        close = [by_name[name] for name in difflib.get_close_matches(_name(path), by_name, n=1, cutoff=0.8)]
    if not close:
        leaves = difflib.get_close_matches(path[-1], [key[-1] for key in draft.fields], n=1, cutoff=0.75)
        close = [key for key in draft.fields if key[-1] in leaves][:3]
    hint = f"did you mean {' or '.join(map(_name, close))}?" if close else f"expected one of {', '.join(beside)}"
    kind = next((kind for kind in KINDS if path[:-1] == (kind.section,)), None)
    if kind is not None:
        chosen = f"{kind.setting}={_show(get(draft.tree, (kind.section, kind.key))).strip(chr(34))}"
        whose = registry.owners(kind, path[-1])
        having = f" (it is a setting of {', '.join(whose)})" if whose else ""
        return f"unknown key {_name(path)} with {chosen}{having}; {hint}"
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


def _validated(draft: _Draft, fallback: dict[str, Any]) -> RunConfig:
    """The draft as a RunConfig. A wrong value becomes a problem and gives way to the recipe's, for later checks."""
    fields = draft.fields
    wrong: dict[Key, list[str]] = {}
    try:
        validate(draft.tree)
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=False, include_input=False):
            loc = tuple(str(part) for part in detail["loc"])
            # a union adds the names of its members to the location, a dict its keys
            path = next((loc[:end] for end in range(len(loc), 0, -1) if loc[:end] in fields), loc)
            if path not in fields:
                raise AssertionError(f"no such setting: {path}") from error
            wrong.setdefault(path, []).append(detail["msg"])
    for path, annotation in fields.items():
        if _misses_literal(annotation, get(draft.tree, path)):
            wrong.setdefault(path, [f"Input should be {' or '.join(map(repr, typing.get_args(annotation)))}"])
    for path, messages in wrong.items():
        value = get(draft.tree, path)
        expected = " or ".join(message[:1].lower() + message[1:] for message in dict.fromkeys(messages))
        expected = expected.replace("input should be", "expected", 1).replace(" or input should be", " or")
        hint = _nearest_choice(fields[path], value)
        draft.refuse(path, draft.origin(path), f"{_name(path)}: found {_show(value)}, {expected}{hint}")
        get(draft.tree, path[:-1])[path[-1]] = get(fallback, path)
    try:
        return validate(draft.tree)
    except ValidationError:
        _raise(draft.problems)  # the recipe's own values are wrong too
        raise


def _misses_literal(annotation: Any, value: Any) -> bool:
    """Whether a choice is equal to an offered value but of another type: True == 1 must not pass for 1."""
    options = typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()
    return bool(options) and not any(type(option) is type(value) and option == value for option in options)


def _nearest_choice(annotation: Any, value: Any) -> str:
    while typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if isinstance(value, str) and typing.get_origin(annotation) is tuple:
        return f"; write it as a list, such as [{printable(value, 40)}]"
    if typing.get_origin(annotation) is not Literal or not isinstance(value, str):
        return ""
    close = difflib.get_close_matches(value, [str(option) for option in typing.get_args(annotation)], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _name(path: Key) -> str:
    return printable(".".join(path), 120)


def _show(value: Any) -> str:
    return printable(json.dumps(value, ensure_ascii=False), 80)
