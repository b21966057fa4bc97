"""Small arrays to the device that computes with them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def on_device(values: np.ndarray | Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """The values as a tensor of `dtype` (None: their own) on a device.

    A GPU reads them from page-locked memory. From any other the copy would begin when all work given to the GPU
    before is done, the program waiting for it, and the GPU then for the program.
    """
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    tensor = tensor.to(dtype or tensor.dtype)
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
