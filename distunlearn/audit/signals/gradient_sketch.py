"""Sketches of every image's loss gradient over the whole network: one forward and one backward pass a batch.

The probes of the gradient constraint (`constraints/probes.py`) listen at every layer l of the network:

    S_il = B_l^T G_il A_l^T,    G_il = d l_i / d W_l,    E |S_il|^2 = |G_il|^2
    layer_norms_il = ln |S_il|                          length of the gradient of layer l, with the sketch's error
    sketch_i = sum over l of r_l S_il,   r_l = +-1      a random projection of the whole gradient

l_i is the bank loss of one pair of views. A, B and r are a pure function of the seed, alike for every encoder. Layers
that probes cannot follow are left out: see `constraints/gradients/layers.py`.

Shapes: n = images, L = layers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from distunlearn.common.random import STREAMS
from distunlearn.constraints.gradients.layers import followed_layers
from distunlearn.constraints.gradients.probes import ProbeSet
from distunlearn.encoders.model import ContrastiveModel

SIDE = 8  # rows and columns of a layer's sketch
FLOOR = 1e-12


def network_sketches(
    model: ContrastiveModel, loss: Callable[[], Tensor], count: int, branches: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(layer_norms float64 [n, L], sketch float64 [n, 64]) of the gradients of the losses of `count` images.

    Args:
        model: in evaluation mode (with batch statistics a sample's gradient would depend on its batch mates).
        loss: runs the model once on [branches * count] rows, branch by branch, and gives l_i [count].
    """
    assert not model.training, "per-sample gradients are those of evaluation mode"
    weight = next(model.parameters())
    layers = followed_layers(model, model, trained=False)
    probes = ProbeSet(layers, SIDE, SIDE, seed, 0, device=weight.device, dtype=weight.dtype)
    leaves = probes.leaves(count)
    rows = torch.arange(count, device=weight.device).repeat(branches)
    with torch.enable_grad(), probes.listening(leaves, rows):
        found = torch.autograd.grad(loss().sum(), leaves, allow_unused=True)
    # A layer without gradient is none of the loss: a momentum encoder's, or one past the output that is looked at.
    parts = torch.stack([s for s in found if s is not None], dim=1).double()  # [n, L, side, side]
    signs = np.random.default_rng([seed, STREAMS["gradient sketch signs"]]).choice([-1.0, 1.0], parts.shape[1])
    sketch = torch.einsum("nlab,l->nab", parts, torch.from_numpy(signs).to(parts)).flatten(1)
    norms = parts.flatten(2).square().sum(-1).sqrt().clamp_min(FLOOR).log()
    return norms.cpu().numpy(), sketch.cpu().numpy()
