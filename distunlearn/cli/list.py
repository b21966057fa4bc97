"""What can be named in a config: read from the tables themselves, each only when it is asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["KINDS", "catalog_text"]


def _first_line(thing: Any) -> str:
    """First sentence of what documents `thing`: its own docstring, or its module's."""
    text = inspect.getdoc(thing) if callable(thing) else None
    if not text:
        text = inspect.getdoc(inspect.getmodule(thing)) or ""
    return text.split("\n\n")[0].replace("\n", " ").strip()


def _methods() -> dict[str, str]:
    from distunlearn.methods import METHODS

    def text(entry: Any) -> str:
        needs = ", ".join(need.replace("_", " ") for need in entry.needs)
        return f"{entry.summary} ({f'needs: {needs}; ' if needs else ''}guarantee: {entry.guarantee})"

    return {name: text(entry) for name, entry in METHODS.items()}


def _objectives() -> dict[str, str]:
    from distunlearn.objectives import OBJECTIVES

    return {name: _first_line(inspect.getmodule(objective)) for name, objective in OBJECTIVES.items()}


def _attacks() -> dict[str, str]:
    from distunlearn.audit.attacks import ATTACKS, FURTHER, PAIRED

    attacks = {**ATTACKS, **FURTHER, **{name: attack for name, (attack, _) in PAIRED.items()}}
    return {name: _first_line(attack) for name, attack in attacks.items()}


def _recipes() -> dict[str, str]:
    from distunlearn.config.recipes import RECIPES

    return {name: _first_line(recipe) for name, recipe in RECIPES.items()}


def _encoders() -> dict[str, str]:
    from distunlearn.encoders import list_encoders

    return {name: "" for name in list_encoders()}


KINDS: dict[str, Callable[[], Mapping[str, str]]] = {
    "methods": _methods,
    "encoders": _encoders,
    "objectives": _objectives,
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


def _lines(entries: Mapping[str, str]) -> list[str]:
    width = max(map(len, entries), default=0)
    return [f"{name:<{width}}  {text}".rstrip() for name, text in entries.items()]
