"""One batch through an encoder: views, branches of the objective, images counted. The one place that does it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from distunlearn.common.device import on_device
from distunlearn.config.schema import RunConfig, ViewsConfig
from distunlearn.data.schedule import Batch
from distunlearn.data.views.colour import make_view
from distunlearn.data.views.crops import Cut
from distunlearn.data.views.draws import id_hashes
from distunlearn.distributed.collectives import gather_sizes, mean_scale
from distunlearn.encoders.model import ContrastiveModel, EncoderOutput, MomentumEncoder, batchnorm_mode
from distunlearn.objectives.base import Branches, Objective
from distunlearn.objectives.queue import KeyQueue

Network = Callable[[Tensor], EncoderOutput]  # images [n, C, S, S] -> their outputs


@dataclass
class Context:
    """All that a method may use at a step. `forward` is the wrapped encoder, `model` the plain one.

    plain_forward: the same encoder in the same precision past the wrapper that averages gradients over ranks, for
        passes whose gradients reach no weight; None: `forward` has no such wrapper.
    """

    cfg: RunConfig
    objective: Objective
    model: ContrastiveModel
    forward: Network
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
    plain_forward: Network | None = None
    note: Callable[[str], None] = lambda text: None  # one line for people

    @property
    def first_pass(self) -> Network:
        """What a pass goes through that is differentiated by itself, before the step's one backward."""
        return self.plain_forward or self.forward

    @property
    def draw(self) -> int:
        """Number of this micro-batch since the start: what random directions are keyed by, new for every loss."""
        return self.step * self.accumulate + self.micro

    @property
    def projection(self) -> int:
        """Number of the random projections of gradients: `draw`, or one for all steps whose samples are pooled."""
        return self.draw // (self.cfg.constraint.memory_steps + 1)

    @property
    def view_seed(self) -> int:
        """Seed of the random views; the same for every phase, the epoch makes them differ."""
        return self.cfg.seed


def image_mean(values: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """This rank's part of the mean over the images of all ranks, [n] -> scalar: the mean over ranks is that mean.

    sizes: n of every rank, if it is known.
    """
    return values.sum() * mean_scale(gather_sizes(values.shape[0], values.device, sizes))


def random_views(
    crops: Tensor,
    settings: ViewsConfig,
    *,
    seed: int,
    epochs: np.ndarray,
    ids: Sequence[str],
    views: Iterable[int],
    compiled: bool = False,
) -> list[Tensor]:
    """The views of these numbers of every image, float [n, C, S, S] each.

    crops: uint8 [n, V, C, S, S], of the same views. Other arguments as of `make_view`.
    """
    if isinstance(crops, FakeTensor):  # a plan follows shapes; there are no pixels
        return [torch.empty_like(crop, dtype=torch.float32) for crop in crops.unbind(1)]
    key: dict[str, Any] = {"seed": seed, "epochs": epochs, "ids": ids, "compiled": compiled}
    return [make_view(crops[:, place], settings, view=view, **key) for place, view in enumerate(views)]


def view_pair(ctx: Context, batch: Batch, pair: int = 0) -> list[Tensor]:
    """Two random views of a batch on the encoder's device, float [n, C, S, S] each; `pair` gives others."""
    views = (2 * pair, 2 * pair + 1)
    crops = on_device(batch.views(views), ctx.device)
    compiled = ctx.cfg.runtime.compile and ctx.device.type == "cuda"  # on a CPU there are no launches to save
    key: dict[str, Any] = {"seed": ctx.view_seed, "epochs": batch.epochs, "ids": batch.ids}
    return random_views(crops, ctx.cfg.views, views=views, compiled=compiled, **key)


def encode(
    objective: Objective,
    views: Sequence[Tensor],
    network: Network,
    momentum: Network | None,
    *,
    ids: Tensor,
    labels: Tensor | None,
    copies: Tensor | None = None,
    outputs: EncoderOutput | None = None,
) -> Branches:
    """Both views of n images through an encoder, as the branches of the objective.

    Args:
        views: [n, C, S, S], two of them; an objective with one branch shows its encoder the first alone.
        network, momentum: called once each, with all their views in one batch; momentum None: no targets.
        ids: int64 [n], hashes. labels: int64 [n]. copies: see `embed`.
        outputs: what the network gave for its views, where that is known; the network is not called.
    """
    online, shape = views[: objective.branches], (objective.branches, len(ids), -1)
    if outputs is None:
        outputs = network(torch.cat([*online] if copies is None else [view[copies] for view in online]))
    target = target_embedding = None
    if momentum is not None:
        # The key that goes with query view a is view b, and the other way round.
        keys = momentum(torch.cat([*(views[1:] if len(online) == 1 else views[::-1])]))
        target = keys.projection.view(shape)
        target_embedding = keys.embedding.to(target.dtype).view(shape)
    if copies is not None:
        shape = (len(online), len(copies), -1)
        ids, labels = ids[copies], None if labels is None else labels[copies]
        if target is not None:
            target, target_embedding = target[:, copies], target_embedding[:, copies]
    return Branches(
        output=outputs.output.view(shape),
        hidden=outputs.hidden.view(shape),
        target=target,
        labels=labels,
        ids=ids,
        embedding=outputs.embedding.view(shape),
        target_embedding=target_embedding,
    )


def embed(
    ctx: Context,
    batch: Batch,
    *,
    batchnorm: str,
    network: Network | None = None,
    momentum: bool = True,
    pair: int = 0,
    copies: Tensor | None = None,
    views: list[Tensor] | None = None,
) -> Branches:
    """Two random views of a batch through the encoder in training, as the branches of the objective.

    Args:
        batch: n images of this rank.
        batchnorm: "train" (batch statistics, task loss) or "eval" (running statistics). Per-sample losses
            use "eval": with batch statistics a sample's gradient would depend on its batch mates.
        network: another encoder than the one being trained (the original, for calibration).
        momentum: False leaves out the momentum branch even where the objective has one.
        pair: which pair of views; every number gives other views of the same epoch.
        copies: int64 [r], rows of the batch in the order in which the encoder sees them, some several times; the
            branches have one row for each. None: every row once. Momentum targets are computed once per image.
        views: the two views, if they are not those of `pair`.
    """

    def forward(images: Tensor) -> EncoderOutput:
        ctx.images += len(images)
        with batchnorm_mode(ctx.model, batchnorm):
            return (network or ctx.forward)(images)

    def targets(images: Tensor) -> EncoderOutput:
        ctx.images += len(images)
        # Its weights are float32 whatever the precision; what it computes with them is as precise as the queries are.
        half = torch.autocast(ctx.device.type, torch.bfloat16, enabled=ctx.cfg.precision == "bf16")
        with torch.no_grad(), batchnorm_mode(ctx.momentum.model, batchnorm), half:
            return ctx.momentum(images)

    branches = encode(
        ctx.objective,
        view_pair(ctx, batch, pair) if views is None else views,
        forward,
        targets if momentum and ctx.momentum is not None else None,
        ids=on_device(id_hashes(batch.ids), ctx.device),
        labels=None if batch.labels is None else on_device(batch.labels, ctx.device),
        copies=copies,
    )
    return branches._replace(sizes=batch.sizes if copies is None else None)


@dataclass(frozen=True, eq=False)
class EncoderView:
    """One finished encoder, in evaluation mode, and how images are displayed to it outside of training."""

    model: ContrastiveModel
    momentum: nn.Module | None
    objective: Objective
    settings: ViewsConfig
    seed: int

    @property
    def device(self) -> torch.device:
        """Where the encoder's weights lie."""
        return next(self.model.parameters()).device

    def views(self, ids: Sequence[str], cut: Cut, epoch: int, count: int) -> list[Tensor]:
        """The first `count` views of an epoch, float [n, C, S, S] each."""
        epochs, views = np.full(len(ids), epoch, dtype=np.int64), range(count)
        key: dict[str, Any] = {"seed": self.seed, "epochs": epochs, "ids": ids}
        return random_views(cut(ids, epochs, views).to(self.device), self.settings, views=views, **key)

    def branches(
        self, pair: Sequence[Tensor], ids: Sequence[str], labels: Tensor, seen: Sequence[EncoderOutput] | None = None
    ) -> Branches:
        """The pair of views as the objective's branches. seen: what the encoder gave for each of them, if known."""
        outputs = None
        if seen is not None:
            outputs = EncoderOutput(*(torch.cat(p) for p in zip(*seen[: self.objective.branches], strict=True)))
        hashes = torch.from_numpy(id_hashes(ids)).to(self.device)
        return encode(self.objective, pair, self.model, self.momentum, ids=hashes, labels=labels, outputs=outputs)
