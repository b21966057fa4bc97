"""A backbone with the heads of its objective, its momentum copy, and the mode of its BatchNorms.

Shapes: n = images, C x S x S = one image in [-1, 1], E = embedding size, Hd = hidden width, D = output width.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from distunlearn.config.registry import OBJECTIVE, find
from distunlearn.config.schema import ObjectiveConfig, RunConfig
from distunlearn.encoders.backbone import create_backbone, embed_dim, input_size
from distunlearn.errors import EncoderError


class EncoderOutput(NamedTuple):
    """What one forward gives; a tuple of tensors, so that every wrapper finds the tensors in it.

    embedding: [n, E] pooled output of the backbone.
    projection: [n, D] output of the projector (supervised: the logits).
    output: [n, D] raw result of the last linear layer: of the predictor where there is one, else of the projector
        (supervised: logits [n, classes]).
    hidden: [n, Hd] input of that layer (supervised: the embedding).
    """

    embedding: Tensor
    projection: Tensor
    output: Tensor
    hidden: Tensor


class Head(nn.Module):
    """Linear - BatchNorm - ReLU - Linear, or with `hidden_dim` None a single Linear: [n, in] -> ([n, Hd], [n, out]).

    layers: linear ones, the last included. norm: whether a BatchNorm follows the others; without it they have a bias.

    Always in the precision of its weights: a loss that looks at small differences of outputs would look at the
    rounding of bf16 instead, and a head is a small part of the work.
    """

    def __init__(
        self, in_dim: int, hidden_dim: int | None, out_dim: int, *, layers: int = 2, norm: bool = True
    ) -> None:
        super().__init__()
        if hidden_dim is None:
            self.body: nn.Module = nn.Identity()
        else:
            parts: list[nn.Module] = []
            for number in range(layers - 1):
                # No bias before a BatchNorm: its gradient would be rounding noise, which Adam scales up to full steps.
                parts.append(nn.Linear(hidden_dim if number else in_dim, hidden_dim, bias=not norm))
                parts += [nn.BatchNorm1d(hidden_dim)] * norm + [nn.ReLU(inplace=True)]
            self.body = nn.Sequential(*parts)
        self.last = nn.Linear(in_dim if hidden_dim is None else hidden_dim, out_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input and the result of the last linear layer."""
        with torch.autocast(x.device.type, enabled=False):
            hidden = self.body(x.to(self.last.weight.dtype))
            return hidden, self.last(hidden)


class ContrastiveModel(nn.Module):
    """Backbone, projector and, for objectives that predict a momentum target, a predictor.

    Args:
        backbone: [n, C, S, S] -> [n, E].
        projector: head on the embedding.
        predictor: head on the projection, or None.
        image_shape: (C, S, S) that `forward` accepts.
        mean, std: of each channel in [0, 1], by which the backbone wants its images normalised; None: 0.5 and 0.5,
            which images in [-1, 1] are.
    """

    scale: Tensor | None  # [C, 1, 1]
    shift: Tensor | None

    def __init__(
        self,
        backbone: nn.Module,
        projector: Head,
        predictor: Head | None,
        image_shape: tuple[int, int, int],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        scale = shift = None
        if mean is not None and std is not None:
            scale = 0.5 / torch.tensor(std).view(-1, 1, 1)
            shift = (0.5 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.backbone = backbone
        self.projector = projector
        self.predictor = predictor
        self.image_shape = tuple(image_shape)
        self.backbone_frozen = False

    def freeze_backbone(self) -> None:
        """Train the heads only: no gradient for the backbone, and its running statistics stay as they are."""
        self.backbone_frozen = True
        self.backbone.requires_grad_(False)

    @property
    def embed_dim(self) -> int:
        """E."""
        return next(part.in_features for part in self.projector.modules() if isinstance(part, nn.Linear))

    def normalise(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] as the backbone wants them."""
        return images if self.scale is None or self.shift is None else images * self.scale + self.shift

    def forward(self, images: Tensor) -> EncoderOutput:
        """Embed float images [n, C, S, S] in [-1, 1].

        Raises:
            EncoderError: images of another shape, or of whole numbers.
        """
        if images.dim() != 4 or tuple(images.shape[1:]) != self.image_shape or not images.is_floating_point():
            raise EncoderError(
                f"the encoder was given {images.dtype} images of shape {list(images.shape)}, expected "
                f"floats [n, {', '.join(map(str, self.image_shape))}]; set encoder.in_chans and encoder.image_size to "
                "what the data are."
            )
        embedding = self.backbone(self.normalise(images))
        hidden, projection = self.projector(embedding)
        output = projection
        if self.predictor is not None:
            hidden, output = self.predictor(projection)
        return EncoderOutput(embedding, projection, output, hidden)


class MomentumEncoder:
    """An exponential moving average of a model's weights in fp32, without its predictor and without gradients.

    Running statistics are its own: its BatchNorms see their own batches.
    """

    def __init__(self, model: ContrastiveModel) -> None:
        self.model: ContrastiveModel = copy.deepcopy(model).float().requires_grad_(False)
        self.model.predictor = None
        self.updates = 0  # so far in this process

    @torch.no_grad()
    def __call__(self, images: Tensor) -> EncoderOutput:
        """Targets for float images [n, C, S, S]: `projection`, which `output` equals."""
        return self.model(images)

    def update(self, model: nn.Module, momentum: float) -> None:
        """ema <- momentum * ema + (1 - momentum) * weight, for the weights that both have; 0 <= momentum <= 1."""
        self.update_from(dict(model.named_parameters()), momentum)

    @torch.no_grad()
    def update_from(self, named: Mapping[str, Tensor], momentum: float) -> None:
        """`update` with weights by name: whole, or cut as the encoder's own are, whose parts alone then move."""
        assert 0 <= momentum <= 1, "the momentum is a share"
        self.updates += 1
        averages: list[Tensor] = []
        weights: list[Tensor] = []
        for name, own in self.model.named_parameters():
            ema, weight = (t.to_local() if isinstance(t, DTensor) else t for t in (own, named[name].detach()))
            assert weight.shape == ema.shape, f"{name} is a shard; gather it and use update_from"
            averages.append(ema)
            weights.append(weight.to(ema.device, ema.dtype))
        # One pass over the memory, few kernels for many weights on a GPU; and equal weights stay as they are, exactly.
        torch._foreach_lerp_(averages, weights, 1 - momentum)

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and running statistics by name; they share memory with the encoder."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`; names and shapes must be the same."""
        self.model.load_state_dict(state)

    def to(self, device: torch.device | str) -> MomentumEncoder:
        """Move to `device`, in place."""
        self.model.to(device)
        return self


@contextmanager
def batchnorm_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Within the block every BatchNorm inside `model` uses batch ("train") or running ("eval") statistics.

    Everything else keeps its mode, and the BatchNorms get theirs back on the way out, after an error too. Those of
    a frozen backbone (`ContrastiveModel.freeze_backbone`) use running statistics in both modes.
    """
    assert mode in ("train", "eval"), "BatchNorms are in train or eval mode"
    before = [(module, module.training) for module in model.modules() if isinstance(module, _BatchNorm)]
    backbone: Any = getattr(model, "backbone", None)
    frozen = set(backbone.modules()) if getattr(model, "backbone_frozen", False) else set()
    try:
        for module, _ in before:
            module.training = mode == "train" and module not in frozen
        yield
    finally:
        for module, training in before:
            module.training = training


def build_model(cfg: RunConfig, num_classes: int | None) -> ContrastiveModel:
    """A model in train mode with fresh weights: a function of cfg.seed, cfg.encoder and cfg.objective alone.

    Backbone, projector and predictor draw from generators of their own, so that objectives share the backbone.
    Nothing is read from encoder.checkpoint: see `weights.load_backbone`.

    Args:
        cfg: the run.
        num_classes: classes of an objective whose head is a classifier (required there), else ignored.

    Raises:
        EncoderError: an encoder that cannot be built.
    """
    objective = cfg.objective
    with _own_generator(cfg.seed, "backbone"):
        backbone = create_backbone(cfg.encoder)
    with _own_generator(cfg.seed, "projector"):
        projector = _projector(embed_dim(backbone, cfg.encoder), objective, num_classes)
    predictor = None
    if find(OBJECTIVE, objective.name).predictor:
        with _own_generator(cfg.seed, "predictor"):
            width = objective.output_dim
            predictor = Head(width, objective.hidden_dim, width, norm=objective.head_norm)
    shape, mean, std = input_size(cfg.encoder), cfg.encoder.mean, cfg.encoder.std
    return ContrastiveModel(backbone, projector, predictor, shape, mean, std).train()


def _projector(embed_dim: int, objective: ObjectiveConfig, num_classes: int | None) -> Head:
    if find(OBJECTIVE, objective.name).head == "classifier":
        assert num_classes is not None and num_classes > 0, "a classifier needs the number of classes"
        return Head(embed_dim, None, num_classes)
    return Head(
        embed_dim, objective.hidden_dim, objective.output_dim, layers=objective.head_layers, norm=objective.head_norm
    )


@contextmanager
def _own_generator(seed: int, part: str) -> Iterator[None]:
    """Draw on the CPU from (seed, part) and put the global generator back; GPU generators are not touched."""
    derived = int.from_bytes(hashlib.sha256(f"{part}:{seed}".encode()).digest()[:8], "big") >> 1
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(derived)
        yield
