"""Print docs/configuration.md, made from the dataclasses of distunlearn/config/schema.py and their comments.

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

from distunlearn.config.schema import RunConfig

HEAD = """\
# Configuration

Every setting of a run, with its type, its default and its meaning. This page is made by
`python docs/make_configuration.py > docs/configuration.md`; do not edit it by hand.

A run starts from a recipe (`distunlearn list recipes`), which sets its own values for some of these keys. After it come
`--config FILE` and then each `--set KEY=VALUE`, in order. Values are YAML scalars; an empty value is `null`.
`distunlearn plan RECIPE` checks the result without writing anything. The resolved settings of a run are kept in its
`run.yaml`, which is itself a valid `--config` file. Unknown keys, wrong types and impossible values are refused
with exit code 2 and the nearest valid name.
"""

# For fields whose line in config.py has no comment.
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
    "encoder.name": "timm name of a ResNet or ViT (`distunlearn list encoders`)",
    "encoder.in_chans": "channels of the input: 1 is grey, 3 is colour",
    "objective.name": "see the [method page](method.md)",
    "objective.temperature": "of the contrastive softmax and of the bank loss",
    "objective.output_dim": "width of the projection that losses compare",
    "views.brightness": "largest relative change of brightness",
    "views.contrast": "largest relative change of contrast",
    "pretrain.epochs": "passes over the members (retrained: over the retained images)",
    "unlearn.steps": "optimizer steps",
    "unlearn.retain_batch": "retained images of a step",
    "unlearn.forget_batch": "images to forget of a step",
    "unlearn.third_party_batch": "third-party images of a step",
    "unlearn.warmup": "share of the steps",
    "unlearn.clip": "largest gradient norm; 0: no clipping",
    "method.name": "how to forget (`distunlearn list methods`)",
    "method.confidence_weight": "of the term that lowers the confidence on third-party images",
    "method.confidence": "form of that term",
    "constraint.distance": "two-sample distance; both are unbiased",
    "constraint.evaluator": "how per-sample gradients are reached: see the [method page](method.md)",
    "constraint.sketch_in": "columns of the Kronecker sketch (input side)",
    "audit.bootstrap": "draws behind every interval",
}
for _group in ("pretrain", "unlearn"):
    MEANINGS[f"{_group}.optimizer"] = "optimizer"
    MEANINGS[f"{_group}.lr"] = "largest learning rate, after the warm-up"
    MEANINGS[f"{_group}.weight_decay"] = "weight decay"

BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    for prefix, cls in sections(RunConfig):
        title = f"`{prefix}`" if prefix else "The run"
        parts.append(f"## {title}\n\n{summary(cls)}\n\n| key | type | default | meaning |\n|---|---|---|---|")
        comments = meanings(cls)
        hints = typing.get_type_hints(cls, include_extras=True)
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(hints[field.name]):
                continue
            key = f"{prefix}.{field.name}" if prefix else field.name
            meaning = comments.get(field.name) or MEANINGS.get(key, "")
            meaning = re.sub(r"\bNone\b", "`null`", meaning).replace("<out>", "the run directory")
            cells = (f"`{key}`", kind(hints[field.name]), default(field), meaning)
            parts[-1] += "\n| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        parts[-1] += "\n"
    return "\n".join(parts)


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
    return text.replace("roles: see docs/words in README", "roles: see the words in the [README](../README.md)")


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


def kind(annotation: Any) -> str:
    """A type in words, with its bounds."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        metas = [meta for info in args[1:] if isinstance(info, FieldInfo) for meta in info.metadata]
        bounds = [f"{sign} {getattr(meta, name):g}" for meta in metas for name, sign in BOUNDS if hasattr(meta, name)]
        return " ".join([kind(args[0]), *([" and ".join(bounds)] if bounds else [])])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join(map(kind, args))
    if origin is tuple:
        return f"list (each {kind(args[0])})"
    return "group of settings" if origin is dict else NAMES[annotation]


def default(field: dataclasses.Field) -> str:
    """The default as YAML has it."""
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    if value is None or isinstance(value, bool):
        return f"`{json.dumps(value)}`"
    return f"`[{', '.join(map(str, value))}]`" if isinstance(value, tuple) else f"`{value}`"


if __name__ == "__main__":
    print(page(), end="")
