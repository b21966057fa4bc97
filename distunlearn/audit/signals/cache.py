"""Signals kept in files: for an audit that goes on after an interruption, and for runs that share encoders.

While an audit is under way every encoder's signals lie in `audit/signals-<encoder>.npz`. With `audit.keep_signals`
they stay: runs that `reuse` this one read those of the original and the retrained encoder in place of looking at the
same images through the same weights again. A file counts only for the very weights, images and settings of the audit
that it was made with; else it is passed over.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from distunlearn import __version__
from distunlearn.audit.signals.collect import Signals
from distunlearn.common.files import write_atomic
from distunlearn.config.schema import RunConfig
from distunlearn.data.manifest.manifest import Manifest

SHARED = ("original", "retrained")


def signals_file(out: Path, name: str) -> Path:
    """Where an encoder's signals lie in a run directory."""
    return out / "audit" / f"signals-{name}.npz"


def signals_key(cfg: RunConfig, manifest: Manifest, state: str) -> str:
    """Digest of everything that decides an encoder's signals."""
    parts: dict[str, Any] = {
        "version": __version__,
        "weights": state,
        "manifest": manifest.fingerprint,
        "seed": cfg.seed,
        "audit": [cfg.audit.views, cfg.audit.part_crops, cfg.audit.precision],
        "decode_size": cfg.data.decode_size,
        **{name: dataclasses.asdict(getattr(cfg, name)) for name in ("encoder", "objective", "views")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def packed(signals: Signals, key: str, *, compressed: bool = False) -> bytes:
    """A file of the signals and their key."""
    columns = {f.name: getattr(signals, f.name) for f in dataclasses.fields(Signals)}
    columns["ids"] = np.array(signals.ids)
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, key=np.array(key), **columns)
    return file.getvalue()


def unpacked(data: bytes, key: str) -> Signals | None:
    """What was packed, if it was for `key`; None where it is damaged or of something else."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            if str(found["key"]) != key:
                return None
            columns = {f.name: found[f.name] for f in dataclasses.fields(Signals)}
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None
    return Signals(**{**columns, "ids": columns["ids"].tolist()})


def keep_signals(path: Path, signals: Signals, key: str) -> None:
    """Write the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, packed(signals, key, compressed=True))


def kept_signals(path: Path, key: str) -> Signals | None:
    """What `keep_signals` wrote, if it was for `key`; None where the file is missing, damaged or of something else."""
    try:
        return unpacked(path.read_bytes(), key)
    except OSError:
        return None
