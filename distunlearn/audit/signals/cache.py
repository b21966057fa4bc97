"""Signals of encoders that many runs share, kept for them in the run that trained those encoders.

With `audit.keep_signals` a run writes `audit/signals-<encoder>.npz` for its original and its retrained encoder. Runs
that `reuse` it read these files in place of looking at the same images through the same weights again. A file counts
only for the very weights, images and settings of the audit that it was made with; else it is passed over.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from distunlearn import __version__
from distunlearn.audit.signals.collect import Signals
from distunlearn.common.files import replacing
from distunlearn.config.schema import RunConfig
from distunlearn.data.manifest.manifest import Manifest

SHARED = ("original", "retrained")


def signals_key(cfg: RunConfig, manifest: Manifest, state: str) -> str:
    """Digest of everything that decides an encoder's signals."""
    parts: dict[str, Any] = {
        "version": __version__,
        "weights": state,
        "manifest": manifest.fingerprint,
        "seed": cfg.seed,
        "audit": [cfg.audit.views, cfg.audit.part_crops],
        **{name: dataclasses.asdict(getattr(cfg, name)) for name in ("encoder", "objective", "views")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def keep_signals(path: Path, signals: Signals, key: str) -> None:
    """Write the file, whole or not at all."""
    columns = {f.name: getattr(signals, f.name) for f in dataclasses.fields(Signals)}
    columns["ids"] = np.array(signals.ids)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as handle:
        np.savez_compressed(handle, key=np.array(key), **columns)


def kept_signals(path: Path, key: str) -> Signals | None:
    """What `keep_signals` wrote, if it was for `key`; None where the file is missing, damaged or of something else."""
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as found:
            if str(found["key"]) != key:
                return None
            columns = {f.name: found[f.name] for f in dataclasses.fields(Signals)}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return Signals(**{**columns, "ids": columns["ids"].tolist()})
