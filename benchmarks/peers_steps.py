"""Training steps of other packages on our batches and views, for `peers.py`.

Each is the loop of the package's own documentation for plain PyTorch: its heads, its loss, its helpers, around the same
timm backbone. What the package leaves to the user (batches, views, the optimizer) is ours, so that both sides do the
same work; `own_views` replaces the views by the package's.
"""

from __future__ import annotations

import abc
import copy
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image
from torch import Tensor, nn

from distunlearn.config.schema import RunConfig
from distunlearn.data.loading.stream import RoleFeeder
from distunlearn.data.schedule import Batch
from distunlearn.data.views.crops import EVALUATION
from distunlearn.encoders.backbone import create_backbone
from distunlearn.engine.optimizer import make_optimizer
from distunlearn.objectives.forward import random_views

__all__ = ["PEERS", "Peer", "solo_loss"]


class Peer(abc.ABC):
    """One package's step: `step()` does batch, views, forward, loss, backward and update, and returns the loss.

    optimizer: "theirs" for torch's AdamW as its constructor gives it, "ours" for the one that our engine makes.
    """

    def __init__(self, cfg: RunConfig, feeder: RoleFeeder, optimizer: str, own_views: bool = False) -> None:
        self.cfg, self.feeder, self.number = cfg, feeder, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.backbone = create_backbone(cfg.encoder).train()
            self.build()
        parameters = [p for module in self.modules() for p in module.parameters()]
        rates = {"lr": cfg.pretrain.lr, "weight_decay": cfg.pretrain.weight_decay}
        self.optimizer = (
            make_optimizer(cfg.pretrain, nn.ModuleList(self.modules()))
            if optimizer == "ours"
            else torch.optim.AdamW(parameters, **rates)
        )
        self.transform = self.own_transform() if own_views else None

    @abc.abstractmethod
    def build(self) -> None:
        """Head and loss."""

    def modules(self) -> list[nn.Module]:
        """What is trained."""
        return [self.backbone, self.head]

    @abc.abstractmethod
    def loss(self, views: list[Tensor]) -> Tensor:
        """Of the two views of a batch."""

    def own_transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """The package's own views of a picture, where a row compares them."""
        raise ValueError(f"{type(self).__name__} has no views of its own here; leave own_views out.")

    def views(self, batch: Batch) -> list[Tensor]:
        if self.transform is None:
            keys = {"seed": self.cfg.seed, "epochs": batch.epochs, "ids": batch.ids}
            return random_views(batch.views((0, 1)), self.cfg.views, **keys, views=(0, 1))
        plain = batch.cut(batch.ids, batch.epochs, (EVALUATION,))[:, 0]
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in plain]
        return [torch.stack(part) for part in zip(*map(self.transform, pictures), strict=True)]

    def step(self) -> float:
        views = self.views(self.feeder.batch_at(self.number))
        self.number += 1
        loss = self.loss(views)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def lightly_transform(cfg: RunConfig) -> Callable[[Image.Image], list[Tensor]]:
    """Its SimCLR views with the operations and strengths of ours, each of them always on where ours is."""
    from lightly.transforms import SimCLRTransform

    own = cfg.views
    return SimCLRTransform(
        input_size=cfg.encoder.image_size, cj_prob=1.0, cj_bright=own.brightness, cj_contrast=own.contrast,
        cj_sat=own.saturation, cj_hue=own.hue, min_scale=own.crop_scale_min, random_gray_scale=own.grayscale,
        gaussian_blur=own.blur, hf_prob=own.flip,
    )  # fmt: skip


class LightlySimCLR(Peer):
    def build(self) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        own = self.cfg.objective
        self.head = SimCLRProjectionHead(self.backbone.num_features, own.hidden_dim, own.output_dim)
        self.criterion = NTXentLoss(temperature=own.temperature)

    def loss(self, views: list[Tensor]) -> Tensor:
        z0, z1 = (self.head(self.backbone(view).flatten(start_dim=1)) for view in views)
        return self.criterion(z0, z1)

    def own_transform(self) -> Callable[[Image.Image], list[Tensor]]:
        return lightly_transform(self.cfg)


class LightlyMoCo(Peer):
    def build(self) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        own = self.cfg.objective
        self.head = MoCoProjectionHead(self.backbone.num_features, own.hidden_dim, own.output_dim, batch_norm=True)
        self.backbone_momentum, self.head_momentum = copy.deepcopy(self.backbone), copy.deepcopy(self.head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.head_momentum)
        self.criterion = NTXentLoss(temperature=own.temperature, memory_bank_size=(own.queue_size, own.output_dim))

    def loss(self, views: list[Tensor]) -> Tensor:
        from lightly.models.utils import update_momentum

        update_momentum(self.backbone, self.backbone_momentum, m=self.cfg.objective.momentum)
        update_momentum(self.head, self.head_momentum, m=self.cfg.objective.momentum)
        query = self.head(self.backbone(views[0]).flatten(start_dim=1))
        key = self.head_momentum(self.backbone_momentum(views[1]).flatten(start_dim=1)).detach()
        return self.criterion(query, key)

    def own_transform(self) -> Callable[[Image.Image], list[Tensor]]:
        return lightly_transform(self.cfg)


def solo_loss(folder: Path, name: str) -> ModuleType:
    """A loss file of solo-learn's unpacked wheel, loaded by itself: the package cannot be installed beside torch 2."""
    spec = importlib.util.spec_from_file_location(f"solo_{name}", folder / "solo" / "losses" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class SoloSimCLR(Peer):
    """solo-learn's loss function around the backbone; its head is Linear - ReLU - Linear."""

    folder = Path()

    def build(self) -> None:
        own, width = self.cfg.objective, self.backbone.num_features
        self.head = nn.Sequential(
            nn.Linear(width, own.hidden_dim), nn.ReLU(), nn.Linear(own.hidden_dim, own.output_dim)
        )
        self.criterion = solo_loss(self.folder, "simclr").simclr_loss_func

    def loss(self, views: list[Tensor]) -> Tensor:
        z0, z1 = (self.head(self.backbone(view)) for view in views)
        return self.criterion(z0, z1, temperature=self.cfg.objective.temperature)


PEERS: Mapping[str, type[Peer]] = {
    "lightly simclr": LightlySimCLR,
    "lightly moco": LightlyMoCo,
    "solo-learn simclr": SoloSimCLR,
}
