"""The settings file as a JSON schema (draft 2020-12), for editors that complete and check YAML."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from distunlearn.config.registry import KINDS, Kind, settings_class
from distunlearn.config.schema import RunConfig

OWN = "^.+:[^/]+$"  # package.module:Name or path/to/file.py:Name


def settings_schema() -> dict[str, Any]:
    """Every key with its type, range and default; what belongs to a method, objective or evaluator beside its name."""
    schema = TypeAdapter(RunConfig).json_schema()
    for kind in KINDS:
        forms = [_form(kind, name, schema["$defs"]) for name in kind.table]
        own = {"type": "object", "required": [kind.key], "properties": {kind.key: {"type": "string", "pattern": OWN}}}
        schema["properties"][kind.section] = {"anyOf": [*forms, own]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "distunlearn settings", **schema}


def _form(kind: Kind, name: str, shared: dict[str, Any]) -> dict[str, Any]:
    """The section where it names this part."""
    form = TypeAdapter(settings_class(kind, name)).json_schema()
    shared |= form.pop("$defs", {})
    form["properties"][kind.key] = {"const": name}
    if name != kind.default:
        form["required"] = sorted({*form.get("required", []), kind.key})
    return form
