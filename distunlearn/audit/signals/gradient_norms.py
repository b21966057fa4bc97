"""Exact per-sample gradient norms over the whole network, for the audit (values only, no training signal).

For a loss l_i that depends on sample i alone, with delta_v = d l_i / d z_v at the outputs z_v of the head,

    d l_i / d theta = sum_v (d z_v / d theta)^T delta_v = d/d theta sum_v <stop-gradient(delta_v), z_v>,

so one backward pass of that sum serves every objective, its bank and its momentum keys being inside delta. The weights
of linear and convolutional layers, nearly all there are, get their norms from what goes into each layer and what comes
back, without a gradient (`constraints/gradients/ghost_norms.py`). What is left (biases, normalisation layers, tokens,
layers that probes cannot follow) gets its gradient per image, by `torch.func.vmap` over `grad`.

Shapes: n = images, V = branches (of all view pairs), D = output dim, C x S x S = view.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from distunlearn.constraints.gradients.ghost_norms import Recorder
from distunlearn.constraints.gradients.layers import Layer, followed_layers
from distunlearn.encoders.model import ContrastiveModel
from distunlearn.errors import ConfigError

CHUNK_BYTES = 256 << 20  # of per-sample gradients of what ghosts leave that are held at a time by a CPU
GPU_SHARE = 8  # a GPU: this part of its memory
CHUNK_VIEWS = 256  # views that go through the encoder at a time, with the graph of their backward pass


def network_gradient_norms(model: ContrastiveModel, views: Tensor, delta: Tensor) -> np.ndarray:
    """|d l_i / d theta| over all trainable parameters, float64 [n].

    Args:
        model: in evaluation mode (with batch statistics a sample's gradient would depend on its batch mates).
        views: [V, n, C, S, S]. delta: d l_i / d output, [V, n, D], for the same views.
    """
    assert not model.training, "per-sample gradients are those of evaluation mode"
    assert views.shape[:2] == delta.shape[:2], "one delta per view"
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    layers = _ghosts(model, trained)
    left = {name: p.detach() for name, p in trained.items() if name.removesuffix(".weight") not in layers}
    delta = delta.to(next(model.parameters()).dtype)
    step = _chunk(sum(p.numel() for p in left.values()), len(views), views.device)
    found, start = [], 0
    while start < views.shape[1]:
        rows = slice(start, start + step)
        try:
            part = views[:, rows], delta[:, rows]
            squares = _ghost_squares(model, layers, *part) + _plain_squares(model, left, *part)
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


def _ghosts(model: ContrastiveModel, trained: Mapping[str, Tensor]) -> dict[str, Layer]:
    """Layers whose weight is trained, is no other layer's too, and can be followed, by name."""
    of = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    try:
        found = followed_layers(model, model)
    except ConfigError:  # none
        return {}
    return {name: layer for name, layer in found.items() if f"{name}.weight" in trained and of[id(layer.weight)] == 1}


def _ghost_squares(model: ContrastiveModel, layers: dict[str, Layer], views: Tensor, delta: Tensor) -> Tensor:
    """Squared norms over the layers' weights, float64 [n]."""
    if not layers:
        return views.new_zeros(views.shape[1], dtype=torch.float64)
    recorder = Recorder(layers, views.shape[0] * views.shape[1])
    with torch.enable_grad(), recorder.recording():
        total = (model(views.flatten(0, 1)).output * delta.flatten(0, 1)).sum()
    return recorder.gradients(total, views.shape[1], 0).norm().double().square()


def _plain_squares(model: ContrastiveModel, weights: dict[str, Tensor], views: Tensor, delta: Tensor) -> Tensor:
    """Squared norms over some parameters, by a gradient of each image, float64 [n]."""
    if not weights:
        return views.new_zeros(views.shape[1], dtype=torch.float64)
    fixed = {**dict(model.named_buffers()), **{name: p.detach() for name, p in model.named_parameters()}}

    def weighted_output(parameters: dict[str, Tensor], sample: Tensor, cotangent: Tensor) -> Tensor:
        out = functional_call(model, {**fixed, **parameters}, (sample,))
        return (out.output * cotangent).sum()

    def squared_norm(sample: Tensor, cotangent: Tensor) -> Tensor:
        gradients = grad(weighted_output)(weights, sample, cotangent)
        return torch.stack([g.double().square().sum() for g in gradients.values()]).sum()

    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no batching rule
        return vmap(squared_norm, in_dims=(1, 1))(views, delta).detach()


def _chunk(numbers: int, views: int, device: torch.device) -> int:
    """Images of so many views at a time, whose gradients of so many numbers fit into what is set aside for them."""
    room = CHUNK_BYTES
    if device.type == "cuda":
        room = max(room, torch.cuda.get_device_properties(device).total_memory // GPU_SHARE)
    return max(1, min(CHUNK_VIEWS // views, room // (4 * max(numbers, 1))))
