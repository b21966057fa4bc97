"""The verbs `residuals` and `dispose`: who still holds images, ids or weights of a certified run, and their deletion.

Evidence and erasure pull apart: levels 2 to 4 of `verify` need what must go. So: certify, have it verified, dispose.
Afterwards levels 0 and 1 and the receipts that were given still hold. Files are deleted from the file system, which is
not sanitisation of a medium.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from distunlearn.common.files import write_atomic
from distunlearn.engine.run_directory import find_manifest, saved_config, shards_remote
from distunlearn.engine.run_lock import owned
from distunlearn.errors import DataError
from distunlearn.run.purge import purge
from distunlearn.verify.certificate import CERTIFICATE
from distunlearn.verify.chain import CHAIN
from distunlearn.verify.disposal import CLAIMED
from distunlearn.verify.envelope import load, read, sign
from distunlearn.verify.keys import load_key
from distunlearn.verify.receipt import ROWS
from distunlearn.verify.secret import SECRET

DISPOSAL = Path("evidence") / "disposal.json"
# What holds the images, ids and weights of a run, in the order of deletion. The secret goes last: it opens all
# commitments. A deletion that was killed goes on with what is left.
PLACES: dict[str, tuple[str, ...]] = {
    "original encoder": ("original",),
    "checkpoints": ("checkpoints", "retrained/checkpoints", "full_dose"),
    "shadow and stress trainings": ("shadows", "stress"),
    "scores and embeddings by id": ("audit/signals-*", "audit/scores-*", "audit/shadows*", "dose"),
    "records that name ids": ("ledger.jsonl*", "nan-step-*", "retrained/nan-step-*", "logs", "counterparts*"),
    "request and receipts": (str(ROWS), "evidence/receipts"),
    "run secret": (str(SECRET),),
}  # fmt: skip


def residuals(run_dir: Path) -> dict[str, Any]:
    """Plain JSON: `found` (files by place, `shards` among them), `claimed` (places out of reach, to be signed for)."""
    folder, cfg = Path(run_dir), saved_config(run_dir, world=1)
    found = {name: sum(map(_count, _paths(folder, name))) for name in PLACES}
    manifest = find_manifest(cfg, folder)
    images = len(manifest.ids("forget")) if manifest is not None else 0
    claimed = dict(CLAIMED)
    if (folder / CHAIN).exists():
        claimed["suppression"] = f"{CHAIN} and its key stay: marks of what was forgotten, so that it does not come back"
    if shards_remote(cfg) is not None:
        claimed["object store"] = "images in the object store that holds the shards"
    others = [path for path in folder.parent.glob("*/run.yaml") if path.parent != folder]
    if others:
        claimed["other runs"] = f"{len(others)} other run directories beside this one, which may hold the same images"
    return {"found": {"images in the shards": images, **found}, "claimed": claimed}


def dispose(run_dir: Path, key: Path, passphrase: str) -> Path:
    """Delete what `residuals` finds, and sign a record of it as `evidence/disposal.json`; goes on where it was killed.

    Raises:
        ConfigError: the key or the passphrase is wrong.
        DataError: the run is not certified.
    """
    folder, private = Path(run_dir), load_key(key, passphrase)
    if not (folder / CERTIFICATE).exists():
        raise DataError(f"{folder} has no {CERTIFICATE}; certify it, and have it verified, before disposing of it.")
    digest = read(load(folder / CERTIFICATE), "certificate").digest
    before = residuals(folder)
    if before["found"]["images in the shards"] and "object store" not in before["claimed"]:
        purge(folder, apply=True)
    with owned(folder):
        for path in [path for name in PLACES for path in _paths(folder, name)]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        after = residuals(folder)
        left = {name: count for name, count in after["found"].items() if count}
        content = {"certificate": digest, "absent": sorted(set(after["found"]) - set(left)), "left": left,
                   "claimed": sorted(after["claimed"]), "means": "deleted from the file system"}  # fmt: skip
        write_atomic(folder / DISPOSAL, sign("disposal", {"certificate": digest}, content, private))
    return folder / DISPOSAL


def _paths(folder: Path, place: str) -> list[Path]:
    return [path for pattern in PLACES[place] for path in sorted(folder.glob(pattern))]


def _count(path: Path) -> int:
    return sum(inner.is_file() for inner in path.rglob("*")) if path.is_dir() else 1
