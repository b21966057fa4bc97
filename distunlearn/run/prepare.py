"""The verbs `prepare` and `index`: the data layer's work with a progress bar, and a line about the result."""

from __future__ import annotations

from pathlib import Path

from distunlearn.common.progress import progress_of
from distunlearn.common.text import printable
from distunlearn.config.schema import RunConfig
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.prepare.index_shards import index_shards
from distunlearn.data.prepare.write_shards import prepare_shards


def make_shards(cfg: RunConfig, folder: Path) -> Manifest:
    """Sources to shards, an index and a summary in `folder`; the roles are in memory alone."""
    with progress_of("prepare", "images") as progress:
        foreign = cfg.encoder.checkpoint is not None
        return prepare_shards(cfg.data, cfg.seed, folder, progress=progress, foreign=foreign)


def index_folder(cfg: RunConfig, folder: Path) -> Manifest:
    """The index of WebDataset shards that exist, written beside them."""
    with progress_of("index") as progress:
        return index_shards(cfg.data, folder, progress)


def describe(manifest: Manifest) -> str:
    """Counts of a folder of shards in one line."""
    text = f"{len(manifest)} images in {len(manifest.shard_files)} shards"
    info = {**manifest.info, **manifest.facts}
    if manifest.facts:
        roles = ", ".join(f"{count} {role}" for role, count in manifest.count_roles().items())
        text += f": {roles}; {info.get('copies_in_retain', 0)} retained exact copies"
    if near := info.get("near_copies"):
        text += f", {near['retain']} retained near-copies of {near['forget']} images to forget"
    listed = info.get("forget_list", {})
    if listed.get("understood"):
        text += f"; the list was read as {printable(listed['understood'])}"
    if listed.get("missing"):
        text += f"; {listed['missing']} listed ids left out, which the source lacks"
    for key, words in (
        ("dropped_copies", "dropped, for they have the bytes of a member or of another role"),
        ("near_copies_of_members", "near-copies of members"),
        ("skipped_files", "files are no images"),
        ("left_out", "in the shards left out"),
    ):
        if info.get(key):
            counts = ", ".join(f"{count} {name}" for name, count in list(info[key].items())[:10])
            text += f"; {printable(counts)}: {words}"
    bad = info.get("undecodable", 0)
    return text + (f"; {bad} images that cannot be decoded" if bad else "")
