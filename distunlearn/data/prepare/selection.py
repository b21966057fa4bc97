"""Whether shards that exist are those which the settings ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from distunlearn.config.checks import HANDED_OVER
from distunlearn.config.schema import DataConfig
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.manifest.records import CODE
from distunlearn.data.prepare.duplicates import settle_copies
from distunlearn.data.prepare.forget_list import list_sha256
from distunlearn.data.prepare.index_shards import role_codes
from distunlearn.data.prepare.roles import assign_roles, is_list
from distunlearn.data.sources.sources import open_sources
from distunlearn.errors import DataError


def check_list(cfg: DataConfig, manifest: Manifest) -> None:
    """DataError if the list of ids was edited since the shards were made. A list that is gone is not missed."""
    known = manifest.info.get("forget_list", {}).get("sha256")
    if known is None or not is_list(cfg.forget) or not Path(str(cfg.forget)).exists():
        return
    found = list_sha256(str(cfg.forget))
    if found != known:
        raise DataError(
            f"The list {cfg.forget} has changed since the shards in {manifest.folder} were made (sha256 {known[:12]} "
            f"then, {found[:12]} now); give the list as it was, or make new shards in another folder."
        )


def check_selection(cfg: DataConfig, seed: int, manifest: Manifest) -> None:
    """DataError unless the settings give every image the role it has in the manifest."""
    if _roles_now(cfg, seed, manifest):
        return
    raise DataError(
        f"{manifest.folder} holds shards of another selection of images (seed, source or data.* differ); "
        "give the settings they were prepared with, or another folder."
    )


def _roles_now(cfg: DataConfig, seed: int, manifest: Manifest) -> bool:
    columns = manifest.columns
    if HANDED_OVER in manifest.info:
        return cfg.source == HANDED_OVER  # the settings say no more than the datasets did
    if manifest.info.get("indexed"):
        if cfg.source != "webdataset":
            return False
        drawn, _ = role_codes(columns, cfg, seed)
    else:
        members, guest = open_sources(cfg)
        roles = assign_roles(members.samples, cfg, seed, None if guest is None else guest.samples)
        if len(roles) != len(manifest) or any(sample_id not in roles for sample_id in columns.ids):
            return False
        drawn = np.fromiter((CODE[roles[i]] for i in columns.ids), dtype=np.uint8, count=len(manifest))
    policy = "forget" if cfg.copies == "forget" else "keep"  # what would be refused was refused when they were made
    drawn, facts = settle_copies(columns.ids, columns.sha256, drawn, CODE["forget"], CODE["retain"], policy)
    if cfg.copies == "refuse" and facts["copies_in_retain"]:
        return False
    return bool((drawn == columns.role).all())


def request_facts(info: dict[str, Any]) -> dict[str, Any]:
    """What the summary of the shards, or the draw of the roles, says about the request: counts and digests, no ids."""
    names = ("forget_list", "forget_share", "whole_classes", "forget_with_copy_in_retain", "copies_in_retain",
             "copies_in_other_roles", "copies_policy", "near_copies", "undecodable")  # fmt: skip
    facts = {name: info[name] for name in names if name in info}
    if "forget_list" in facts:
        facts["forget_list"] = {k: v for k, v in facts["forget_list"].items() if k != "missing_ids"}
    return facts
