"""Per-sample gradient of the head's last linear layer, in closed form.

For z_v = W h_v + b and a loss l_i of the outputs of sample i alone, with delta_v = d l_i / d z_v,

    G_i = d l_i / d W = sum_v delta_v h_v^T          d l_i / d b = sum_v delta_v
    |G_i|^2 = sum_{v,w} (delta_v . delta_w) (h_v . h_w)                 the ghost norm
    S_i = P_out G_i P_in^T = sum_v (P_out delta_v) (P_in h_v)^T         the Kronecker sketch

exactly, without ever forming a [D, Hd] matrix per sample. All of it is an ordinary function of (h, delta):
one backward pass differentiates it, under any sharding of W, because W is never touched.

Sources: Goodfellow, "Efficient per-example gradient computations", arXiv 1510.01799, eq. 5 (norm of one
outer product; the sum over views is its Gram form, Li et al., arXiv 2110.05679, eq. 4); Choe et al.,
"What is your data worth to GPT?" (LoGra), arXiv 2405.13954, section 3.1 (Kronecker projection).

Shapes: V = branches, n = samples, D = output dim, Hd = hidden dim, k_out x k_in = sketch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distunlearn.common.device import on_device
from distunlearn.common.random import generator_of
from distunlearn.objectives.memory_bank import full_precision, widen

NORM_FLOOR = 1e-6  # gradient norms below this read as this in the logarithm, and pull nothing


@dataclass(frozen=True, eq=False)
class HeadGradients:
    """Per-sample gradients of z = W h + b as factors; make it with `head_gradients`.

    hidden: h, [V, n, Hd]. delta: d l_i / d z, [V, n, D]. Both in float32 or float64.
    """

    hidden: Tensor
    delta: Tensor

    def squared_norm(self) -> Tensor:
        """|G_i|^2 of the weight gradient, [n], >= 0 (rounding may not push it below)."""
        return (_gram(self.delta) * _gram(self.hidden)).sum((0, 1)).clamp_min(0)

    def norm(self) -> Tensor:
        """|G_i| of the weight gradient, [n]; its derivative at a zero gradient is 0."""
        return _safe_sqrt(self.squared_norm())

    def log_norm(self) -> Tensor:
        """ln max(|G_i|, NORM_FLOOR), [n]: finite, with derivative 0 below the floor."""
        return 0.5 * self.squared_norm().clamp_min(NORM_FLOOR * NORM_FLOOR).log()

    def sketch(self, out_matrix: Tensor, in_matrix: Tensor) -> Tensor:
        """P_out G_i P_in^T of every sample, rows one after the other, [n, k_out * k_in].

        Args:
            out_matrix: P_out [k_out, D]. in_matrix: P_in [k_in, Hd]. See `sketch_matrices`.
        """
        with full_precision(self.delta):
            left = self.delta @ out_matrix.T
            right = self.hidden @ in_matrix.T
        return (left.unsqueeze(-1) * right.unsqueeze(-2)).sum(0).flatten(1)


def head_gradients(hidden: Tensor, delta: Tensor) -> HeadGradients:
    """Per-sample gradients of the last linear layer, from what went in and what came back.

    Args:
        hidden: inputs of the layer by branch, [V, n, Hd].
        delta: d l_i / d output by branch, [V, n, D]; a branch without gradient is left out of both.

    Half-precision inputs are widened to float32: the norms are squares of small numbers.
    """
    assert hidden.dim() == 3 and delta.dim() == 3, "hidden and delta are [V, n, features]"
    assert hidden.shape[:2] == delta.shape[:2], "one delta per hidden vector"
    return HeadGradients(widen(hidden), widen(delta))


def sketch_matrices(
    seed: int,
    step: int,
    out_dim: int,
    in_dim: int,
    k_out: int,
    k_in: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Gaussian P_out [k_out, D] and P_in [k_in, Hd] with E |P_out G P_in^T|^2 = |G|^2 for every G.

    A pure function of (seed, step), hence alike on all ranks; to be drawn anew every step, since a fixed
    sketch would leave fixed directions of the gradient unseen. seed, step: integers in 0 .. 2^64 - 1.
    The entries have variance 1 / k_out and 1 / k_in.
    """
    generator = generator_of("sketch", seed, step)
    out_matrix = generator.standard_normal((k_out, out_dim)) / k_out**0.5
    in_matrix = generator.standard_normal((k_in, in_dim)) / k_in**0.5
    return on_device(out_matrix, device, dtype), on_device(in_matrix, device, dtype)


def gradient_features(gradients: HeadGradients, out_matrix: Tensor, in_matrix: Tensor) -> Tensor:
    """(ln |G_i|, S_i): the description of a per-sample gradient that Phi compares, [n, 1 + k_out * k_in].

    The norm alone can be matched by rescaling |z|, the sketch alone by shrinking the gradient: hence both.
    """
    return torch.cat([gradients.log_norm().unsqueeze(1), gradients.sketch(out_matrix, in_matrix)], dim=1)


def _gram(x: Tensor) -> Tensor:
    """x_v . x_w for all pairs of branches of one sample, [V, n, d] -> [V, V, n]."""
    return (x.unsqueeze(0) * x.unsqueeze(1)).sum(-1)


def _safe_sqrt(x: Tensor) -> Tensor:
    """sqrt of numbers >= 0 with derivative 0 instead of infinity at 0; NaN stays NaN."""
    zero = x == 0
    return torch.where(zero, 1, x).sqrt().masked_fill(zero, 0)
