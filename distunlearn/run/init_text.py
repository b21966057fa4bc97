"""The settings that `init` writes, as YAML that says of each value where it is from."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distunlearn.config.schema import EncoderConfig, OptimizerConfig
from distunlearn.encoders.recognise import Recognised

Row = tuple[str, Any, str]  # key, value, comment
MISSING = "MISSING"  # in the place of a value: the line is written as a comment, so that `plan` asks for it
WIDTH = 118
PASSES = 25  # of the images to forget: what the small recipes have
STEPS = (100, 500)  # of the forgetting, where that many passes would be fewer or more
LARGEST_BATCH, LARGEST_FORGET_BATCH = 256, 64
EPOCHS = 200  # of MoCo v2 and v3, where the file says nothing
VIEWS = {"moco": "mocov2", "mocov3": "mocov3", "byol": "byol", "simclr": "simclr", "supervised": "simclr"}
MANY_IMAGES = 20_000  # from which on other processes decode


@dataclass
class Found:
    """What `init` learned. Paths are absolute; sizes are counts of images; side: median of the shorter sides, pixels.

    roles: {role: count} for `data.*`. named: non-members that the list names. recognised: None: there is no checkpoint.
    """

    images: Path
    kind: str
    members: int
    side: int
    grey: bool
    request: Path | None
    forget: int
    non_members: Path | None
    non_member_kind: str
    checkpoint: Path | None
    encoder: EncoderConfig
    recognised: Recognised | None
    roles: dict[str, int]
    named: int = 0
    understood: str = ""
    warnings: list[str] = field(default_factory=list)

    @property
    def retain(self) -> int:
        return self.members - self.forget

    @property
    def objective(self) -> str:
        """`objective.name`."""
        return "moco" if self.recognised is None else self.recognised.objective.get("name", "simclr")

    @property
    def precision(self) -> str:
        return "bf16" if torch.cuda.is_available() else "fp32"


def power_of_two(most: float) -> int:
    """The largest that is not above `most`, at least 2."""
    return 1 << (max(2, int(most)).bit_length() - 1)


def contrastive_batch(retain: int) -> int:
    """A quarter of the images at most: batches of an epoch must differ."""
    return min(LARGEST_BATCH, power_of_two(retain / 4))


def settings_text(found: Found) -> str:
    """The YAML. What is missing is a comment."""
    sections = {
        "data": _data(found), "encoder": _encoder(found), "objective": _objective(found), "views": _views(found),
        "pretrain": _pretrain(found), "unlearn": _unlearn(found),
    }  # fmt: skip
    base = "photos_224" if "vit" in found.encoder.name else "photos_64"
    top = [
        f"# Settings for the images in {found.images}, written by `distunlearn init`.",
        "# Next: `distunlearn plan --config run.yaml`, then `distunlearn run --config run.yaml --out runs/request1`.",
        *(line for warning in found.warnings for line in _comment(f"CHECK: {warning}", "")),
        *_row(("recipe", base, "where everything that is not written here is from"), ""),
        *_row(("precision", found.precision, "of this machine: bf16 where there is a GPU"), ""),
    ]
    for name, rows in sections.items():
        top += ["", f"{name}:", *(line for row in rows for line in _row(row, "  "))]
    return "\n".join([*top, ""])


def _row(row: Row, indent: str) -> list[str]:
    key, value, comment = row
    if value == MISSING:
        return _comment(f"{key}:  MISSING: {comment}", indent)
    line = f"{indent}{key}: {json.dumps(value, ensure_ascii=False)}"
    if len(line) + len(comment) + 4 <= WIDTH:
        return [f"{line}  # {comment}" if comment else line]
    return [*_comment(comment, indent), line]


def _comment(text: str, indent: str) -> list[str]:
    shown = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"')  # on one line, whatever a name holds
    return [f"{indent}# {line}" for line in textwrap.wrap(shown, WIDTH - len(indent) - 2, break_long_words=False)]


def _data(found: Found) -> Iterator[Row]:
    yield "source", found.kind, "a folder of image files" if found.kind == "imagefolder" else "WebDataset shards"
    yield "root", str(found.images), "what the encoder was trained on"
    yield "members", None, f"null: all {found.members} of them; leave out of the folder what was not used in training"
    if found.request is None:
        yield "forget", "request.txt", "the list of images to forget (.txt, .csv, .tsv or .jsonl), or class:NAME"
    else:
        yield "forget", str(found.request), f"{found.forget} images; read as {found.understood}"
    if found.non_members is not None:
        yield "holdout_source", found.non_member_kind, "of the images that the encoder never saw"
        yield "holdout_root", str(found.non_members), "they are dealt to the four roles below"
    elif found.checkpoint is not None and not found.named:
        yield (
            "holdout_root",
            MISSING,
            "a folder of images that the encoder never saw, which are dealt to the roles below",
        )
    meanings = {
        "holdout": "used by nothing but the audit: the more, the narrower its intervals",
        "third_party": "what a non-member looks like, in the loss",
        "calibration": "by which thresholds are set",
        "third_party_audit": "of the third party, in no loss: a control of the audit",
    }
    for role, meaning in meanings.items():
        yield role, found.roles[role], meaning
    yield "workers", 8 if found.members > MANY_IMAGES else 0, "processes that decode ahead"


def _encoder(found: Found) -> Iterator[Row]:
    encoder, from_file = found.encoder, found.recognised is not None
    yield (
        "name",
        encoder.name,
        "recognised in the checkpoint" if from_file else "new: any of `distunlearn list encoders`",
    )
    if encoder.args or from_file:
        yield "args", encoder.args, "what makes it differ from timm's model of that name"
    yield "stem", encoder.stem, ""
    sized = "" if found.recognised is None or found.recognised.sized else ": NOT in the file, compare it"
    yield "image_size", encoder.image_size, f"pixels; the images have {found.side}{sized}"
    yield "in_chans", encoder.in_chans, "colours" if encoder.in_chans == 3 else "grey"
    for key, example in (("mean", "[0.485, 0.456, 0.406]"), ("std", "[0.229, 0.224, 0.225]")):
        value = getattr(encoder, key)
        if value is None:
            yield key, MISSING, f"what the encoder's images were normalised by in its training (ImageNet's: {example})"
        else:
            yield key, list(value), "of each channel; written beside the checkpoint" if from_file else "of each channel"
    if encoder.crop_pct is not None:
        yield "crop_pct", encoder.crop_pct, "share of the shorter side that evaluation keeps"
    if encoder.interpolation is not None:
        yield "interpolation", encoder.interpolation, ""
    yield "embed_dim", None if found.recognised is None else found.recognised.embed_dim, ""
    if found.checkpoint is not None:
        yield "checkpoint", str(found.checkpoint), ""
        if encoder.trained_with:
            yield "trained_with", encoder.trained_with, "its own loss, which objective.name cannot name"


def _objective(found: Found) -> Iterator[Row]:
    told = {} if found.recognised is None else found.recognised.objective
    name = found.objective
    source = "of the checkpoint's heads" if "hidden_dim" in told else "of new heads"
    yield (
        "name",
        name,
        "told by the checkpoint" if told else "a guess" if found.checkpoint else "of simclr, moco, mocov3, byol",
    )
    if name == "supervised":
        return
    width = found.recognised.embed_dim if found.recognised is not None else 512
    yield "hidden_dim", told.get("hidden_dim", width), source
    yield "output_dim", told.get("output_dim", 128), ""
    yield "head_layers", told.get("head_layers", 2), ""
    yield "head_norm", told.get("head_norm", name != "moco"), "whether BatchNorms stand between its layers"
    yield "temperature", 0.2, "compare with the training's" if found.checkpoint else ""
    if name == "moco":
        batch = contrastive_batch(found.retain)
        queue = max(batch, min(told.get("queue_size", 65536), power_of_two(found.retain / 2)))
        yield "queue_size", queue, "past keys; of so many members, no more than half"


def _views(found: Found) -> Iterator[Row]:
    recipe = (
        "grey"
        if found.encoder.in_chans == 1
        else "dino"
        if found.encoder.trained_with == "dino"
        else VIEWS[found.objective]
    )
    yield "recipe", recipe, "random views as published with that loss; take those that the encoder was trained with"


def _pretrain(found: Found) -> Iterator[Row]:
    what = "of the retrained encoder, the yardstick: make them those of your encoder's training"
    told = found.recognised.epochs if found.recognised is not None else None
    yield "epochs", told or EPOCHS, f"{what}; told by the checkpoint" if told else what
    yield "batch", contrastive_batch(found.retain), f"of {found.retain} images that stay"
    transformer = "vit" in found.encoder.name
    if found.objective == "moco" and not transformer:
        own = {"optimizer": "sgd", "lr": 0.03, "lr_scaling": "linear", "weight_decay": 1e-4}
    elif transformer:
        own = {"optimizer": "adamw", "lr": 1.5e-4, "lr_scaling": "linear", "weight_decay": 0.1}
    else:
        own = {"optimizer": "adamw", "lr": 1e-3, "lr_scaling": "none", "weight_decay": 1e-4}
    assert set(own) <= set(OptimizerConfig.__dataclass_fields__)
    for key, value in own.items():
        yield key, value, "linear: lr x batch / 256" if value == "linear" else ""


def _unlearn(found: Found) -> Iterator[Row]:
    forget = min(LARGEST_FORGET_BATCH, power_of_two(found.forget or LARGEST_FORGET_BATCH))
    wanted = -(-PASSES * found.forget // forget)
    steps = max(min(max(wanted, STEPS[0]), STEPS[1]), -(-3 * found.forget // forget))
    yield (
        "steps",
        steps,
        f"each of the {found.forget} images to forget is seen about {steps * forget // max(1, found.forget)} times",
    )
    yield "retain_batch", contrastive_batch(found.retain), "images to keep, a step"
    yield "forget_batch", forget, ""
    yield "third_party_batch", min(LARGEST_FORGET_BATCH, power_of_two(found.roles["third_party"] / 2)), ""
