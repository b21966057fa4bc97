"""The next request on an encoder that has forgotten before: its roles follow from those of the run before.

Members and non-members stay what they were; what any earlier request forgot is `forgotten`, found by the digest of its
bytes, whatever it is called now: it is in no training, and audits look at it. An image that the run before did not
know is `unused`, for the encoder never trained on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distunlearn.config.schema import DataConfig
from distunlearn.data.manifest.columns import NO_HASH, NO_LABEL
from distunlearn.data.manifest.ids import normal_id
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.manifest.records import CODE, FORGOTTEN, UNUSED
from distunlearn.data.manifest.request import Request, keys_of
from distunlearn.data.prepare.duplicates import duplicate_facts, near_copies
from distunlearn.data.prepare.forget_list import resolve_list, some
from distunlearn.data.prepare.persons import of_index, settle_index
from distunlearn.data.prepare.roles import choose_forget, forget_facts, is_list, list_column
from distunlearn.data.sources.sources import ShardSource, names_by
from distunlearn.errors import DataError
from distunlearn.verify.chain import Chain

_MEMBERS = (CODE["retain"], CODE["forget"])
_CHAINED = "previous"  # among the facts of a request


def next_request(cfg: DataConfig, seed: int, manifest: Manifest, previous: Path) -> Manifest:
    """The index with the roles of the next request of a chain; no image is read.

    Args:
        cfg: what to forget now, and policies. previous: directory of the run before, which has forgotten.

    Raises:
        DataError: there is no such run, its chain or request are damaged, an id of an earlier request is a member again
            or is listed, the list is refused, nothing is left to retain.
    """
    chain = Chain.load(previous)
    role, known = _carried(manifest, previous)
    role, facts = leave_out(manifest, role, chain, cfg.near_distance)
    fresh = int((~known & (role != CODE[FORGOTTEN])).sum())
    facts = {**facts, "new_images": fresh, "requests": len(chain.requests), "labels": chain.labels}
    role, found = _with_forget(cfg, seed, manifest, role, chain)
    role, persons, person = settle_index(cfg, manifest, role)
    role, copies = duplicate_facts(manifest.columns.with_roles(role), cfg.copies, cfg.near_distance)
    before = Request.load(previous).facts
    kept = {name: before[name] for name in ("non_members",) if name in before}
    return manifest.with_roles(role, {**kept, **copies, **found, **persons, _CHAINED: facts}, person)


def leave_out(
    manifest: Manifest, role: np.ndarray, chain: Chain, near_distance: int | None
) -> tuple[np.ndarray, dict[str, Any]]:
    """(roles in which every image that the chain forgot is `forgotten`, facts); by digest.

    Raises:
        DataError: a member has the id of a forgotten image, and other bytes.
    """
    columns = manifest.columns
    numbers = np.array(chain.requests_of(row.tobytes() for row in columns.sha256), dtype=np.int64)
    role = np.where(numbers > 0, CODE[FORGOTTEN], role).astype(np.uint8)
    members = np.flatnonzero(np.isin(role, _MEMBERS))
    again = [name for name in columns.ids.at(members) if chain.has_id(normal_id(name))]
    if again:
        raise DataError(
            f"An earlier request forgot {some(again)} under other bytes, and now they are members again; take them out "
            "of the images, or give them other ids if they are other images."
        )
    near = 0
    if near_distance is not None:
        known = members[columns.near[members] != NO_HASH]
        hashes = np.array(chain.hashes(), dtype=np.uint64)
        near = int(near_copies(columns.near[known], hashes, near_distance)[0].sum())
    return role, {
        "forgotten": len(chain.forgotten),
        "present": int((numbers > 0).sum()),
        "near_copies_among_members": near,
    }


def _carried(manifest: Manifest, previous: Path) -> tuple[np.ndarray, np.ndarray]:
    """(roles of the run before, on this index; bool [n]: which images it knew)."""
    request = Request.load(previous)
    if manifest.has_been(request.index):
        return manifest.requested(previous).columns.role, np.ones(len(manifest), dtype=bool)
    # Of images with the same bytes one with a role counts: an exact copy that was dropped has none.
    order = np.lexsort((request.role != CODE[UNUSED], request.key))
    wanted = keys_of(manifest.columns.sha256)
    place = np.searchsorted(request.key[order], wanted, "right") - 1
    rows = order[np.maximum(place, 0)]
    found = (place >= 0) & (request.key[rows] == wanted)
    return np.where(found, request.role[rows], CODE[UNUSED]).astype(np.uint8), found


def _with_forget(
    cfg: DataConfig, seed: int, manifest: Manifest, role: np.ndarray, chain: Chain
) -> tuple[np.ndarray, dict[str, Any]]:
    """(roles in which what the settings name is to be forgotten, facts of the request)."""
    columns = manifest.columns
    role = np.where(role == CODE["forget"], CODE["retain"], role).astype(np.uint8)  # of a run that was never finished
    rows = np.flatnonzero(role == CODE["retain"])
    members = columns.ids.at(rows)
    labels = {i: None if k == NO_LABEL else k for i, k in zip(members, columns.label[rows].tolist(), strict=True)}
    classes, facts, listed = manifest.info.get("classes", []), {}, []
    if is_list(cfg.forget):
        found = resolve_list(
            str(cfg.forget), columns.ids, root=cfg.root, by=cfg.forget_by, column=list_column(cfg),
            names=names_of(cfg, manifest), allow_missing=cfg.allow_missing,
        )  # fmt: skip
        facts["forget_list"] = found.facts()
        chosen = found.rows["forget"]
        listed = columns.ids.at(_members_alone(cfg, manifest, role, chosen))
        odd = [name for name, own in found.rows.items() if name not in ("forget", "retain") and len(own)]
        back = columns.ids.at(found.rows["retain"][role[found.rows["retain"]] != CODE["retain"]])
        if odd or back:
            raise DataError(
                f"{cfg.forget} gives the role {odd[0] if odd else 'retain'} to images, but members and non-members are "
                "those of the run before; name only images to forget."
            )
    forget = set(choose_forget(members, labels, cfg, seed, listed, classes))
    if not forget:
        raise DataError(f"data.forget = {cfg.forget!r} selects none of the {len(members)} members; name at least one.")
    facts |= forget_facts(members, labels, forget, cfg, classes)
    role[[row for row, name in zip(rows.tolist(), members, strict=True) if name in forget]] = CODE["forget"]
    return role, facts


def _members_alone(cfg: DataConfig, manifest: Manifest, role: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The listed rows that are members; DataError for those that were forgotten before or never trained on."""
    for code, why in (
        ((CODE[FORGOTTEN],), "an earlier request has forgotten already"),
        (tuple(code for name, code in CODE.items() if name not in ("retain", FORGOTTEN)), "the encoder never saw"),
    ):
        wrong = rows[np.isin(role[rows], code)]
        if len(wrong) and not cfg.allow_missing:
            ids = manifest.columns.ids.at(wrong[:6])
            raise DataError(
                f"{cfg.forget} lists {some(ids, len(wrong))}, which {why}; take them out of the list, or set "
                "data.allow_missing=true to leave them out."
            )
    return rows[role[rows] == CODE["retain"]]


def chain_after(manifest: Manifest, chain: Chain, **facts: Any) -> Chain:
    """The chain with the request of this manifest. facts: of the request."""
    rows, columns = manifest.rows(("forget",)), manifest.columns
    near = [None if value == NO_HASH else value for value in columns.near[rows].tolist()]
    digests = [row.tobytes() for row in columns.sha256[rows]]
    ids = [normal_id(name) for name in columns.ids.at(rows)]
    labels = max(chain.labels, count_labels(manifest) or 0)
    return chain.with_request(list(zip(digests, ids, near, strict=True)), labels=labels, **facts)


def count_labels(manifest: Manifest) -> int | None:
    """Outputs of a classifier of the members, of those too that the chain forgot; None: not every member has a label.

    A class may be gone with its last image, by a purge: the encoder that a request begins with has its output.
    """
    labels = manifest.label_range(("retain", "forget", FORGOTTEN))
    if labels is None or labels[0] < 0:
        return None
    return max(labels[1] + 1, (chained(manifest.facts) or {}).get("labels", 0))


def chained(facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a request says of those before it; None for the first of a chain."""
    return facts.get(_CHAINED)


def names_of(cfg: DataConfig, manifest: Manifest) -> list[list[str]] | None:
    """By what a list may name each image of an index; None for ids.

    Raises:
        DataError: the index does not keep such names, and the headers of the shards cannot be read.
    """
    if not is_list(cfg.forget) or cfg.forget_by == "id":
        return None
    if cfg.forget_by == "person":
        person = of_index(cfg, manifest)
        return [[person[i]] if i in person else [] for i in manifest.columns.ids]
    kept = manifest.info.get("indexed", {}).get("named_by", "id")
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
