"""Batch norm over the global batch: torch's SyncBatchNorm on GPUs, and one for CPUs, which torch's refuses.

Every rank contributes count, sum and sum of squares of its rows, from their mean and sum of squared deviations M2, in
float64, so that nothing is lost where a mean is far from 0; they are summed, O(C) whatever W is:

    N = sum_r n_r,   mean = sum_r n_r mean_r / N,   M2 = sum_r [ M2_r + n_r mean_r^2 ] - N mean^2

The backward sums over the ranks (Ioffe and Szegedy, "Batch normalization", ICML 2015, section 3, in closed form):

    dx = weight invstd [ dy - (sum dy + xhat sum dy xhat) / N ]       xhat = (x - mean) invstd, sums over all ranks

as the gathers of distributed.collectives do. With losses scaled by W / N and parameter gradients averaged over ranks,
every gradient is that of `nn.BatchNorm` on the whole batch, for uneven shares too. It cannot be differentiated twice
(raises).

Shapes: n = rows of this rank (0 is allowed), C = channels, W = world; inputs are [n, C] or [n, C, ...].
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from distunlearn.distributed.collectives import get_world, sum_over_ranks
from distunlearn.errors import ConfigError

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class SyncBatchNorm(_BatchNorm):
    """For CPUs. In training mode: statistics of the global batch. In eval mode: `nn.BatchNorm`, without communication.

    All ranks must run a training forward together, and the backward of what it returns. `drop` and `act` are those of
    timm's BatchNormAct2d and the identity elsewhere. The global batch must hold at least two values a channel.
    """

    def __init__(self, source: _BatchNorm) -> None:
        """Takes over the parameters and buffers of `source` themselves, not copies: an optimizer may hold them."""
        super().__init__(source.num_features, source.eps, source.momentum, affine=False, track_running_stats=False)
        self.affine, self.track_running_stats = source.affine, source.track_running_stats
        for name in ("weight", "bias"):
            setattr(self, name, getattr(source, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(self, name, getattr(source, name))
        self.drop: nn.Module = getattr(source, "drop", nn.Identity())
        self.act: nn.Module = getattr(source, "act", nn.Identity())
        self.training = source.training

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions (got {input.dim()})")

    def forward(self, input: Tensor) -> Tensor:
        """[n, C, ...] -> [n, C, ...], in the dtype of `input`."""
        normalised = self._normalise(input) if self.training else super().forward(input)
        return self.act(self.drop(normalised))

    def _normalise(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        x = input if input.dtype in (torch.float32, torch.float64) else input.float()
        mean, m2, count = _global_statistics(x.detach())
        if self.track_running_stats:
            self._track(mean, m2, count)
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        return _Normalise.apply(x, weight, bias, mean, m2 / count, count, self.eps).to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, m2: Tensor, count: Tensor) -> None:
        """Running statistics as torch keeps them: variance unbiased, `momentum` None for a cumulative mean."""
        self.num_batches_tracked.add_(1)
        rate = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
        self.running_var.lerp_((m2 / (count - 1)).to(self.running_var.dtype), rate)


class _Normalise(torch.autograd.Function):
    """weight (x - mean) / sqrt(variance + eps) + bias, whose statistics are those of the x of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, count: Tensor,
        eps: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        if not x.numel():
            return x.clone()
        return nn.functional.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        dims, shape = _dims(x), (1, -1) + (1,) * (x.dim() - 2)
        invstd = (variance + ctx.eps).rsqrt()
        mine = torch.stack([grad.sum(dims), ((x - mean.view(shape)) * grad).sum(dims) * invstd])
        # The sums that belong to x are over all ranks, those of weight and bias over this one: backends average them.
        total, total_xhat = sum_over_ranks(mine) / count
        scale = invstd if weight is None else weight * invstd
        slope = -scale * invstd * total_xhat
        shift = -scale * total - slope * mean
        dx = torch.addcmul(shift.view(shape), x, slope.view(shape)).addcmul_(grad, scale.view(shape))
        bias_grad, weight_grad = mine if weight is not None else (None, None)
        return dx, weight_grad, bias_grad, None, None, None, None


def _dims(x: Tensor) -> list[int]:
    """All but the channels."""
    return [0, *range(2, x.dim())]


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], M2 [C] and values per channel [] of the batch over all ranks."""
    channels = x.shape[1]
    count = x.numel() // channels
    if count:
        variance, mean = torch.var_mean(x, _dims(x), correction=0)
        m2 = variance * count
    else:  # no rows here: a weight of 0 in the merge
        mean = m2 = x.new_zeros(channels)
    if get_world() == 1:
        return mean, m2, x.new_tensor(count)
    mean = mean.double()
    sums = sum_over_ranks(torch.cat([mean.new_full((1,), count), count * mean, m2 + count * mean.square()]))
    total, mean = sums[0], sums[1 : channels + 1] / sums[0]
    m2 = (sums[channels + 1 :] - total * mean.square()).clamp_min(0)
    return mean.to(x.dtype), m2.to(x.dtype), total.to(x.dtype)


def convert(model: nn.Module, world: int, device_type: str = "cpu") -> nn.Module:
    """Replace the batch norms of `model`, in place, by ones over the global batch of `world` ranks.

    Parameters, buffers and their names stay. A world of 1 changes nothing. Use the returned module: it differs from
    `model` where that is a batch norm itself.

    Args:
        device_type: on "cuda" torch's own SyncBatchNorm, else `SyncBatchNorm`.

    Raises:
        ConfigError: a batch norm with unknown behaviour of its own.
    """
    if world == 1:
        return model
    return _convert(model, nn.SyncBatchNorm if device_type == "cuda" else SyncBatchNorm, {})


def _convert(module: nn.Module, kind: type[_BatchNorm], done: dict[nn.Module, nn.Module]) -> nn.Module:
    """`done`: replacements so far, so that a module used twice stays one module."""
    if module in done:
        return done[module]
    done[module] = module
    if isinstance(module, kind):
        return module
    if isinstance(module, _BatchNorm):
        _require_known(module)
        done[module] = SyncBatchNorm(module) if kind is SyncBatchNorm else convert_sync_batchnorm(module)
        return done[module]
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _convert(child, kind, done)
    return module


def _require_known(module: _BatchNorm) -> None:
    kind = type(module)
    if kind in PLAIN or (kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm.")):
        return
    raise ConfigError(
        f"the encoder's {kind.__module__}.{kind.__name__} cannot be synchronised over processes (expected "
        "nn.BatchNorm1d/2d/3d or timm's BatchNormAct2d); set sync_batchnorm=false or use one process."
    )
