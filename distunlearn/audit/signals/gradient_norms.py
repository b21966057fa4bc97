"""Exact per-sample gradient norms over the whole network, for the audit (values only, no training signal).

For a loss l_i that depends on sample i alone, with delta_v = d l_i / d z_v at the outputs z_v of the head,

    d l_i / d theta = sum_v (d z_v / d theta)^T delta_v = d/d theta sum_v <stop-gradient(delta_v), z_v>,

so one vectorised reverse pass (`torch.func.vmap` over `grad`) serves every objective, its bank and its
momentum keys being inside delta. Per-sample gradients are made a few images at a time and only their norms kept.

Shapes: n = images, V = branches (of all view pairs), D = output dim, C x S x S = view.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from distunlearn.encoders.model import ContrastiveModel

CHUNK_BYTES = 256 << 20  # of per-sample gradients held at a time by a CPU
GPU_SHARE = 8  # a GPU: this part of its memory
CHUNK_IMAGES = 64


def network_gradient_norms(model: ContrastiveModel, views: Tensor, delta: Tensor) -> np.ndarray:
    """|d l_i / d theta| over all trainable parameters, float64 [n].

    Args:
        model: in evaluation mode (with batch statistics a sample's gradient would depend on its batch mates).
        views: [V, n, C, S, S]. delta: d l_i / d output, [V, n, D], for the same views.
    """
    assert not model.training, "per-sample gradients are those of evaluation mode"
    assert views.shape[:2] == delta.shape[:2], "one delta per view"
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    buffers = dict(model.named_buffers())

    def weighted_output(parameters: dict[str, Tensor], sample: Tensor, cotangent: Tensor) -> Tensor:
        out = functional_call(model, (parameters, buffers), (sample,))
        return (out.output * cotangent).sum()

    def squared_norm(sample: Tensor, cotangent: Tensor) -> Tensor:
        gradients = grad(weighted_output)(weights, sample, cotangent)
        return torch.stack([g.double().square().sum() for g in gradients.values()]).sum()

    step = _chunk(sum(p.numel() for p in weights.values()), views.device)
    delta = delta.to(next(iter(weights.values())).dtype)
    found, start = [], 0
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no batching rule
        while start < views.shape[1]:
            rows = slice(start, start + step)
            try:
                squares = vmap(squared_norm, in_dims=(1, 1))(views[:, rows], delta[:, rows]).detach()
            except torch.OutOfMemoryError:  # by the activations of large images, which nothing above counts
                if step == 1:
                    raise
                squares = None
            if squares is None:  # the error is gone now, and what it held on to
                step //= 2
                torch.cuda.empty_cache()
                continue
            found.append(squares.sqrt())
            start += step
    return torch.cat(found).cpu().numpy() if found else np.zeros(0)


def _chunk(numbers: int, device: torch.device) -> int:
    """Images at a time whose gradients of so many numbers fit into what is set aside for them; the norms are alike."""
    room = CHUNK_BYTES
    if device.type == "cuda":
        room = max(room, torch.cuda.get_device_properties(device).total_memory // GPU_SHARE)
    return max(1, min(CHUNK_IMAGES, room // (4 * numbers)))
