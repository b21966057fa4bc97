"""audit/scores-<encoder>.json: the raw scores, read strictly, and what the figures are made of.

{"encoder", "state", "signs": {attack: 1 or -1}, "samples": {id: {"role", "label", score ...}}}. state: digest of the
weights that gave the scores. A sign says whether high scores accuse; a score that an image does not have is left out.
`person`, where one is known, is the number of who is on the image. An attack that is fitted crosswise has its scores as
`<attack>_fold0` and so on, one part of its comparison each. `place_0` and so on, of the original encoder, say where an
image to forget or of the holdout lies among these: the principal axes of their embeddings.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import EvidenceError
from .figures import ENCODERS, REFERENCES, UTILITIES, Raw
from .records import read_record
from .reference_groups import Placed
from .statistics import Comparison, Part

HARDNESS = ("view_agreement", "bank_loss", "gradient_norm_head")  # what retained images have a score of


def score_names(attack: str, parts: int) -> list[str]:
    """Names of the scores of an attack, one for each part of its comparison."""
    return [attack] if parts == 1 else [f"{attack}_fold{number}" for number in range(parts)]


def read_scores(folder: Path) -> dict[str, dict[str, Any]]:
    """The score files of an `audit` folder, by encoder; those that are there.

    Raises:
        EvidenceError: a file is no such file, or they are not of the same images in the same order and roles.
    """
    found: dict[str, dict[str, Any]] = {}
    for encoder in dict.fromkeys((*ENCODERS, *REFERENCES)):
        path = Path(folder) / f"scores-{encoder}.json"
        if os.path.lexists(path):
            found[encoder] = _read(path, encoder)
    listed = {e: [(i, row.get("role")) for i, row in content["samples"].items()] for e, content in found.items()}
    signs = {e: content["signs"] for e, content in found.items()}
    for encoder, content in listed.items():
        if content != next(iter(listed.values())) or signs[encoder] != next(iter(signs.values())):
            raise EvidenceError(
                f"audit/scores-{encoder}.json is not of the images, roles and attacks of the other encoders; expected "
                "one list for all; audit the run again."
            )
    return found


def _read(path: Path, encoder: str) -> dict[str, Any]:
    content = read_record(path, {"samples": dict, "signs": dict}, EvidenceError)
    whole = content.get("encoder") == encoder and all(sign in (1, -1) for sign in content["signs"].values())
    whole = whole and all(isinstance(row, dict) and _is_row(row) for row in content["samples"].values())
    if not whole:
        raise EvidenceError(
            f"audit/{path.name} is not the file of raw scores that an audit writes; restore it or audit the run again."
        )
    return content


def _is_row(row: Mapping[str, Any]) -> bool:
    """A role and numbers."""
    numbers = [value for name, value in row.items() if name != "role"]
    kinds = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in numbers)
    return isinstance(row.get("role"), str) and kinds and all(map(math.isfinite, numbers))


def raw_scores(files: Mapping[str, Mapping[str, Any]]) -> Raw:
    """What the figures are computed from.

    Args:
        files: from `read_scores`, of the original and the unlearned encoder at least.

    Raises:
        EvidenceError: an image to forget or of the holdout lacks a score.
    """
    first = next(iter(files.values()))
    rows = {encoder: list(content["samples"].values()) for encoder, content in files.items()}
    comparisons = {
        attack: {encoder: _comparison(attack, sign, rows[encoder]) for encoder in files}
        for attack, sign in first["signs"].items()
    }
    holdout = {encoder: [row for row in those if row["role"] == "holdout"] for encoder, those in rows.items()}
    correct = {
        encoder: {name: np.array([row.get(f"{name}_correct", math.nan) for row in those]) for name in UTILITIES}
        for encoder, those in holdout.items()
    }
    sides = [[row for row in first["samples"].values() if row["role"] == role] for role in ("forget", "holdout")]
    known = any("person" in row for row in sides[0])
    numbers = (np.array([row.get("person", -1) for row in side]) for side in sides)
    persons = tuple(map(units_of, numbers)) if known else None
    placed = _placed(rows["original"], first["signs"]) if "original" in rows else None
    return Raw(comparisons, correct, len(sides[0]), len(sides[1]), persons, placed)  # type: ignore[arg-type]


def _placed(rows: list[Mapping[str, Any]], signs: Mapping[str, int]) -> Placed | None:
    """How hard the original encoder finds the images to forget and the held-out ones, and where they lie."""
    retain, forget, holdout = ([row for row in rows if row["role"] == role] for role in ("retain", "forget", "holdout"))
    axes = sum(name.startswith("place_") for name in (holdout or [{}])[0])
    names = [f"place_{axis}" for axis in range(axes)]
    if not (retain and forget and axes) or any(name not in row for row in forget + holdout for name in names):
        return None
    shares = []
    for name in HARDNESS:
        if name in signs and all(name in row for row in retain + forget + holdout):
            scores = [signs[name] * np.array([row[name] for row in side]) for side in (retain, forget, holdout)]
            shares.append((_above(scores[1], scores[0]), _above(scores[2], scores[2])))
    if not shares:
        return None
    places = [np.array([[row[name] for name in names] for row in side]) for side in (forget, holdout)]
    hardness = [np.mean(side, axis=0) for side in zip(*shares, strict=True)]
    return Placed((hardness[0], hardness[1]), (places[0], places[1]))


def _above(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Share of `others` that score above each, ties counted half, float64 [n]."""
    ranked = np.sort(others)
    below = np.searchsorted(ranked, scores, "left") + np.searchsorted(ranked, scores, "right")
    return 1 - below / (2 * len(ranked))


def units_of(persons: np.ndarray) -> np.ndarray:
    """Who is on each image, int64; where nobody says (-1), the image is a person of its own, of a negative number."""
    return np.where(persons >= 0, persons, -1 - np.arange(len(persons))).astype(np.int64)


def _comparison(attack: str, sign: int, rows: list[Mapping[str, Any]]) -> Comparison:
    forget = [row for row in rows if row["role"] == "forget"]
    holdout = [row for row in rows if row["role"] == "holdout"]
    parts = sum(name.startswith(f"{attack}_fold") for name in (forget or [{}])[0]) or 1
    found = []
    for name in score_names(attack, parts):
        at = [place for place, row in enumerate(holdout) if name in row]
        if any(name not in row for row in forget) or (parts == 1 and len(at) < len(holdout)):
            raise EvidenceError(
                f"the raw scores lack {name} of an image to forget or of the holdout; expected one of each; audit the "
                "run again."
            )
        positives = sign * np.array([row[name] for row in forget], dtype=np.float64)
        negatives = sign * np.array([holdout[place][name] for place in at], dtype=np.float64)
        found.append(Part(positives, negatives, np.array(at, dtype=np.int64)))
    return Comparison(tuple(found))
