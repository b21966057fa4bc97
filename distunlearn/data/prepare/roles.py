"""Which role each image plays: at most one, so roles are disjoint by construction.

Members (what the original encoder is trained on) are retain + forget. The forget part is a count, a
share, a class or a list of ids. Holdout, calibration, watch and both third-party roles are drawn from what is
left, from a source of non-members, or from those that the list names; the third-party two come from another source
when one is configured.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distunlearn.config.schema import DataConfig
from distunlearn.data.manifest.ids import IdTable
from distunlearn.data.prepare.forget_list import LIST_ROLES, NON_MEMBER, resolve_list
from distunlearn.data.prepare.persons import grouped, numbered, settle_persons
from distunlearn.data.schedule import permutation
from distunlearn.errors import ConfigError, DataError

_MIN_RETAIN = 2  # a contrastive loss compares at least two images
_Samples = Sequence[tuple[str, int | None]]


@dataclass(frozen=True)
class Drawn:
    """roles: {id: role}, only for images that have one, in drawing order. facts: of the request, for the summary.
    person: {id: number of the person on it}, where that is known.
    """

    roles: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)
    person: dict[str, int] = field(default_factory=dict)


def is_list(forget: int | float | str) -> bool:
    """Whether `data.forget` names a file of ids."""
    return isinstance(forget, str) and not forget.startswith("class:")


def list_column(cfg: DataConfig) -> str | None:
    """The column of the list that names images, or persons; None: one with a usual name."""
    return cfg.forget_column or (cfg.person_column if cfg.forget_by == "person" else None)


def assign_roles(samples: _Samples, cfg: DataConfig, seed: int, third_party: _Samples | None = None) -> dict[str, str]:
    """The roles alone, see `draw_roles`."""
    return draw_roles(samples, cfg, seed, third_party).roles


def draw_roles(
    samples: _Samples,
    cfg: DataConfig,
    seed: int,
    third_party: _Samples | None = None,
    holdout: _Samples | None = None,
    *,
    names: Sequence[Collection[str]] | None = None,
    excluded: Collection[str] = (),
    classes: Sequence[str] = (),
    skipped: str = "",
    foreign: bool = False,
    person: Mapping[str, str] | None = None,
) -> Drawn:
    """Draw the roles: a pure function of its arguments and of the list that `cfg.forget` names.

    Args:
        samples: (id, label or None) of the members' source.
        cfg: sizes and what to forget. cfg.members None: everything the other roles leave.
        seed: decides every draw. The draw of the members does not depend on how forget is chosen by
            count, share or class; ids of a list are made members first.
        third_party: (id, label) of the third-party source; required if cfg.third_party_source is set.
        holdout: (id, label) of the non-members' source; None: they are drawn from `samples`, or named by the list.
        names: by what a list may mean each of `samples`, see `resolve_list`. classes: names of the labels.
        excluded: ids that get no role.
        skipped: what the source left out, for messages.
        foreign: the encoder was trained elsewhere, so non-members must be named, not drawn.
        person: {id: person}; roles are then dealt to whole persons, see `persons`.

    Raises:
        DataError: nothing to forget, nothing left to retain, more to forget than `cfg.max_forget_share` allows, unknown
            ids (unless `cfg.allow_missing`), an id to be both forgotten and retained, too few images.
        ConfigError: a count or share that cannot be; unnamed non-members of a foreign encoder.
    """
    assert (third_party is not None) == (cfg.third_party_source is not None), "third-party samples and config differ"
    samples, names = _without(excluded, samples, names)
    labels, person = dict(samples), person or {}
    listed, facts = _read_list(cfg, samples, names, skipped)
    named = {i: role for role in LIST_ROLES[2:] for i in listed.get(role, ())}
    facts["non_members"] = "drawn" if holdout is None and not named else "named"
    _require_named(facts["non_members"], cfg, foreign)
    outside, strangers = _shares(cfg, third_party is not None)
    own = outside if facts["non_members"] == "drawn" else []

    members, rest = _members(samples, listed, named, own, cfg, seed, person)
    forget = _require_some(choose_forget(members, labels, cfg, seed, listed["forget"], classes), len(members), cfg)
    facts |= forget_facts(members, labels, forget, cfg, classes)
    roles = {sample_id: "forget" if sample_id in forget else "retain" for sample_id in members}
    roles |= deal(rest, own) if own else {}
    if not own and (holdout is None or named):
        roles |= _deal_named(named, outside, seed, cfg, person)
    if holdout is not None:
        left = [share for share in outside if share[0] not in roles.values()]
        roles |= _draw_outside(holdout, left, seed, labels, "holdout", cfg.holdout_source or cfg.source, person)
    if third_party is not None:
        roles |= _draw_outside(third_party, strangers, seed, labels, "third_party", cfg.third_party_source, person)
    if person:
        roles, more = settle_persons(roles, person)
        facts |= more
    return Drawn(roles, facts | ({"excluded": len(excluded)} if excluded else {}), numbered(person))


def _shares(cfg: DataConfig, third_party: bool) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(sizes of the roles dealt from the non-members, those of the third party). third_party: it has its own source."""
    strangers = [("third_party", cfg.third_party), ("third_party_audit", cfg.third_party_audit)]
    between = [] if third_party else strangers
    return [("holdout", cfg.holdout), ("calibration", cfg.calibration), *between, ("watch", cfg.watch)], strangers


def _members(
    samples: _Samples, listed: Mapping[str, list[str]], named: Mapping[str, str], own: list[tuple[str, int]],
    cfg: DataConfig, seed: int, person: Mapping[str, str],
) -> tuple[list[str], list[str]]:  # fmt: skip
    """(members, the ids left), each in the order of the draw; ids of the list come first."""
    first = [*listed["forget"], *listed["retain"]]
    num_members = _count_members(len(samples) - len(named), cfg, own)
    if len(first) > num_members:
        raise DataError(f"{cfg.forget} lists {len(first)} ids but data.members is {num_members}; raise data.members.")
    order = grouped((samples[i][0] for i in permutation(len(samples), seed, "roles")), person)
    settled = {*first, *named}
    order = first + [i for i in order if i not in settled]
    return order[:num_members], order[num_members:]


def _without(
    excluded: Collection[str], samples: _Samples, names: Sequence[Collection[str]] | None
) -> tuple[_Samples, Sequence[Collection[str]] | None]:
    """Samples and their names but for those ids."""
    if not excluded:
        return samples, names
    kept = [place for place, (sample_id, _) in enumerate(samples) if sample_id not in excluded]
    return [samples[place] for place in kept], None if names is None else [names[place] for place in kept]


def _require_named(non_members: str, cfg: DataConfig, foreign: bool) -> None:
    if foreign and non_members == "drawn":
        raise ConfigError(
            f"encoder.checkpoint was trained elsewhere, but {cfg.forget} names no images that it never saw; set "
            f"data.holdout_root (or data.holdout_source), or give images the role {NON_MEMBER} in the list."
        )


def _require_some(chosen: Iterable[str], num_members: int, cfg: DataConfig) -> set[str]:
    if forget := set(chosen):
        return forget
    raise DataError(
        f"There is nothing to forget: data.forget = {cfg.forget!r} selects none of the {num_members} members; "
        "select at least one image."
    )


def _deal_named(
    named: Mapping[str, str], wanted: list[tuple[str, int]], seed: int, cfg: DataConfig, person: Mapping[str, str]
) -> dict[str, str]:
    """Roles of the non-members that a list names: the given one, else one of those that no image was given."""
    free = [sample_id for sample_id, role in named.items() if role == NON_MEMBER]
    given = {sample_id: role for sample_id, role in named.items() if role != NON_MEMBER}
    if cfg.holdout_source is not None or cfg.holdout_root is not None:
        wanted = wanted if free else []
    open_roles = [share for share in wanted if share[0] not in given.values()]
    needed = sum(count for _, count in open_roles)
    if needed > len(free):
        parts = " + ".join(f"{count} {role}" for role, count in open_roles)
        raise DataError(
            f"{cfg.forget} names {len(free)} images as {NON_MEMBER}, but {needed} are needed ({parts}); name more, or "
            "lower data.*."
        )
    order = grouped((free[i] for i in permutation(len(free), seed, "non-members")), person)
    return given | deal(order, open_roles)


def forget_facts(
    members: Sequence[str],
    labels: Mapping[str, int | None],
    forget: Collection[str],
    cfg: DataConfig,
    classes: Sequence[str] = (),
) -> dict[str, Any]:
    """Share of the members and whole classes (by name, if they have names) that are to be forgotten.

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
    whole = _whole_classes(members, labels, forget)
    return {"forget_share": share, "whole_classes": [classes[label] for label in whole] if classes else whole}


def _count_members(available: int, cfg: DataConfig, own: list[tuple[str, int]]) -> int:
    others = sum(count for _, count in own)
    wanted = cfg.members or _MIN_RETAIN + 1
    if others + wanted > available:
        parts = " + ".join(f"{count} {role}" for role, count in [("members", wanted), *own])
        raise DataError(
            f"The source {cfg.source} has {available} images but {others + wanted} are needed ({parts}); lower data.*."
        )
    return cfg.members or available - others


def _read_list(
    cfg: DataConfig, samples: _Samples, names: Sequence[Collection[str]] | None, skipped: str
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Ids of a list file by role, as the source spells them, and its facts; empty for other ways to say it."""
    if not is_list(cfg.forget):
        return {"forget": [], "retain": []}, {}
    table = IdTable.of(sample_id for sample_id, _ in samples)
    found = resolve_list(
        str(cfg.forget), table, root=cfg.root, by=cfg.forget_by, names=names,
        column=list_column(cfg),
        allow_missing=cfg.allow_missing, skipped=skipped,
    )  # fmt: skip
    return {role: table.at(rows) for role, rows in found.rows.items()}, {"forget_list": found.facts()}


def _whole_classes(members: Sequence[str], labels: Mapping[str, int | None], forget: Collection[str]) -> list[int]:
    """Labels of which every member is to be forgotten."""
    total = Counter(labels[sample_id] for sample_id in members)
    gone = Counter(labels[sample_id] for sample_id in forget)
    return sorted(label for label, count in gone.items() if label is not None and count == total[label])


def choose_forget(
    members: list[str],
    labels: dict[str, int | None],
    cfg: DataConfig,
    seed: int,
    listed: list[str],
    classes: Sequence[str],
) -> Iterable[str]:
    """Ids of the members that `data.forget` means. listed: those of its list. classes: names of the labels."""
    forget = cfg.forget
    if isinstance(forget, str):
        return _of_class(members, labels, forget, classes) if forget.startswith("class:") else listed
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


def _of_class(members: list[str], labels: dict[str, int | None], forget: str, classes: Sequence[str]) -> list[str]:
    """Members of a class by its name, else by its number."""
    asked = forget.removeprefix("class:")
    known = sorted({label for label in labels.values() if label is not None})
    if asked in classes:
        wanted = classes.index(asked)
    elif re.fullmatch(r"\d{1,9}", asked) and int(asked) in known:
        wanted = int(asked)
    else:
        shown = [repr(name) for name in (classes or [f"class:{label}" for label in known])]
        found = f"the classes {', '.join(shown[:10])}{', ...' if len(shown) > 10 else ''}" if known else "no labels"
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


def _draw_outside(
    samples: _Samples, shares: list[tuple[str, int]], seed: int, taken: Collection[str], key: str, source: str | None,
    person: Mapping[str, str],
) -> dict[str, str]:  # fmt: skip
    """Roles of images of another source than the members'. key: of the settings that name it."""
    needed = sum(count for _, count in shares)
    if needed > len(samples):
        asked = [(role, count) for role, count in shares if count]
        parts = " + ".join(f"{count} {role}" for role, count in asked)
        raise DataError(
            f"The {key.replace('_', '-')} source {source} has {len(samples)} images but {needed} are needed ({parts}); "
            f"lower {' or '.join(f'data.{role}' for role, _ in asked)}, or bring more."
        )
    assert not any(sample_id in taken for sample_id, _ in samples), "ids of two sources collide"
    order = grouped((samples[i][0] for i in permutation(len(samples), seed, key)), person)
    return deal(order, shares)
