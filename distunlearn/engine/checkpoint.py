"""Checkpoints: written whole or not at all, checked before use.

A checkpoint is a folder `step-XXXXXXXX` with `state.safetensors` (weights, momentum encoder, queue,
method), `optimizer.pt` (loaded with weights only) and `COMMIT.json`, which names every file
with its sha256. It is written under a temporary name, synced, renamed, and only then named by
`LATEST`. A folder whose COMMIT.json does not verify is passed over in favour of the one before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distunlearn.data.shards import file_sha256, sync_path
from distunlearn.errors import DataError

__all__ = ["Checkpoint", "latest_checkpoint", "save_checkpoint", "write_json", "write_tensors"]

KEEP = 2  # the newest may be the one a crash tears, so one more is kept


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: `step` is the next step to run."""

    folder: Path
    step: int
    facts: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of `state.safetensors`, on the CPU."""
        return load_file(self.folder / "state.safetensors")

    def optimizer(self) -> dict[str, Any]:
        """The optimizer's state; our own file with a matching digest, and still without pickled code."""
        return torch.load(self.folder / "optimizer.pt", map_location="cpu", weights_only=True)


def write_json(path: Path, value: Any) -> None:
    """Atomic, synced, strict JSON (NaN and infinity are refused by `json`)."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    sync_path(temporary)
    os.replace(temporary, path)
    sync_path(path.parent)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Atomic, synced safetensors file; tensors are cloned so that shared storage is legal."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, temporary)
    sync_path(temporary)
    os.replace(temporary, path)
    sync_path(path.parent)


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    facts: Mapping[str, Any],
    may_write: Callable[[], None] | None = None,
) -> Path:
    """Commit the state before step `step`; older checkpoints than the last `KEEP` are removed afterwards.

    Args:
        folder: the phase's `checkpoints/`.
        facts: plain JSON kept in COMMIT.json (config digest, world, images, seconds, attempt).
        may_write: asked before the first byte and again before the commit; raises where the directory belongs to
            another attempt.
    """
    if may_write is not None:
        may_write()
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    write_tensors(temporary / "state.safetensors", tensors)
    torch.save(optimizer, temporary / "optimizer.pt")
    sync_path(temporary / "optimizer.pt")
    files = {p.name: file_sha256(p) for p in sorted(temporary.iterdir())}
    write_json(temporary / "COMMIT.json", {"step": step, "files": files, **facts})
    if may_write is not None:
        may_write()
    if final.exists():
        shutil.rmtree(final)  # a checkpoint that did not verify, being written anew
    os.replace(temporary, final)
    sync_path(folder)
    pointer = folder / ".LATEST.tmp"
    pointer.write_text(final.name + "\n", encoding="utf-8")
    sync_path(pointer)
    os.replace(pointer, folder / "LATEST")
    sync_path(folder)
    for old in _steps(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _steps(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-????????") if p.is_dir())


def _verify(folder: Path) -> Checkpoint | None:
    try:
        commit = json.loads((folder / "COMMIT.json").read_text(encoding="utf-8"))
        files = commit.pop("files")
        if all(file_sha256(folder / name) == digest for name, digest in files.items()) and files:
            return Checkpoint(folder, int(commit["step"]), commit)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a torn folder: the caller goes on to the one before
    return None


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and the names of newer ones that do not.

    Selection is by step number and COMMIT.json, never by file times; LATEST is for people and scripts.

    Raises:
        DataError: checkpoints exist but none verifies.
    """
    rejected: list[str] = []
    for candidate in reversed(_steps(folder) if folder.is_dir() else []):
        checkpoint = _verify(candidate)
        if checkpoint is not None:
            return checkpoint, rejected
        rejected.append(candidate.name)
    if rejected:
        raise DataError(
            f"{folder}: none of the checkpoints {', '.join(rejected)} matches its COMMIT.json; "
            "delete the folder to start this phase anew."
        )
    return None, rejected
