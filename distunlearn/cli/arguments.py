"""Arguments that several verbs of the command line share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from distunlearn.common.text import printable
from distunlearn.errors import ConfigError

if TYPE_CHECKING:
    from distunlearn.config.schema import RunConfig

Out = Annotated[Path, tyro.conf.arg(metavar="DIR", help="run directory; made if it does not exist")]
Config = Annotated[
    Path | None,
    tyro.conf.arg(name="config", metavar="FILE", help="YAML that replaces values of the recipe", help_behavior_hint=""),
]
Overrides = Annotated[
    tyro.conf.UseAppendAction[tuple[str, ...]],
    tyro.conf.arg(name="set", metavar="KEY=VALUE", help="replace one value, such as pretrain.lr=1e-3"),
]
Recipe = Annotated[
    str | None,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="[RECIPE]", help="settings to start from: see distunlearn list recipes", help_behavior_hint=""
    ),
]
Previous = Annotated[
    Path | None,
    tyro.conf.arg(metavar="RUN", help="run directory of the request before, which goes on", help_behavior_hint=""),
]
Seeds = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="N,N,...", help="run each of these seeds in DIR/seed-N, and judge them as one", help_behavior_hint=""
    ),
]
RunDir = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR", help="run directory")]


def resolved(
    recipe: str | None, config: Path | None, overrides: Sequence[str], world: int | None = None,
    needed_by: Path | None = None,
) -> RunConfig:  # fmt: skip
    """The settings that these arguments mean.

    world: as `load_config`. needed_by: a run directory; what the settings name and it still needs must be there.
    """
    from distunlearn.config.load import load_config, require_inputs

    cfg = load_config(recipe, config, list(overrides), world=world)
    if needed_by is not None:
        require_inputs(cfg, needed_by)
    return cfg


def pipeline() -> ModuleType:
    """The verbs as functions; imported when one is called, for they bring torch."""
    from distunlearn.run import pipeline

    return pipeline


def settings_of(verb: Any, world: int | None = None, needed_by: Path | None = None) -> RunConfig:
    """The settings of a verb with `recipe`, `config` and `overrides`, and with `previous` where it has that.

    Raises:
        ConfigError: it has none to start from, or two.
    """
    previous = getattr(verb, "previous", None)
    if previous is None and verb.recipe is None and verb.config is None:
        raise ConfigError("no settings to start from; name a recipe (see: distunlearn list recipes) or give --config")
    if previous is None:
        return resolved(verb.recipe, verb.config, verb.overrides, world, needed_by)
    if verb.recipe is not None or verb.config is not None:
        raise ConfigError("--previous takes the settings of that run; leave the recipe and --config out")
    return pipeline().next_config(previous, list(verb.overrides), world)


def yaml_list(option: str, text: str, kind: type, example: str) -> tuple[Any, ...]:
    """A YAML list of texts or whole numbers; its brackets may be left out."""
    from distunlearn.config.yaml import parse_scalar

    found = parse_scalar(text if text.startswith("[") else f"[{text}]", option)
    if not isinstance(found, list) or not all(type(value) is kind for value in found):
        raise ConfigError(f"{option} is {printable(text, 60)!r}, expected a list such as {example}")
    return tuple(found)


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The sentence about a name that is none of the known ones, with the nearest of them."""
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
    return f"unknown {what} {printable(name, 40)!r}; {hint}"
