"""Tensors on disk, whole or not there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from distunlearn.common.files import replacing
from distunlearn.errors import DataError


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Atomic, synced safetensors file; tensors are cloned so that shared storage is legal.

    Raises:
        OSError, DataError: it cannot be written.
    """
    with replacing(path) as temporary:
        try:
            save_file({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, temporary)
        except SafetensorError as error:
            raise DataError(f"{path} cannot be written ({error}); make room, and the same command goes on.") from None
