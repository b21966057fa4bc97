"""Whether shards that exist are those which the settings ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from distunlearn.config.checks import HANDED_OVER
from distunlearn.config.schema import DataConfig
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.manifest.records import CODE
from distunlearn.data.prepare.draw import open_and_draw
from distunlearn.data.prepare.forget_list import list_sha256
from distunlearn.data.prepare.index_shards import role_codes
from distunlearn.data.prepare.roles import is_list
from distunlearn.data.prepare.write_shards import settle_roles
from distunlearn.data.sources.sources import ShardSource, names_by
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
        names = None
        if is_list(cfg.forget) and cfg.forget_by != "id":
            if manifest.remote is not None:
                return True  # the list is as it was, and what its entries name is in the store alone
            names = names_by(ShardSource(manifest.folder, cfg.max_pixels), cfg.forget_by)
        drawn, _ = role_codes(columns, cfg, seed, manifest.info["classes"], names)
    else:
        _, found = open_and_draw(cfg, seed)
        roles = {i: role for i, role in found.roles.items() if i not in set(manifest.info.get("undecodable_ids", ()))}
        if len(roles) != len(manifest) or any(sample_id not in roles for sample_id in columns.ids):
            return False
        drawn = np.fromiter((CODE[roles[i]] for i in columns.ids), dtype=np.uint8, count=len(manifest))
    policy = "forget" if cfg.copies == "forget" else "keep"  # what would be refused was refused when they were made
    drawn, facts = settle_roles(columns, drawn, policy)
    if cfg.copies == "refuse" and facts["copies_in_retain"]:
        return False
    return bool((drawn == columns.role).all())


def request_facts(info: dict[str, Any]) -> dict[str, Any]:
    """What the summary of the shards, or the draw of the roles, says about the request: counts and digests, no ids."""
    names = ("forget_list", "forget_share", "whole_classes", "forget_with_copy_in_retain", "copies_in_retain",
             "dropped_copies", "copies_policy", "near_copies", "near_copies_of_members", "undecodable", "skipped_files",
             "left_out", "non_members")  # fmt: skip
    facts = {name: info[name] for name in names if name in info}
    if "forget_list" in facts:
        facts["forget_list"] = {k: v for k, v in facts["forget_list"].items() if k != "missing_ids"}
    return facts
