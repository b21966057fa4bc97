"""Terms that lower the encoder's confidence on third-party samples.

The idea is that of Chen, Wang and Mi (Mathematics 12(24):4001, 2024): a model that is sure of images it
has never met gives the forgotten ones nothing to blend in with. The formulas are ours. Both are means over
the local samples; with uneven shares the caller weighs them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distunlearn.objectives.memory_bank import widen


def hinge_confidence(c: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor]:
    """mean_i max(0, c_i - threshold): only samples above the threshold are pushed down.

    Args:
        c: confidences in [0, 1], [n].
        threshold: without gradient; a quantile of the original encoder's confidence on calibration samples.

    Returns:
        Loss (scalar in [0, 1]; 0 for n = 0) and the active share, the fraction of samples above the
        threshold (scalar without gradient). A share of 0 means that the term does nothing.
    """
    assert c.dim() == 1, "one confidence per sample"
    excess = c - torch.as_tensor(threshold, dtype=c.dtype, device=c.device).detach()
    count = max(c.shape[0], 1)
    return excess.clamp_min(0).sum() / count, (excess.detach() > 0).to(c.dtype).sum() / count


def entropy_confidence(logits: Tensor) -> Tensor:
    """mean_i (1 - H(p_i) / ln K_i) with p_i = softmax(logits_i): 0 for a uniform softmax, 1 for a certain one.

    H is the entropy and K_i the number of entries that are not masked, so that the value does not depend
    on the size of the bank.

    Args:
        logits: [..., K], masked entries -inf; means are taken over all leading dimensions (branches, samples).
            A row with fewer than two entries has no choice to be sure of and counts 0.

    Returns:
        Scalar in [0, 1]; 0 for no rows.
    """
    wide = widen(logits)
    open_ = wide != -torch.inf
    # A masked entry would contribute 0 * -inf = NaN, to the value and to the gradient.
    filled = wide.masked_fill(~open_, torch.finfo(wide.dtype).min)
    log_p = filled.log_softmax(-1)
    p = log_p.exp()
    negative_entropy = (p * log_p.masked_fill(~open_, 0)).sum(-1)
    size = open_.sum(-1)
    choice = size > 1
    deficit = 1 + negative_entropy / size.clamp_min(2).to(wide.dtype).log()
    return torch.where(choice, deficit, 0).sum() / max(choice.numel(), 1)
