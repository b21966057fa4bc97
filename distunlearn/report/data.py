"""What a run directory holds, read for the report: only figures leave here, never an id, a file name or a picture.

Everything is read as plain data (JSON, YAML without tags); every text is cut and made harmless. This
module alone knows the format of audit/scores-*.json.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from distunlearn.common.text import printable
from distunlearn.config.yaml import read_yaml
from distunlearn.errors import ConfigError, DataError
from distunlearn.verify.chain import chain_facts
from distunlearn.verify.commitment import run_rules
from distunlearn.verify.ledger import read_ledger
from distunlearn.verify.records import find_record, read_plain
from distunlearn.verify.run import Checked, check_run

ENCODER_NAMES = ("original", "unlearned", "retrained")
MAX_NODES = 20_000  # values kept of one settings or summary file
MAX_DEPTH = 12
MAX_TEXT = 200  # characters of one text
MAX_KEY = 60


@dataclass(frozen=True)
class Scores:
    """Finite scores of one encoder: role -> score name -> float64 [n], sorted, so that no order gives an id away."""

    by_role: Mapping[str, Mapping[str, np.ndarray]]

    def of(self, role: str, name: str) -> np.ndarray:
        """Values [n] of score `name` for the images of `role`; empty when there are none."""
        return self.by_role.get(role, {}).get(name, np.empty(0))


@dataclass(frozen=True)
class RunFiles:
    """A run directory in memory; a file that is not there is an empty dict."""

    config: dict[str, Any]
    env: dict[str, Any]
    plan: dict[str, Any]
    shards: dict[str, Any]
    request: dict[str, Any]
    chain: dict[str, Any]  # see `chain_facts`
    purge: dict[str, Any]
    audit: dict[str, Any]
    done: dict[str, Any]
    original: dict[str, Any]  # its done.json
    retrained: dict[str, Any]  # its done.json
    dose: dict[str, Any]  # the curve behind `method.dose=auto`
    scores: Mapping[str, Scores]
    config_sha256: str | None  # of the bytes of run.yaml
    finished: str | None  # when the forgetting ended, from the ledger, UTC
    checked: Checked = field(default_factory=Checked)  # what `check_run` found
    folder: Path | None = None  # of the run
    request_sha256: str | None = None  # of the bytes of request.json


def load_run(run_dir: str | Path) -> RunFiles:
    """Read what the report needs of `run_dir`.

    Raises DataError when the folder holds no run, or when one of its files is damaged: a report must
    not be written from half of the evidence.
    """
    folder = Path(run_dir)
    settings = folder / "run.yaml"
    if not settings.is_file() and not (folder / "audit" / "summary.json").is_file():
        raise DataError(
            f"{printable(folder)} holds neither run.yaml nor audit/summary.json; "
            "give the folder that `distunlearn run ... --out` wrote."
        )
    scores = {}
    for encoder in ENCODER_NAMES:
        raw = _read_json(folder / "audit" / f"scores-{encoder}.json")
        if raw:
            scores[encoder] = _scores(raw, encoder)
    return RunFiles(
        config=_read_yaml(settings),
        env=_clean_file(folder / "env.json"),
        plan=_clean_file(folder / "plan.json"),
        shards=_clean_file(folder / "shards" / "summary.json"),
        request=_clean_file(folder / "request.json"),
        chain=chain_facts(folder),
        purge=_clean_file(folder / "purge.json"),
        audit=_clean_file(folder / "audit" / "summary.json"),
        done=_clean_file(folder / "done.json"),
        original=_clean_file(folder / "original" / "done.json"),
        retrained=_clean_file(folder / "retrained" / "done.json"),
        dose=_clean_file(folder / "dose" / "curve.json"),
        scores=scores,
        config_sha256=_sha256(settings),
        request_sha256=_sha256(folder / "request.json"),
        finished=_finished(folder / "ledger.jsonl"),
        folder=folder,
    )


def checked_run(run_dir: str | Path) -> RunFiles:
    """`load_run` of a directory whose files agree with each other.

    Raises:
        DataError: also where two files contradict each other, see `verify.run`.
    """
    run = load_run(run_dir)
    try:
        rules = run_rules(run.config, Path(run_dir))
    except (KeyError, TypeError, ValueError, AttributeError):
        rules = None
    return replace(run, checked=check_run(Path(run_dir), rules))


def tree(value: Any, *path: str) -> dict[str, Any]:
    """The dict at `path` inside `value`, or an empty one."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def number(value: Any, *path: str) -> float | None:
    """The finite number at `path` inside `value`; None when it is missing, not a number, NaN or infinite."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


def _scores(raw: dict[str, Any], encoder: str) -> Scores:
    """{"samples": {id: {"role": ..., <score>: number, ...}}} as sorted arrays; the ids stay behind."""
    samples = raw.get("samples")
    if not isinstance(samples, dict):
        raise DataError(f"audit/scores-{encoder}.json has no samples; run `distunlearn audit` again.")
    collected: dict[str, dict[str, list[float]]] = {}
    for row in samples.values():
        role = row.get("role") if isinstance(row, dict) else None
        if not isinstance(role, str):
            continue
        for name, value in row.items():
            if name not in ("label", "person") and (figure := number(value)) is not None:
                collected.setdefault(role, {}).setdefault(name, []).append(figure)
    by_role = {
        role: {name: np.sort(np.asarray(values, dtype=np.float64)) for name, values in names.items()}
        for role, names in collected.items()
    }
    return Scores(by_role)


def _finished(ledger: Path) -> str | None:
    """When the last `unlearn` ended, e.g. `2026-01-31 12:00 UTC`."""
    found = None
    for line in read_ledger(ledger) if os.path.lexists(ledger) else ():
        seconds = number(line, "time")
        if line["event"] == "done" and line["phase"] == "unlearn" and seconds is not None:
            with suppress(ValueError, OverflowError, OSError):
                found = f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M} UTC"
    return found


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(read_plain(path)).hexdigest() if path.is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    return find_record(path) or {}


def _clean_file(path: Path) -> dict[str, Any]:
    return _clean(_read_json(path), _Budget())


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = read_yaml(path)
    except ConfigError as error:
        raise DataError(f"{printable(str(error))}; restore the file or resolve the settings again.") from None
    if not isinstance(value, dict):
        raise DataError(f"{printable(path)} holds no settings; restore it or resolve the settings again.")
    return _clean(value, _Budget())


class _Budget:
    """Counts values kept, so that a file that repeats itself (YAML aliases) stays small."""

    def __init__(self) -> None:
        self.left = MAX_NODES

    def take(self) -> bool:
        self.left -= 1
        return self.left >= 0


def _clean(value: Any, budget: _Budget, depth: int = 0) -> Any:
    """A copy with harmless keys and texts, cut in depth and number."""
    if isinstance(value, dict) and depth < MAX_DEPTH:
        items = ((key, inner) for key, inner in value.items() if budget.take())
        return {printable(key, MAX_KEY): _clean(inner, budget, depth + 1) for key, inner in items}
    if isinstance(value, (list, tuple)) and depth < MAX_DEPTH:
        return [_clean(inner, budget, depth + 1) for inner in value if budget.take()]
    if isinstance(value, int) and value.bit_length() > 1024:
        return "..."
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (dict, list, tuple, set)):
        return "..."
    return printable(value, MAX_TEXT)
