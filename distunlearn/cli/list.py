"""What can be named in a config: read from the tables themselves, each only when it is asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from distunlearn.config import registry
from distunlearn.config.recipes import RECIPES
from distunlearn.errors import ConfigError


def _first_line(thing: Any) -> str:
    """First sentence of what documents `thing`: its own docstring, or its module's."""
    text = inspect.getdoc(thing) if callable(thing) else None
    if not text:
        text = inspect.getdoc(inspect.getmodule(thing)) or ""
    return text.split("\n\n")[0].replace("\n", " ").strip()


def _found(kind: registry.Kind, text: Callable[[Any], str]) -> dict[str, str]:
    """A text for every part; one that cannot be imported says so and hides no other."""
    entries = {}
    for name in registry.names(kind):
        try:
            entries[name] = text(registry.find(kind, name))
        except ConfigError as error:
            entries[name] = str(error)
    return entries


def _methods() -> dict[str, str]:
    def text(method: Any) -> str:
        needs = ", ".join(need.replace("_", " ") for need in method.needs)
        return f"{method.summary} ({f'needs: {needs}; ' if needs else ''}guarantee: {method.guarantee})"

    return _found(registry.METHOD, text)


def _objectives() -> dict[str, str]:
    return _found(registry.OBJECTIVE, lambda objective: objective.summary)


def _evaluators() -> dict[str, str]:
    return _found(registry.EVALUATOR, lambda evaluator: evaluator.summary)


def _attacks() -> dict[str, str]:
    from distunlearn.audit.attacks import attack

    return {name: _first_line(attack(name)) for name in registry.ATTACKS}


def _recipes() -> dict[str, str]:
    return {name: _first_line(recipe) for name, recipe in RECIPES.items()}


def _encoders() -> dict[str, str]:
    from distunlearn.encoders import list_encoders

    return {name: "" for name in list_encoders()}


KINDS: dict[str, Callable[[], Mapping[str, str]]] = {
    "methods": _methods,
    "encoders": _encoders,
    "objectives": _objectives,
    "evaluators": _evaluators,
    "attacks": _attacks,
    "recipes": _recipes,
}
SHOWN = 10  # encoders come by the hundred; the full list is given when it is asked for by name


def catalog_text(kind: str | None = None) -> str:
    """The names of one kind, one a line with what they are; None: all kinds, long ones shortened and saying so."""
    if kind is not None:
        return "\n".join(_lines(KINDS[kind]()))
    parts = []
    for name, entries in KINDS.items():
        lines = _lines(entries())
        if name == "encoders" and len(lines) > SHOWN:
            lines = [*lines[:SHOWN], f"... {len(lines) - SHOWN} more: distunlearn list encoders"]
        parts.append("\n".join([f"{name}:", *(f"  {line}" for line in lines)]))
    return "\n\n".join(parts)


def names(kind: str | None = None) -> dict[str, dict[str, str]]:
    """{kind: {name: what it is}} of one kind, or of all."""
    return {each: dict(KINDS[each]()) for each in ([kind] if kind else KINDS)}


def _lines(entries: Mapping[str, str]) -> list[str]:
    width = max(map(len, entries), default=0)
    return [f"{name:<{width}}  {text}".rstrip() for name, text in entries.items()]
