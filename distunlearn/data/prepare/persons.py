"""Who is on an image, and what follows where persons are the units of a request.

A person whose images are trained on is no stranger: no image of theirs is a non-member, and no person has images in two
roles of non-members. So roles are dealt to whole persons, as far as the numbers allow, and the rest is left out. An
image of which no person is known is a person of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distunlearn.config.schema import DataConfig
from distunlearn.data.manifest.columns import NO_LABEL
from distunlearn.data.manifest.ids import IdTable
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.manifest.records import CODE, CODES, UNUSED
from distunlearn.data.prepare.duplicates import exact_copies
from distunlearn.data.prepare.forget_list import Finder
from distunlearn.data.prepare.list_file import Faults, entries, sniff, with_column

BY_CLASS = "class"  # in the place of a table: the class, of a folder its first level, is the person
MEMBERS = ("retain", "forget")
# Of a person in several roles the first one stays.
ORDER = (MEMBERS, ("third_party",), ("calibration",), ("third_party_audit",), ("holdout",), ("watch",))

Samples = Sequence[tuple[str, int | None]]


def read_persons(cfg: DataConfig, sources: Iterable[tuple[Samples, Sequence[str]]]) -> dict[str, str]:
    """{id: person} of the images of which `data.persons` says it.

    Args:
        sources: samples of each source, and the names of its classes.

    Raises:
        DataError: the table cannot be read, has no column of persons, names no image, or two persons for one image.
    """
    if cfg.persons is None:
        return {}
    listed = list(sources)
    if cfg.persons == BY_CLASS:
        return {
            sample_id: names[label] if label < len(names) else str(label)
            for samples, names in listed for sample_id, label in samples if label is not None
        }  # fmt: skip
    path = Path(cfg.persons).expanduser()
    table = IdTable.of(sample_id for samples, _ in listed for sample_id, _ in samples)
    finder = Finder(table, cfg.root, None)
    form = sniff(path, None, "id", lambda some_texts: (finder.plain(some_texts) >= 0).tolist())
    faults = Faults(path)
    rows = list(entries(path, with_column(path, form, cfg.person_column), faults))
    found: dict[int, str] = {}
    places = finder.find([text for _, text, _ in rows], faults).tolist()
    for (line, text, person), row in zip(rows, places, strict=True):
        if row >= 0 and person and found.setdefault(row, person) != person:
            faults.add(f"line {line}: {text[:80]!r} is listed with two persons")
    if not found:
        faults.add(f"no line has a person in column {cfg.person_column!r} and an image of the source")
    faults.refuse()
    return dict(zip(table.at(np.array(list(found), dtype=np.int64)), found.values(), strict=True))


def grouped(order: Iterable[str], person: Mapping[str, str]) -> list[str]:
    """The same ids, each person's together, persons in the order of their first image."""
    groups: dict[str, list[str]] = {}
    for sample_id in order:
        groups.setdefault(_unit(sample_id, person), []).append(sample_id)
    return [sample_id for group in groups.values() for sample_id in group]


def settle_persons(roles: Mapping[str, str], person: Mapping[str, str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Roles without the images of persons that an earlier group of `ORDER` has, and facts; counts alone, no names."""
    kept = dict(roles)
    taken: set[str] = set()
    dropped: Counter[str] = Counter()
    for group in ORDER:
        here = [sample_id for sample_id, role in kept.items() if role in group and sample_id in person]
        for sample_id in here:
            if person[sample_id] in taken:
                dropped[kept.pop(sample_id)] += 1
        taken |= {person[sample_id] for sample_id in here}
    requested = {person[i] for i, role in kept.items() if role == "forget" and i in person}
    numbers = {
        role: len({_unit(i, person) for i, own in kept.items() if own == role})
        for role in sorted(set(kept.values()))
    }  # fmt: skip
    stay = [i for i, role in kept.items() if role == "retain" and person.get(i) in requested]
    facts = {"requested": len(requested), "by_role": numbers, "dropped": dict(dropped)}
    return kept, {"persons": facts | {"images_of_requested_that_stay": len(stay)}}


def copied_persons(sha256: np.ndarray, role: np.ndarray, person: np.ndarray) -> dict[str, int]:
    """How many requested persons have an image whose very bytes are among the retained. person: int32 [n], or -1."""
    gone, _ = exact_copies(sha256, *(np.flatnonzero(role == CODE[name]) for name in ("forget", "retain")))
    return {"requested_with_copy_in_retain": len(np.unique(person[gone]))}


def with_persons(manifest: Manifest, numbers: Mapping[str, int]) -> Manifest:
    """The manifest with the numbers of the persons, by id, and the count of those with a retained copy."""
    if not numbers:
        return manifest
    person = np.array([numbers.get(sample_id, -1) for sample_id in manifest.columns.ids], dtype=np.int32)
    role, facts = manifest.columns.role, dict(manifest.facts)
    facts["persons"] = facts["persons"] | copied_persons(manifest.columns.sha256, role, person)
    return manifest.with_roles(role, facts, person)


def of_index(cfg: DataConfig, manifest: Manifest) -> dict[str, str]:
    """`read_persons` of the images of an index."""
    labels = (None if label == NO_LABEL else label for label in manifest.columns.label.tolist())
    return read_persons(cfg, [(list(zip(manifest.columns.ids, labels, strict=True)), manifest.info.get("classes", []))])


def settle_index(
    cfg: DataConfig, manifest: Manifest, role: np.ndarray
) -> tuple[np.ndarray, dict[str, Any], np.ndarray | None]:
    """(roles after `settle_persons`, facts, numbers of the persons); the roles as they are where none are known."""
    person = of_index(cfg, manifest)
    if not person:
        return role, {}, None
    names = dict(zip(manifest.columns.ids, (CODES[code] for code in role.tolist()), strict=True))
    kept, facts = settle_persons({i: own for i, own in names.items() if own != UNUSED}, person)
    numbers = numbered(person)
    found = np.array([numbers.get(i, -1) for i in manifest.columns.ids], dtype=np.int32)
    role = np.array([CODE[kept.get(i, UNUSED)] for i in manifest.columns.ids], dtype=np.uint8)
    facts["persons"] |= copied_persons(manifest.columns.sha256, role, found)
    return role, facts, found


def numbered(person: Mapping[str, str]) -> dict[str, int]:
    """{id: number of its person}: names are not kept in a run."""
    numbers = {name: number for number, name in enumerate(sorted(set(person.values())))}
    return {sample_id: numbers[name] for sample_id, name in person.items()}


def _unit(sample_id: str, person: Mapping[str, str]) -> str:
    return f"p {person[sample_id]}" if sample_id in person else f"i {sample_id}"
