"""Tensors on disk, whole or not there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from distunlearn.common.files import replacing


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Atomic, synced safetensors file; tensors are cloned so that shared storage is legal."""
    with replacing(path) as temporary:
        save_file({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, temporary)
