"""The verb `init`: settings for these images, this encoder and this request, with what is doubtful about them.

What can be found is found; what cannot is left open, so that `plan` refuses it, and is told.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from distunlearn.common.text import printable
from distunlearn.config.load import load_config
from distunlearn.config.preprocessing import with_preprocessing
from distunlearn.config.schema import EncoderConfig, RunConfig
from distunlearn.data.manifest.ids import IdTable
from distunlearn.data.prepare.draw import open_and_draw
from distunlearn.data.prepare.forget_list import NON_MEMBER, resolve_list
from distunlearn.data.prepare.list_file import ENDINGS
from distunlearn.data.sources.decode import decode_image, open_image
from distunlearn.data.sources.image_folder import left_out
from distunlearn.data.sources.sources import Source, open_source, read_bytes
from distunlearn.encoders.recognise import Recognised, recognise
from distunlearn.errors import ConfigError, DataError
from distunlearn.plan.interval_widths import expected_widths
from distunlearn.run.init_copies import FORGET, KEEP, OUTSIDE, told_copies
from distunlearn.run.init_text import Found, contrastive_batch, settings_text
from distunlearn.verify.gates import MIN_IMAGES

LOOKED_AT = 64  # images that are decoded to learn what they are
SIZES = (32, 64, 96, 128, 160, 224)  # of a new encoder's input
SHARES = {"holdout": (0.45, 2000), "third_party": (0.25, 2000), "calibration": (0.15, 1000),
          "third_party_audit": (0.15, 1000)}  # of the non-members, and at most  # fmt: skip
FEWEST_NON_MEMBERS = 8  # two of each role
MANY_NON_MEMBERS = 300
SMALL_BATCH = 32  # below, a contrastive loss has few negatives


def init(
    images: Path, checkpoint: Path | None, request: Path | None, non_members: Path | None, encoder: str | None
) -> tuple[str, list[str]]:
    """(the settings as YAML with comments, warnings). encoder: its name, where the checkpoint is not to be asked.

    Raises:
        DataError: a folder or the list cannot be read, or they are too few. ConfigError, EncoderError: see `recognise`.
    """
    found = _look(images, checkpoint, request, non_members, encoder)
    _warn_of_numbers(found)
    text = settings_text(found)
    found.warnings += _checked(text, found)
    return settings_text(found), found.warnings


def _look(
    images: Path, checkpoint: Path | None, request: Path | None, non_members: Path | None, name: str | None
) -> Found:
    """Images, list, non-members and checkpoint, each looked at."""
    warnings: list[str] = []
    members = _open(images, "--images", warnings)
    side, grey = _sampled(members, images, warnings)
    listed, understood = _list(request, images, members, warnings)
    forget, named = (sum(role == wanted for role in listed.values()) for wanted in (FORGET, OUTSIDE))
    others = None if non_members is None else _open(non_members, "--non-members", warnings)
    if others is not None and non_members is not None:
        their_side, _ = _sampled(others, non_members, warnings)
        if max(side, their_side) > 2 * min(side, their_side):
            warnings.append(
                f"the non-members are pictures of another size ({their_side} pixels, the members {side}): the audit "
                "could tell the two apart by that alone; bring non-members of the members' own kind"
            )
    if not members.labels_known:
        warnings.append("there are no class folders, so no labels: the kNN and linear-probe gates stay inconclusive")
    images_of = [(listed.get(i, KEEP), members, i) for i, _ in members.samples]
    images_of += [] if others is None else [(OUTSIDE, others, i) for i, _ in others.samples]
    warnings += told_copies(images_of)
    count = len(members.samples) - named
    pool = named if others is None else len(others.samples)
    if others is None and not named:
        count, pool = _drawn(count, checkpoint, warnings)
    recognised = None if checkpoint is None else recognise(checkpoint, name, small=side < SIZES[1])
    if recognised is not None and recognised.objective.get("name") == "supervised" and not members.labels_known:
        recognised.objective, recognised.trained_with = {}, "supervised"  # which cannot be trained again without labels
    return Found(
        images=images.resolve(), kind=members.name, members=count, side=side, grey=grey,
        request=None if request is None else request.resolve(), forget=forget,
        non_members=None if non_members is None else non_members.resolve(),
        non_member_kind="" if others is None else others.name,
        checkpoint=None if checkpoint is None else checkpoint.resolve(),
        encoder=_encoder(checkpoint, recognised, name, side, grey, warnings), recognised=recognised,
        roles=_roles(pool, warnings), named=named, understood=understood, warnings=warnings,
    )  # fmt: skip


def _open(folder: Path, flag: str, warnings: list[str]) -> Source:
    if not folder.is_dir():
        raise DataError(f"{flag} {printable(folder)} is no folder; give the folder that holds the images.")
    kind = "webdataset" if any(folder.glob("*.tar")) else "imagefolder"
    source = open_source(kind, str(folder), 64_000_000)
    if source.skipped:
        warnings.append(f"files in {printable(folder)} are no images that can be read{left_out(source.skipped)}")
    return source


def _sampled(source: Source, folder: Path, warnings: list[str]) -> tuple[int, bool]:
    """(median of the shorter sides, whether all are grey) of some images, which are decoded."""
    at = np.unique(np.linspace(0, len(source.samples) - 1, LOOKED_AT).astype(int)).tolist()
    sides, modes, bad = [], set(), []
    for sample_id in (source.samples[place][0] for place in at):
        try:
            data = read_bytes(source, sample_id)
            image = open_image(data, sample_id, 64_000_000)
            decode_image(data, sample_id, 64_000_000, channels=3)
        except DataError as error:
            bad.append(str(error).rstrip("."))
            continue
        sides.append(min(image.size))
        modes.add(image.mode)
    if bad:
        warnings.append(
            f"{len(bad)} of {len(at)} images of {printable(folder)} that were looked at are damaged: {bad[0]}"
        )
    if not sides:
        raise DataError(f"{bad[0]}; none of the images that were looked at can be decoded.")
    return int(median(sides)), modes <= {"1", "L"}


def _list(request: Path | None, images: Path, members: Source, warnings: list[str]) -> tuple[dict[str, str], str]:
    """(FORGET or OUTSIDE by the ids that the list names so, how it was read)."""
    if request is None:
        warnings.append("no --request: name the list of images to forget in data.forget")
        return {}, ""
    if request.suffix.lower() not in ENDINGS:
        raise DataError(f"--request {printable(request)} is no list; expected one of {', '.join(ENDINGS)}.")
    table = IdTable.of(sample_id for sample_id, _ in members.samples)
    read = resolve_list(request, table, root=str(images), allow_missing=True, skipped=left_out(members.skipped))
    if read.num_missing:
        warnings.append(
            f"{read.num_missing} of {read.entries} entries of the list name no image, such as "
            f"{printable(read.missing[0], 80)!r}: correct it, or set data.allow_missing=true to have them left out"
        )
    roles = {
        table[row]: FORGET if role == "forget" else OUTSIDE
        for role, rows in read.rows.items() if role != "retain" for row in rows.tolist()
    }  # fmt: skip
    given = sorted(
        role for role, rows in read.rows.items() if len(rows) and role not in ("forget", "retain", NON_MEMBER)
    )
    if given:
        warnings.append(
            f"the list gives the roles {', '.join(given)}: check that data.* below fits what it leaves open"
        )
    return roles, read.understood


def _drawn(count: int, checkpoint: Path | None, warnings: list[str]) -> tuple[int, int]:
    """(members, non-members) where nobody names non-members."""
    if checkpoint is not None:
        warnings.append(
            "no image is named that the encoder never saw, and nothing can be audited without: give --non-members, "
            f"or a column role with {NON_MEMBER} in the list"
        )
        return count, MANY_NON_MEMBERS
    pool = min(count // 2, 6000)
    warnings.append(f"{pool} of the {count} images are drawn as non-members, on which the encoder is not trained")
    return count - pool, pool


def _roles(pool: int, warnings: list[str]) -> dict[str, int]:
    """How the non-members are dealt."""
    if pool < FEWEST_NON_MEMBERS:
        raise DataError(f"{pool} non-members are too few; bring at least {FEWEST_NON_MEMBERS}, better some hundred.")
    roles = {role: max(2, min(most, int(share * pool))) for role, (share, most) in SHARES.items()}
    if roles["holdout"] < MIN_IMAGES:
        warnings.append(f"{pool} non-members leave {roles['holdout']} to be held out: never a pass below {MIN_IMAGES}")
    elif pool < MANY_NON_MEMBERS:
        warnings.append(f"{pool} non-members are few: every interval of the audit is wide; bring some hundred")
    return roles


# -- the encoder -----------------------------------------------------------------------------------------------------


def _encoder(
    checkpoint: Path | None, recognised: Recognised | None, name: str | None, side: int, grey: bool, warnings: list[str]
) -> EncoderConfig:
    if recognised is None:
        size = max((size for size in SIZES if size <= side), default=SIZES[0])
        chans: Any = 1 if grey else 3
        mean = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if chans == 3 else ((0.5,), (0.5,))
        return EncoderConfig(
            name=name or "resnet18", image_size=size, in_chans=chans, mean=mean[0], std=mean[1], crop_pct=0.875,
            interpolation="bilinear",
        )  # fmt: skip
    encoder = replace(recognised.encoder, checkpoint=str(checkpoint), trained_with=recognised.trained_with)
    if not recognised.sized:
        warnings.append(
            f"the file does not say for which image size the encoder was trained; {encoder.image_size} is written: "
            "compare encoder.image_size"
        )
    if side < encoder.image_size:
        warnings.append(
            f"the images ({side} pixels) are smaller than encoder.image_size={encoder.image_size}: enlarged"
        )
    encoder = with_preprocessing(encoder)
    if encoder.mean is None:
        warnings.append(
            "nothing says by which mean and standard deviation the encoder's images are normalised, and they are never "
            "assumed: set encoder.mean and encoder.std"
        )
    warnings += recognised.doubts
    if not recognised.objective:
        other = f" with {recognised.trained_with}" if recognised.trained_with else ""
        warnings.append(
            f"the encoder was trained{other or ' in a way that the file does not say'}: objective.name is a guess, new "
            "heads are trained, and the retrained encoder is of another kind; set objective and pretrain"
        )
    elif "hidden_dim" not in recognised.objective:
        warnings.append("the file holds no heads that fit an objective: new ones are trained on images that stay")
    if recognised.epochs is None:
        warnings.append(
            "the file does not say how long the encoder was trained: set pretrain to its training's settings"
        )
    return encoder


# -- numbers ---------------------------------------------------------------------------------------------------------


def _warn_of_numbers(found: Found) -> None:
    if found.request is not None and found.forget == 0:
        found.warnings.append("the list names no image to forget")
    if 0 < found.forget < MIN_IMAGES:
        found.warnings.append(
            f"a request of {found.forget} can fail but never pass: {MIN_IMAGES} images are needed for that"
        )
    if found.forget > 0.5 * found.members:
        found.warnings.append(f"{found.forget} of {found.members} members are more than data.max_forget_share allows")
    batch = contrastive_batch(found.retain)
    if batch < SMALL_BATCH:
        found.warnings.append(
            f"{found.retain} images stay, so that batches have {batch} images, few for a contrastive loss; in one "
            "larger than the members an image would be its own negative"
        )


def _checked(text: str, found: Found) -> list[str]:
    """What `plan` will say of the settings as they are: what is missing, or what a verdict can be."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            cfg: RunConfig = load_config(None, path, [], world=1)
            if found.request is None:
                return []
            _, drawn = open_and_draw(cfg.data, cfg.seed, foreign=cfg.encoder.checkpoint is not None)
        except (ConfigError, DataError) as error:
            return [f"`plan` will refuse these settings as they are: {str(error).replace(str(path), 'run.yaml')}"]
    widths: dict[str, Any] = expected_widths(cfg, Counter(drawn.roles.values()))
    return [f"verdict: {widths['verdict']}"] if widths else []
