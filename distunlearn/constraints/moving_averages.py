"""Running estimates that the constraint needs, kept over steps and in checkpoints.

Both are exponential moving averages, bias-corrected as in Adam (Kingma and Ba 2015, section 3): the average
divided by the sum of its weights, so that the first steps are not pulled towards zero. Neither passes a gradient.
All ranks must be given the same (global) values and then hold the same state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from distunlearn.errors import NumericsError


class RunningSpread:
    """sigma_T: standard deviation of each feature over the third-party samples, averaged over steps.

    What is averaged is the variance (unbiased, n - 1). momentum: in [0, 1); 0 keeps the latest step only.
    """

    def __init__(self, momentum: float) -> None:
        assert 0 <= momentum < 1, "the momentum of a running mean lies in [0, 1)"
        self.momentum = momentum
        self._variance = torch.zeros(0, dtype=torch.float64)  # weighted sum of the variances so far, [k]
        self._weight = 0.0  # sum of the weights; 0: nothing seen yet

    def update(self, features: Tensor) -> None:
        """Take in the third-party features of one step from all ranks, [m, k], m >= 2."""
        assert features.dim() == 2 and features.shape[0] > 1, "a spread needs at least two samples [m, k]"
        wide = features.detach().double()
        variance, mean = torch.var_mean(wide, dim=0)
        rounding = 8 * torch.finfo(features.dtype).eps * mean.abs()
        variance = torch.where(variance > rounding.square(), variance, 0)  # constant but for rounding: no spread
        if self._variance.numel() == 0:
            self._variance = torch.zeros_like(variance)
        assert self._variance.shape == variance.shape, "the number of features stays the same"
        self._variance = self._variance.to(variance.device) * self.momentum + (1 - self.momentum) * variance
        self._weight = self._weight * self.momentum + (1 - self.momentum)

    @property
    def std(self) -> Tensor:
        """Spread per feature, float64 [k] without gradient; 1 where the feature has not varied at all."""
        assert self._weight > 0, "update comes before std"
        std = (self._variance / self._weight).sqrt()
        return torch.where(std > 0, std, 1)

    def scale(self, features: Tensor) -> Tensor:
        """features / sigma_T, [n, k], differentiable in the features."""
        return features / self.std.to(features)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of "variance" [k] and "weight" [1], float64."""
        weight = torch.tensor([self._weight], dtype=torch.float64)
        return {"variance": self._variance.cpu().clone(), "weight": weight}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`, exact."""
        self._variance = state["variance"].clone()
        self._weight = float(state["weight"])


class PhiSwitch:
    """Decides whether the gradient of Phi is on: as long as the running mean of Phi is above its target.

    Phi is measured on small batches, so max(0, Phi - target) would be biased upwards, its noise always pushing;
    a running mean over steps leaves the estimate of the gradient itself unbiased. Without a target (0) nothing is
    switched: the gradient vanishes by itself as the distributions meet, and waiting for the mean of a noisy estimate
    to be positive would only lose half of the steps near the end.

    target: Phi*; negative values (a U-statistic can be negative) count as 0. momentum: in [0, 1).
    """

    def __init__(self, target: float, momentum: float) -> None:
        assert 0 <= momentum < 1, "the momentum of a running mean lies in [0, 1)"
        self.momentum = momentum
        self.target = 0.0
        self._sum = 0.0
        self._weight = 0.0
        self._unread: Tensor | None = None  # the latest Phi, where it may still be under way on a GPU
        self.set_target(target)

    def set_target(self, target: float) -> None:
        """Set Phi*, clipped at 0.

        Raises:
            NumericsError: it is not finite.
        """
        target = float(target)
        if not math.isfinite(target):
            raise NumericsError(f"the target of the constraint is {target}; the original encoder's gradients overflow")
        self.target = max(0.0, target)

    def update(self, phi: Tensor | float) -> None:
        """Take in the global Phi of one step. A tensor is not waited for: it is read when it is needed, a step later.

        Raises:
            NumericsError: it is not finite (a tensor: the one before); the switch would otherwise silently stay off.
        """
        self._read()
        if isinstance(phi, Tensor):
            self._unread = phi.detach()
        else:
            self._take(float(phi))

    def _read(self) -> None:
        unread, self._unread = self._unread, None
        if unread is not None:
            self._take(float(unread))

    def _take(self, phi: float) -> None:
        if not math.isfinite(phi):
            raise NumericsError(f"the distance between the gradients is {phi}; lower the learning rate or use fp32")
        self._sum = self.momentum * self._sum + (1 - self.momentum) * phi
        self._weight = self.momentum * self._weight + (1 - self.momentum)

    @property
    def mean(self) -> float:
        """Running mean of Phi; NaN before the first step."""
        self._read()
        return self._sum / self._weight if self._weight else math.nan

    @property
    def active(self) -> float:
        """1.0 or 0.0, the factor of Phi's gradient; 1.0 before the first step.

        Read it before `update` of the same step: a factor that depends on the very batch it multiplies selects
        the batches with a large Phi, the bias this class is there to avoid.
        """
        return 0.0 if self.target > 0 and self.mean <= self.target else 1.0

    def state_dict(self) -> dict[str, Tensor]:
        """ "target", "sum" and "weight", float64 [1] each."""
        self._read()
        values = {"target": self.target, "sum": self._sum, "weight": self._weight}
        return {name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`, exact."""
        self.target, self._sum, self._weight = (float(state[name]) for name in ("target", "sum", "weight"))
        self._unread = None
