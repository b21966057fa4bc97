"""The roles that the settings give to the images of an index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distunlearn.config.checks import HANDED_OVER
from distunlearn.config.schema import DataConfig
from distunlearn.data.manifest.columns import NO_LABEL
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.manifest.records import CODE, UNUSED
from distunlearn.data.prepare.draw import open_and_draw
from distunlearn.data.prepare.forget_list import list_sha256
from distunlearn.data.prepare.roles import draw_roles, is_list
from distunlearn.data.prepare.write_shards import duplicate_facts, settle_roles
from distunlearn.data.sources.image_folder import left_out
from distunlearn.data.sources.sources import ShardSource, names_by
from distunlearn.errors import ConfigError, DataError


def check_list(cfg: DataConfig, manifest: Manifest) -> None:
    """DataError if the list of ids was edited since the shards were made. A list that is gone is not missed."""
    known = manifest.facts.get("forget_list", {}).get("sha256")
    if known is None or not is_list(cfg.forget) or not Path(str(cfg.forget)).exists():
        return
    found = list_sha256(str(cfg.forget))
    if found != known:
        raise DataError(
            f"The list {cfg.forget} has changed since the request was prepared (sha256 {known[:12]} then, {found[:12]} "
            "now); give the list as it was, or another --out for another request."
        )


def check_selection(cfg: DataConfig, seed: int, manifest: Manifest) -> None:
    """DataError unless the settings give every image the role it has in the request."""
    if HANDED_OVER in manifest.facts:
        same = cfg.source == HANDED_OVER  # the settings say no more than the datasets did
    else:
        drawn, _ = _drawn(cfg, seed, manifest, foreign=False)
        policy = "forget" if cfg.copies == "forget" else "keep"  # what would be refused was refused before
        drawn, facts = settle_roles(manifest.columns, drawn, policy)
        refused = cfg.copies == "refuse" and facts["copies_in_retain"]
        same = not refused and bool((drawn == manifest.columns.role).all())
    if not same:
        raise DataError(
            f"The request is of another selection of the images in {manifest.folder} (seed, source or data.* differ); "
            "give the settings it was prepared with, or another --out."
        )


def draw_request(cfg: DataConfig, seed: int, manifest: Manifest, *, foreign: bool = False) -> Manifest:
    """The index with the roles that the settings give; no image is read. foreign: see `draw_roles`.

    Raises:
        DataError: roles or copies are refused, or the shards lack images that the settings give a role.
        ConfigError: indexed shards have no third-party or holdout source of their own.
    """
    drawn, facts = _drawn(cfg, seed, manifest, foreign=foreign)
    role, found = duplicate_facts(manifest.columns.with_roles(drawn), cfg.copies, cfg.near_distance)
    return manifest.with_roles(role, {**found, **facts})


def _drawn(cfg: DataConfig, seed: int, manifest: Manifest, *, foreign: bool) -> tuple[np.ndarray, dict[str, Any]]:
    """(roles uint8 [n] before the policy for copies, facts)."""
    columns, info = manifest.columns, manifest.info
    if info.get("indexed"):
        if cfg.source != "webdataset":
            raise DataError(
                f"{manifest.folder} holds shards of another selection: indexed ones, but data.source is {cfg.source}; "
                "set data.source=webdataset, or give another folder."
            )
        if cfg.third_party_source is not None or cfg.holdout_source is not None or cfg.holdout_root is not None:
            raise ConfigError(
                "data.third_party_source and data.holdout_source cannot be drawn from indexed shards; use prepare, or "
                "name the non-members by roles in a list."
            )
        labels = (None if label == NO_LABEL else label for label in columns.label.tolist())
        skipped = left_out(Counter(info["skipped_files"]) + Counter(info["left_out"]))
        drawn = draw_roles(
            list(zip(columns.ids, labels, strict=True)), cfg, seed, names=_names(cfg, manifest),
            classes=info["classes"], foreign=foreign, skipped=skipped,
        )  # fmt: skip
        roles = drawn.roles
    else:
        _, drawn = open_and_draw(cfg, seed, foreign)
        lost = set(info.get("undecodable_ids", ()))
        roles = {sample_id: role for sample_id, role in drawn.roles.items() if sample_id not in lost}
        absent = len(roles) - sum(sample_id in roles for sample_id in columns.ids)
        if absent:
            raise DataError(
                f"{manifest.folder} holds shards of another selection: they lack {absent} images that the settings "
                "give a role; give the settings they were prepared with, or prepare new shards in another folder."
            )
    codes = (CODE[roles.get(sample_id, UNUSED)] for sample_id in columns.ids)
    return np.fromiter(codes, dtype=np.uint8, count=len(columns)), drawn.facts


def _names(cfg: DataConfig, manifest: Manifest) -> list[list[str]] | None:
    """By what a list may name each image of indexed shards; None for ids."""
    if not is_list(cfg.forget) or cfg.forget_by == "id":
        return None
    kept = manifest.info["indexed"]["named_by"]
    if cfg.forget_by not in (kept, "sha256"):
        if manifest.remote is None:  # the headers of the shards say it
            return names_by(ShardSource(manifest.folder, cfg.max_pixels), cfg.forget_by)
        raise DataError(
            f"The index in {manifest.folder} does not keep data.forget_by={cfg.forget_by} of the images; remove "
            f"index.arrow and summary.json there and index with data.forget_by={cfg.forget_by}."
        )
    told = manifest.columns.name.to_pylist() if cfg.forget_by == kept else [None] * len(manifest)
    digests = [row.tobytes().hex() for row in manifest.columns.sha256] if cfg.forget_by == "sha256" else told
    return [[name for name in dict.fromkeys(names) if name] for names in zip(told, digests, strict=True)]


def request_facts(info: Mapping[str, Any]) -> dict[str, Any]:
    """What shards and request, or the draw of the roles, say about the request: counts and digests, no ids."""
    names = ("forget_list", "forget_share", "whole_classes", "forget_with_copy_in_retain", "copies_in_retain",
             "dropped_copies", "copies_policy", "near_copies", "near_copies_of_members", "undecodable", "skipped_files",
             "left_out", "non_members")  # fmt: skip
    facts = {name: info[name] for name in names if name in info}
    if "forget_list" in facts:
        facts["forget_list"] = {k: v for k, v in facts["forget_list"].items() if k != "missing_ids"}
    return facts
