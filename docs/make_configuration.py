"""Print docs/configuration.md, made from the settings classes (config/schema.py, and each part its own) and comments.

    python docs/make_configuration.py > docs/configuration.md

A test compares the committed page with what this prints.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union

from pydantic.fields import FieldInfo

from distunlearn.config.registry import KINDS, find
from distunlearn.config.schema import RunConfig
from distunlearn.config.shape import marks

HEAD = """\
# Configuration

Every setting of a run, with its type, its default and its meaning. This page is made by
`python docs/make_configuration.py > docs/configuration.md`; do not edit it by hand.

A run starts from a recipe (`distunlearn list recipes`), which sets its own values for some of these keys. After it come
`--config FILE` and then each `--set KEY=VALUE`, in order. Values are YAML scalars; an empty value is `null`.
`distunlearn plan RECIPE` checks the result without writing anything. The resolved settings of a run are kept in its
`run.yaml`, which is itself a valid `--config` file. Unknown keys, wrong types and impossible values are refused
with exit code 2 and the nearest valid name.

`method`, `objective` and `constraint` have the settings that all methods, objectives and evaluators share, and those of
the one that `name` or `evaluator` names; what another one has is refused. Where a recipe or a `--config` file names
another one, what it sets for that one alone is left out. Names may be those of the tables below, `package.module:Name`
of an installed package, `path/to/file.py:Name`, or an entry point.

The column *affects* says what a key changes where that is not the result: a run may go on in its directory under
another value of it.
"""

# For fields whose line has no comment.
MEANINGS = {
    "recipe": "name of the recipe that the run started from; chosen on the command line, not with `--set`",
    "seed": "see above",
    "backend": "how a step is spread over processes; `single` is one process",
    "precision": "of the encoder's forward and backward passes",
    "data.source": "where the members come from; all but `digits` and `fashion_mnist` need `data.root`",
    "data.holdout": "images for audits only",
    "data.calibration": "images for the hinge threshold and Phi*",
    "data.third_party": "images used inside the loss",
    "data.third_party_audit": "images of the third-party source that no loss sees",
    "data.third_party_root": "folder of the third-party source",
    "data.samples_per_shard": "images in one tar file",
    "encoder.name": "any timm model with a pooled output (`distunlearn list encoders`), or an own module",
    "encoder.in_chans": "channels of the input: 1 is grey, 3 is colour",
    "objective.name": "see the [method page](method.md)",
    "views.brightness": "largest relative change of brightness",
    "views.contrast": "largest relative change of contrast",
    "pretrain.epochs": "passes over the members (retrained: over the retained images)",
    "unlearn.steps": "optimizer steps",
    "unlearn.retain_batch": "retained images of a step",
    "unlearn.forget_batch": "images to forget of a step",
    "unlearn.third_party_batch": "third-party images of a step",
    "method.name": "how to forget (`distunlearn list methods`)",
    "constraint.distance": "two-sample distance; both are unbiased",
    "constraint.evaluator": "how per-sample gradients are reached: see the [method page](method.md)",
    "audit.bootstrap": "draws behind every interval",
}

BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}


COLUMNS = "| key | type | default | affects | meaning |\n|---|---|---|---|---|"


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    for prefix, cls in sections(RunConfig):
        parts.append(f"## {f'`{prefix}`' if prefix else 'The run'}\n\n{summary(cls)}\n\n{COLUMNS}")
        parts[-1] += "".join(rows(prefix, cls, set())) + "\n"
        for kind in (kind for kind in KINDS if kind.section == prefix):
            shared = {field.name for field in dataclasses.fields(cls)}
            for name in kind.table:
                part = find(kind, name)
                own = "".join(rows(prefix, part.Config, shared))
                title = f"### `{kind.setting}={name}`\n\n{part.summary[:1].upper()}{part.summary[1:]}."
                parts.append(title + (f"\n\n{COLUMNS}{own}\n" if own else " No settings of its own.\n"))
    return "\n".join(parts)


def rows(prefix: str, cls: type, without: set[str]) -> Iterator[str]:
    """A row for each setting of a class, as it stands on the page."""
    comments = {name: text for base in reversed(cls.__mro__[:-1]) for name, text in meanings(base).items()}
    hints, plain = typing.get_type_hints(cls, include_extras=True), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(plain[field.name]) or field.name in without:
            continue
        key = f"{prefix}.{field.name}" if prefix else field.name
        meaning = MEANINGS.get(key) or comments.get(field.name, "")
        meaning = re.sub(r"\bNone\b", "`null`", meaning).replace("<out>", "the run directory")
        affects = marks(hints[field.name]).get("affects", "")
        cells = (f"`{key}`", kind_of(hints[field.name]), default(field, prefix), affects, meaning)
        yield "\n| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def sections(cls: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """(dotted name, dataclass) of the config and of every group in it, in the order of the source."""
    yield prefix, cls
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from sections(hints[field.name], f"{prefix}.{field.name}" if prefix else field.name)


def summary(cls: type) -> str:
    """The docstring on one line."""
    text = " ".join((inspect.getdoc(cls) or "").split())
    return (
        text.replace("roles: see docs/glossary.md", "roles: see the [glossary](glossary.md)")
        .replace("(docs/method.md)", "(see the [method page](method.md))")
        .replace("(docs/encoders.md)", "(see [optimizers](encoders.md#optimizers))")
    )


def meanings(cls: type) -> dict[str, str]:
    """The comment at the end of each field's line."""
    source = textwrap.dedent(inspect.getsource(cls))
    comments: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.removeprefix("#").strip()
    lines = source.splitlines()
    found = {}
    for number, comment in comments.items():
        if match := re.match(r"    (\w+): ", lines[number - 1]):
            found[match[1]] = comment
    return found


def kind_of(annotation: Any) -> str:
    """A type in words, with its bounds."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        metas = [meta for info in args[1:] if isinstance(info, FieldInfo) for meta in info.metadata]
        bounds = [f"{sign} {getattr(meta, name):g}" for meta in metas for name, sign in BOUNDS if hasattr(meta, name)]
        return " ".join([kind_of(args[0]), *([" and ".join(bounds)] if bounds else [])])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join(map(kind_of, args))
    if origin is tuple:
        return f"list of {kind_of(args[0])}"
    return "group of settings" if origin is dict else NAMES[annotation]


def default(field: dataclasses.Field, prefix: str) -> str:
    """The default as YAML has it."""
    for kind in KINDS:
        if kind.setting == f"{prefix}.{field.name}":
            return f"`{kind.default}`"
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    if value is None or isinstance(value, bool):
        return f"`{json.dumps(value)}`"
    return f"`[{', '.join(map(str, value))}]`" if isinstance(value, tuple) else f"`{value}`"


if __name__ == "__main__":
    print(page(), end="")
