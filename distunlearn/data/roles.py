"""Which role each image plays: at most one, so roles are disjoint by construction.

Members (what the original encoder is trained on) are retain + forget. The forget part is a count, a
share, a class or a list of ids. Holdout, calibration and both third-party roles are drawn from what is
left; the third-party two come from another source when one is configured.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from distunlearn.config import DataConfig
from distunlearn.data.forget_list import read_ids
from distunlearn.data.schedule import permutation
from distunlearn.errors import ConfigError, DataError

__all__ = ["ROLES", "assign_roles"]

ROLES = ("retain", "forget", "third_party", "third_party_audit", "calibration", "holdout")

_MIN_RETAIN = 2  # a contrastive loss compares at least two images
_Samples = Sequence[tuple[str, int | None]]


def assign_roles(
    samples: _Samples, cfg: DataConfig, seed: int, third_party: _Samples | None = None
) -> dict[str, str]:
    """Draw the roles: a pure function of its arguments.

    Args:
        samples: (id, label or None) of the members' source.
        cfg: sizes and what to forget. cfg.members == 0: everything the other roles leave.
        seed: decides every draw. The draw of the members does not depend on how forget is chosen by
            count, share or class; ids of a list are made members first.
        third_party: (id, label) of the third-party source; required if cfg.third_party_source is set.

    Returns:
        {id: role}, only for images that have a role, in drawing order.

    Raises:
        DataError: nothing to forget, nothing left to retain, unknown ids, an id to be both forgotten
            and retained, too few images.
        ConfigError: a count or share that cannot be.
    """
    assert (third_party is not None) == (cfg.third_party_source is not None), "third-party samples and config differ"
    labels = dict(samples)
    listed = _read_list(cfg.forget, labels)
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
    if num_members - len(forget) < _MIN_RETAIN:
        raise DataError(
            f"data.forget selects {len(forget)} of {num_members} members; at least {_MIN_RETAIN} must be retained, "
            "so forget fewer or raise data.members."
        )
    roles = {sample_id: "forget" if sample_id in forget else "retain" for sample_id in members}
    roles.update(_deal(rest, own))
    if third_party is not None:
        roles.update(_draw_third_party(third_party, strangers, cfg, seed, labels))
    return roles


def _count_members(available: int, cfg: DataConfig, own: list[tuple[str, int]]) -> int:
    others = sum(count for _, count in own)
    wanted = cfg.members or _MIN_RETAIN + 1
    if others + wanted > available:
        parts = " + ".join(f"{count} {role}" for role, count in [("members", wanted), *own])
        raise DataError(
            f"The source {cfg.source} has {available} images but {others + wanted} are needed ({parts}); lower data.*."
        )
    return cfg.members or available - others


def _read_list(forget: int | float | str, known: Collection[str]) -> dict[str, list[str]]:
    """Ids of a list file, checked against the source; empty for the other ways to say what to forget."""
    if not isinstance(forget, str) or forget.startswith("class:"):
        return {"forget": [], "retain": []}
    listed = read_ids(forget)
    both = set(listed["forget"]) & set(listed["retain"])
    if both:
        raise DataError(f"{forget} lists {_some(both)} both to forget and to retain; keep each id once.")
    unknown = [sample_id for ids in listed.values() for sample_id in ids if sample_id not in known]
    if unknown:
        raise DataError(f"{forget} lists {_some(unknown)} which the source does not have; correct the list.")
    return listed


def _some(ids: Collection[str], most: int = 5) -> str:
    """'3 ids ('a', 'b', 'c')', sorted, cut after a few, escaped."""
    shown = ", ".join(repr(sample_id) for sample_id in sorted(ids)[:most])
    more = ", ..." if len(ids) > most else ""
    return f"{len(ids)} id{'s' if len(ids) > 1 else ''} ({shown}{more})"


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


def _deal(order: list[str], shares: list[tuple[str, int]]) -> dict[str, str]:
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
    return _deal(order, shares)
