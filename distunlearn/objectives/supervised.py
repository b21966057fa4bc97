"""Supervised: cross-entropy of a linear classifier, for encoders that were trained with labels.

Source: softmax regression (e.g. Bishop, "Pattern Recognition and Machine Learning", 2006, eq. 4.108 for
the loss and 4.109 for its gradient). With logits z_v of view v, p_v = softmax(z_v), label y:

    l_i = mean_v -log p_v[y],      d l_i / d z_v = (p_v - onehot(y)) / V,      c_i = mean_v max p_v

The task loss is the mean of l_i. There is no bank. Third-party images have no label of the members'
classes: the caller gives them the original encoder's own prediction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from distunlearn.config.schema import ObjectiveConfig, RunConfig
from distunlearn.errors import DataError
from distunlearn.objectives.base import Branches, Objective
from distunlearn.objectives.memory_bank import Bank, widen


def _logits(b: Branches) -> Tensor:
    assert b.output.shape[0] == Supervised.branches, "supervised has 2 online branches"
    return widen(b.output)


def _labels(b: Branches) -> Tensor:
    """The labels [n], checked: an index out of range would abort a GPU process without a word."""
    num_classes = b.output.shape[-1]
    if b.labels is None:
        raise DataError(
            "the supervised objective found samples without labels where a class per sample is expected; "
            "use labelled data or another objective.name"
        )
    wrong = (b.labels < 0) | (b.labels >= num_classes)
    if bool(wrong.any()):
        raise DataError(
            f"the supervised objective found the label {int(b.labels[wrong][0])} where 0 to {num_classes - 1} is "
            "expected; use labelled data or another objective.name"
        )
    return b.labels


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(ObjectiveConfig):
    """No settings of its own."""

    name: str = "supervised"


class Supervised(Objective):
    """Two views, each classified."""

    name = "supervised"
    Config = SupervisedConfig
    summary = "cross-entropy with labels"
    head = "classifier"
    compares_views = False
    uses_bank = False
    uses_labels = True

    @classmethod
    def problems(cls, cfg: RunConfig) -> Iterator[str]:
        if cfg.data.source == "imagefolder" and cfg.data.root:
            root = Path(cfg.data.root)
            if root.is_dir() and not any(entry.is_dir() for entry in root.iterdir()):
                yield (
                    f"objective.name=supervised needs labels, but data.root {cfg.data.root!r} has no class folders; "
                    "sort the images into one folder a class"
                )

    def row_losses(self, b: Branches, bank: Bank | None = None) -> Tensor:
        """l_i: without batch-mates in the loss it is the per-sample loss. Raises DataError as that."""
        return self.per_sample_loss(b)

    def bank_keys(self, b: Branches) -> None:
        """None: there is no bank."""
        return None

    def per_sample_loss(self, b: Branches, bank: Bank | None = None) -> Tensor:
        """l_i, [n]. Raises DataError for missing or impossible labels."""
        target = _labels(b).expand(b.output.shape[0], -1)
        return F.cross_entropy(_logits(b).transpose(1, 2), target, reduction="none").mean(0)

    def per_sample_delta(self, b: Branches, bank: Bank | None = None) -> Tensor:
        """d l_i / d output, [2, n, D]. Raises DataError for missing or impossible labels."""
        logits = _logits(b)
        label = F.one_hot(_labels(b), logits.shape[-1]).bool()
        # p[y] - 1 as minus the sum of the others: exact to the last digit even where p[y] rounds to 1.
        others = logits.softmax(-1).masked_fill(label, 0.0)
        return (others - label * others.sum(-1, keepdim=True)) / logits.shape[0]

    def confidence(self, b: Branches, bank: Bank | None = None) -> Tensor:
        """c_i, [n]."""
        return _logits(b).softmax(-1).amax(-1).mean(0)

    def logits(self, b: Branches, bank: Bank | None = None) -> Tensor:
        """Class logits, [2, n, D], at least in float32."""
        return _logits(b)

    def output_features(self, b: Branches, bank: Bank | None = None) -> Tensor:
        """(p_a . p_b, mean log odds of the largest class), [n, 2].

        The first is the chance in (0, 1] that both views, drawn from their softmax, name one class. The
        second, log(p / (1 - p)), is not bounded: it keeps 0.99 and 0.9999 apart, as attacks do.
        """
        logits = _logits(b)
        p = logits.softmax(-1)
        top, which = logits.max(-1, keepdim=True)
        rest = logits.scatter(-1, which, -torch.inf).logsumexp(-1)
        return torch.stack([(p[0] * p[1]).sum(-1), (top.squeeze(-1) - rest).mean(0)], dim=-1)
