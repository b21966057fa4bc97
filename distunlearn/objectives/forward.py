"""One batch through an encoder: views, branches of the objective, images counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distunlearn.common.device import on_device
from distunlearn.config.schema import RunConfig
from distunlearn.data.augmentations import id_hashes, make_view
from distunlearn.data.schedule import Batch
from distunlearn.distributed.collectives import gather_sizes, mean_scale
from distunlearn.encoders.model import ContrastiveModel, EncoderOutput, MomentumEncoder, batchnorm_mode
from distunlearn.objectives.base import Branches, Objective
from distunlearn.objectives.queue import KeyQueue

__all__ = ["Context", "embed", "image_mean", "view_pair"]


def _silent(text: str) -> None:
    """Default `note` callback: discards the message."""


@dataclass
class Context:
    """All that a method may use at a step. `forward` is the wrapped encoder, `model` the plain one.

    plain_forward: the same encoder in the same precision past the wrapper that averages gradients over ranks, for
        passes whose gradients reach no weight; None: `forward` has no such wrapper.
    """

    cfg: RunConfig
    objective: Objective
    model: ContrastiveModel
    forward: Callable[[Tensor], EncoderOutput]
    device: torch.device
    momentum: MomentumEncoder | None = None
    queue: KeyQueue | None = None
    original: ContrastiveModel | None = None  # the encoder before forgetting, in evaluation mode, where a method asks
    rank: int = 0
    world: int = 1
    step: int = 0
    rate: float = 0.0  # the learning rate of the step
    micro: int = 0  # which micro-batch of the step, of `accumulate`
    accumulate: int = 1
    images: int = 0  # images passed through an encoder by this rank: every view, every extra forward
    plain_forward: Callable[[Tensor], EncoderOutput] | None = None
    note: Callable[[str], None] = _silent  # one line for people

    @property
    def first_pass(self) -> Callable[[Tensor], EncoderOutput]:
        """What a pass goes through that is differentiated by itself, before the step's one backward."""
        return self.plain_forward or self.forward

    @property
    def draw(self) -> int:
        """Number of this micro-batch since the start: what random directions are keyed by, new for every loss."""
        return self.step * self.accumulate + self.micro

    @property
    def projection(self) -> int:
        """Number of the random projections of gradients: `draw`, or one for all steps whose samples are pooled."""
        return self.draw // (self.cfg.constraint.memory + 1)

    @property
    def view_seed(self) -> int:
        """Seed of the random views; the same for every phase, the epoch makes them differ."""
        return self.cfg.seed


def image_mean(values: Tensor) -> Tensor:
    """This rank's part of the mean over the images of all ranks, [n] -> scalar: the mean over ranks is that mean."""
    return values.sum() * mean_scale(gather_sizes(values.shape[0], values.device))


def view_pair(ctx: Context, batch: Batch, pair: int = 0) -> list[Tensor]:
    """Two random views of a batch on the encoder's device, float [n, C, S, S] each; `pair` gives others."""
    images = on_device(batch.images, ctx.device)
    key = {"seed": ctx.view_seed, "epochs": batch.epochs, "ids": batch.ids}
    compiled = ctx.cfg.compile and ctx.device.type == "cuda"  # on a CPU there are no launches to save
    return [make_view(images, ctx.cfg.views, **key, view=view, compiled=compiled) for view in (2 * pair, 2 * pair + 1)]


def embed(
    ctx: Context,
    batch: Batch,
    *,
    batchnorm: str,
    network: nn.Module | Callable[[Tensor], EncoderOutput] | None = None,
    momentum: bool = True,
    pair: int = 0,
    copies: Tensor | None = None,
    views: list[Tensor] | None = None,
) -> Branches:
    """Two random views of a batch through the encoder, as the branches of the objective.

    Args:
        batch: n images of this rank.
        batchnorm: "train" (batch statistics, utility loss) or "eval" (running statistics). Per-sample losses
            use "eval": with batch statistics a sample's gradient would depend on its batch mates.
        network: another encoder than the one being trained (the original, for calibration).
        momentum: False leaves out the momentum branch even where the objective has one.
        pair: which pair of views; every number gives other views of the same epoch.
        copies: int64 [r], rows of the batch in the order in which the encoder sees them, some several times; the
            branches have one row for each. None: every row once. Momentum targets are computed once per image.
        views: the two views, if they are not those of `pair`.
    """
    views = view_pair(ctx, batch, pair) if views is None else views
    n = len(batch.ids)
    online = views[:1] if ctx.objective.branches == 1 else views
    shown = online if copies is None else [view[copies] for view in online]
    ctx.images += sum(len(view) for view in shown)
    with batchnorm_mode(ctx.model, batchnorm):
        out = (network or ctx.forward)(torch.cat(shown))
    shape = (len(online), n, -1)
    target = target_embedding = None
    if momentum and ctx.momentum is not None:
        # The key that goes with query view a is view b, and the other way round.
        keyed = views[1:] if len(online) == 1 else views[::-1]
        ctx.images += n * len(keyed)
        # Its weights are float32 whatever the precision; what it computes with them is as precise as the queries are.
        half = torch.autocast(ctx.device.type, torch.bfloat16, enabled=ctx.cfg.precision == "bf16")
        with torch.no_grad(), batchnorm_mode(ctx.momentum.model, batchnorm), half:
            keys = ctx.momentum(torch.cat(keyed))
        target = keys.projection.view(shape)
        target_embedding = keys.embedding.to(target.dtype).view(shape)
    labels = on_device(batch.labels, ctx.device) if batch.labels is not None else None
    ids = on_device(id_hashes(batch.ids), ctx.device)
    if copies is not None:
        shape = (len(online), len(copies), -1)
        ids, labels = ids[copies], None if labels is None else labels[copies]
        if target is not None:
            target, target_embedding = target[:, copies], target_embedding[:, copies]
    return Branches(
        output=out.output.view(shape),
        hidden=out.hidden.view(shape),
        target=target,
        labels=labels,
        ids=ids,
        embedding=out.embedding.view(shape),
        target_embedding=target_embedding,
    )
