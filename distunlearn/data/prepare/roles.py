"""Which role each image plays: at most one, so roles are disjoint by construction.

Members (what the original encoder is trained on) are retain + forget. The forget part is a count, a
share, a class or a list of ids. Holdout, calibration and both third-party roles are drawn from what is
left; the third-party two come from another source when one is configured.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distunlearn.config.schema import DataConfig
from distunlearn.data.manifest.ids import IdTable
from distunlearn.data.prepare.forget_list import resolve_list, some
from distunlearn.data.schedule import permutation
from distunlearn.errors import ConfigError, DataError

_MIN_RETAIN = 2  # a contrastive loss compares at least two images
_Samples = Sequence[tuple[str, int | None]]


@dataclass(frozen=True)
class Drawn:
    """roles: {id: role}, only for images that have one, in drawing order. facts: of the request, for the summary."""

    roles: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)


def is_list(forget: int | float | str) -> bool:
    """Whether `data.forget` names a file of ids."""
    return isinstance(forget, str) and not forget.startswith("class:")


def assign_roles(samples: _Samples, cfg: DataConfig, seed: int, third_party: _Samples | None = None) -> dict[str, str]:
    """The roles alone, see `draw_roles`."""
    return draw_roles(samples, cfg, seed, third_party).roles


def draw_roles(samples: _Samples, cfg: DataConfig, seed: int, third_party: _Samples | None = None) -> Drawn:
    """Draw the roles: a pure function of its arguments and of the list that `cfg.forget` names.

    Args:
        samples: (id, label or None) of the members' source.
        cfg: sizes and what to forget. cfg.members None: everything the other roles leave.
        seed: decides every draw. The draw of the members does not depend on how forget is chosen by
            count, share or class; ids of a list are made members first.
        third_party: (id, label) of the third-party source; required if cfg.third_party_source is set.

    Raises:
        DataError: nothing to forget, nothing left to retain, more to forget than `cfg.max_forget_share` allows, unknown
            ids (unless `cfg.allow_missing`), an id to be both forgotten and retained, too few images.
        ConfigError: a count or share that cannot be.
    """
    assert (third_party is not None) == (cfg.third_party_source is not None), "third-party samples and config differ"
    labels = dict(samples)
    listed, facts = _read_list(cfg, samples)
    own = [("holdout", cfg.holdout), ("calibration", cfg.calibration)]
    strangers = [("third_party", cfg.third_party), ("third_party_audit", cfg.third_party_audit)]
    if third_party is None:
        own += strangers
    num_members = _count_members(len(labels), cfg, own)

    order = [samples[i][0] for i in permutation(len(samples), seed, "roles")]
    first = [*listed["forget"], *listed["retain"]]
    if len(first) > num_members:
        raise DataError(f"{cfg.forget} lists {len(first)} ids but data.members is {num_members}; raise data.members.")
    first_set = set(first)
    order = first + [sample_id for sample_id in order if sample_id not in first_set]
    members, rest = order[:num_members], order[num_members:]

    forget = set(_choose_forget(members, labels, cfg, seed, listed["forget"]))
    if not forget:
        raise DataError(
            f"There is nothing to forget: data.forget = {cfg.forget!r} selects none of the {num_members} members; "
            "select at least one image."
        )
    facts |= forget_facts(members, labels, forget, cfg)
    roles = {sample_id: "forget" if sample_id in forget else "retain" for sample_id in members}
    roles.update(deal(rest, own))
    if third_party is not None:
        roles.update(_draw_third_party(third_party, strangers, cfg, seed, labels))
    return Drawn(roles, facts)


def forget_facts(
    members: Sequence[str], labels: Mapping[str, int | None], forget: Collection[str], cfg: DataConfig
) -> dict[str, Any]:
    """Share of the members and whole classes that are to be forgotten.

    Raises:
        DataError: too little is left to retain, or the share is larger than `cfg.max_forget_share`.
    """
    if len(members) - len(forget) < _MIN_RETAIN:
        raise DataError(
            f"data.forget selects {len(forget)} of {len(members)} members; at least {_MIN_RETAIN} must be retained, "
            "so forget fewer or raise data.members."
        )
    if len(forget) > cfg.max_forget_share * len(members):
        raise DataError(
            f"data.forget selects {len(forget)} of {len(members)} members, more than the share "
            f"data.max_forget_share={cfg.max_forget_share:g} allows; forget fewer, or raise it if that is meant."
        )
    share = round(len(forget) / len(members), 6)
    return {"forget_share": share, "whole_classes": _whole_classes(members, labels, forget)}


def _count_members(available: int, cfg: DataConfig, own: list[tuple[str, int]]) -> int:
    others = sum(count for _, count in own)
    wanted = cfg.members or _MIN_RETAIN + 1
    if others + wanted > available:
        parts = " + ".join(f"{count} {role}" for role, count in [("members", wanted), *own])
        raise DataError(
            f"The source {cfg.source} has {available} images but {others + wanted} are needed ({parts}); lower data.*."
        )
    return cfg.members or available - others


def _read_list(cfg: DataConfig, samples: _Samples) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Ids of a list file as the source spells them, and its facts; empty for the other ways to say what to forget."""
    if not is_list(cfg.forget):
        return {"forget": [], "retain": []}, {}
    table = IdTable.of(sample_id for sample_id, _ in samples)
    found = resolve_list(str(cfg.forget), table)
    if found.num_missing and not cfg.allow_missing:
        raise DataError(
            f"{cfg.forget} lists {some(found.missing, found.num_missing)} which the source does not have"
            f"{_near_miss(found.missing, samples)}; correct the list, or set data.allow_missing=true to leave such ids "
            "out and have them recorded."
        )
    return {"forget": table.at(found.forget), "retain": table.at(found.retain)}, {"forget_list": found.facts()}


def _near_miss(missing: Sequence[str], samples: _Samples) -> str:
    """A hint for a list that was written on a system that does not tell upper from lower case."""
    wanted = {sample_id.casefold() for sample_id in missing}
    match = next((sample_id for sample_id, _ in samples if sample_id.casefold() in wanted), None)
    return "" if match is None else f" (but {match[:80]!r} differs only in case)"


def _whole_classes(members: Sequence[str], labels: Mapping[str, int | None], forget: Collection[str]) -> list[int]:
    """Labels of which every member is to be forgotten."""
    total = Counter(labels[sample_id] for sample_id in members)
    gone = Counter(labels[sample_id] for sample_id in forget)
    return sorted(label for label, count in gone.items() if label is not None and count == total[label])


def _choose_forget(
    members: list[str], labels: dict[str, int | None], cfg: DataConfig, seed: int, listed: list[str]
) -> Iterable[str]:
    forget = cfg.forget
    if isinstance(forget, str):
        return _of_class(members, labels, forget) if forget.startswith("class:") else listed
    if isinstance(forget, float):
        if not 0 < forget < 1:
            raise ConfigError(f"data.forget is {forget}; expected a count or a share strictly between 0 and 1.")
        forget = round(forget * len(members))
    if forget < 0:
        raise ConfigError(f"data.forget is {forget}; expected a positive count.")
    if forget > len(members):
        raise DataError(f"data.forget is {forget} but there are only {len(members)} members; forget fewer.")
    order = permutation(len(members), seed, "forget")[:forget]
    return [members[i] for i in order]


def _of_class(members: list[str], labels: dict[str, int | None], forget: str) -> list[str]:
    match = re.fullmatch(r"class:(\d{1,9})", forget)
    if match is None:
        raise ConfigError(f"data.forget is {forget!r}; expected class:N with a class number, such as class:3.")
    wanted = int(match.group(1))
    known = sorted({label for label in labels.values() if label is not None})
    if wanted not in known:
        found = f"classes {known[0]} to {known[-1]}" if known else "no labels"
        raise DataError(f"data.forget is {forget!r} but the source has {found}; nothing to forget.")
    return [sample_id for sample_id in members if labels[sample_id] == wanted]


def deal(order: list[str], shares: list[tuple[str, int]]) -> dict[str, str]:
    """The first ids to the first role, the next to the second, and so on."""
    dealt: dict[str, str] = {}
    start = 0
    for role, count in shares:
        dealt.update(dict.fromkeys(order[start : start + count], role))
        start += count
    return dealt


def _draw_third_party(
    samples: _Samples, shares: list[tuple[str, int]], cfg: DataConfig, seed: int, taken: Collection[str]
) -> dict[str, str]:
    needed = sum(count for _, count in shares)
    if needed > len(samples):
        raise DataError(
            f"The third-party source {cfg.third_party_source} has {len(samples)} images but {needed} are needed "
            f"({cfg.third_party} third_party + {cfg.third_party_audit} third_party_audit); lower data.third_party*."
        )
    assert not any(sample_id in taken for sample_id, _ in samples), "ids of two sources collide"
    order = [samples[i][0] for i in permutation(len(samples), seed, "third_party")]
    return deal(order, shares)
