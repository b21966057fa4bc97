"""Tensors on disk, whole or not there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from distunlearn.common.files import sync_path

__all__ = ["write_tensors"]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Atomic, synced safetensors file; tensors are cloned so that shared storage is legal."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, temporary)
    sync_path(temporary)
    os.replace(temporary, path)
    sync_path(path.parent)
