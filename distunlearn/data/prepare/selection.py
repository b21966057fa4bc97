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
from distunlearn.data.prepare.duplicates import duplicate_facts, settle_roles
from distunlearn.data.prepare.exclude import excluded_ids, excluding_chain
from distunlearn.data.prepare.forget_list import list_sha256
from distunlearn.data.prepare.persons import copied_persons, read_persons
from distunlearn.data.prepare.previous import leave_out, names_of, next_request
from distunlearn.data.prepare.roles import draw_roles, is_list
from distunlearn.data.sources.image_folder import left_out
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
    if cfg.previous:
        drawn = draw_request(cfg, seed, manifest).columns.role
        same = bool((drawn == manifest.columns.role).all())
    elif HANDED_OVER in manifest.facts:
        same = cfg.source == HANDED_OVER  # the settings say no more than the datasets did
    else:
        drawn = _drawn(cfg, seed, manifest, foreign=False)[0]
        policy = "forget" if cfg.copies == "forget" else "keep"  # what would be refused was refused before
        drawn, facts = settle_roles(manifest.columns, drawn, policy)
        drawn = without_chain(cfg, manifest.with_roles(drawn, {})).columns.role
        refused = cfg.copies == "refuse" and facts["copies_in_retain"]
        same = not refused and bool((drawn == manifest.columns.role).all())
    if not same:
        raise DataError(
            f"The request is of another selection of the images in {manifest.folder} (seed, source or data.* differ); "
            "give the settings it was prepared with, or another --out."
        )


def draw_request(cfg: DataConfig, seed: int, manifest: Manifest, *, foreign: bool = False) -> Manifest:
    """The index with the roles that the settings give; no image is read. foreign: see `draw_roles`.

    With `cfg.previous` they follow from those of that run, see `next_request`.

    Raises:
        DataError: roles or copies are refused, or the shards lack images that the settings give a role.
        ConfigError: indexed shards have no third-party or holdout source of their own.
    """
    if cfg.previous:
        return next_request(cfg, seed, manifest, Path(cfg.previous))
    drawn, facts, person = _drawn(cfg, seed, manifest, foreign=foreign)
    role, found = duplicate_facts(manifest.columns.with_roles(drawn), cfg.copies, cfg.near_distance)
    if person is not None:
        facts["persons"] |= copied_persons(manifest.columns.sha256, role, person)  # after the policy
    return without_chain(cfg, manifest.with_roles(role, {**found, **facts}, person))


def without_chain(cfg: DataConfig, manifest: Manifest) -> Manifest:
    """The manifest without a role for images that the chain of `cfg.exclude` has forgotten; itself without a chain."""
    chain = excluding_chain(cfg)
    if chain is None:
        return manifest
    role, facts = leave_out(manifest, manifest.columns.role, chain, cfg.near_distance)
    return manifest.with_roles(role, {**manifest.facts, "excluded_chain": facts})


def _drawn(
    cfg: DataConfig, seed: int, manifest: Manifest, *, foreign: bool
) -> tuple[np.ndarray, dict[str, Any], np.ndarray | None]:
    """(roles uint8 [n] before the policy for copies, facts, numbers of the persons int32 [n], see `Manifest`)."""
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
        samples = list(zip(columns.ids, labels, strict=True))
        person = read_persons(cfg, [(samples, info["classes"])])
        skipped = left_out(Counter(info["skipped_files"]) + Counter(info["left_out"]))
        names, ids = names_of(cfg, manifest), list(columns.ids)
        drawn = draw_roles(
            samples, cfg, seed, names=names, excluded=excluded_ids(cfg, ids, names), classes=info["classes"],
            foreign=foreign, skipped=skipped, person=person,
        )  # fmt: skip
        roles = drawn.roles
    else:
        known = None
        if cfg.forget_by == "sha256":
            known = dict(zip(columns.ids, (row.tobytes().hex() for row in columns.sha256), strict=True))
        _, drawn = open_and_draw(cfg, seed, foreign, known)
        lost = set(info.get("undecodable_ids", ()))
        roles = {sample_id: role for sample_id, role in drawn.roles.items() if sample_id not in lost}
        absent = len(roles) - sum(sample_id in roles for sample_id in columns.ids)
        if absent:
            raise DataError(
                f"{manifest.folder} holds shards of another selection: they lack {absent} images that the settings "
                "give a role; give the settings they were prepared with, or prepare new shards in another folder."
            )
    codes = (CODE[roles.get(sample_id, UNUSED)] for sample_id in columns.ids)
    persons = None
    if drawn.person:
        persons = np.array([drawn.person.get(sample_id, -1) for sample_id in columns.ids], dtype=np.int32)
    return np.fromiter(codes, dtype=np.uint8, count=len(columns)), drawn.facts, persons


def request_facts(info: Mapping[str, Any]) -> dict[str, Any]:
    """What shards and request, or the draw of the roles, say about the request: counts and digests, no ids."""
    names = ("forget_list", "forget_share", "whole_classes", "forget_with_copy_in_retain", "copies_in_retain",
             "dropped_copies", "copies_policy", "near_copies", "near_copies_of_members", "undecodable", "skipped_files",
             "left_out", "non_members", "excluded", "excluded_chain", "previous", "purged", "persons")  # fmt: skip
    facts = {name: info[name] for name in names if name in info}
    if "forget_list" in facts:
        facts["forget_list"] = {k: v for k, v in facts["forget_list"].items() if k != "missing_ids"}
    return facts
