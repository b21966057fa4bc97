"""The steps that `constraint.py` measures: a plain contrastive step, and third_party by every evaluator.

A step is loss and backward, as `engine/loop.py` runs it, without the optimizer (the same work in all). All start from
the same weights and the same images of noise: what a step costs does not depend on what is in an image. The step has
number 1, because step 0 and every `constraint.check_every`-th also check the size of their finite differences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from distunlearn.config.registry import EVALUATOR, settings_of
from distunlearn.config.schema import EncoderConfig, RunConfig
from distunlearn.data.schedule import Batch
from distunlearn.encoders.model import ContrastiveModel, EncoderOutput, build_model
from distunlearn.methods.base import Method
from distunlearn.methods.third_party import ThirdParty
from distunlearn.methods.training import Finetune
from distunlearn.objectives import make_objective
from distunlearn.objectives.forward import Context

__all__ = ["ENCODERS", "PRODUCTION", "STEPS", "Bench"]

STEPS = ("plain", *EVALUATOR.table)

ENCODERS = {
    "ViT-Ti/8 at 64 px": EncoderConfig(
        name="vit_tiny_patch16_224", image_size=64, in_chans=3, stem="standard", args={"patch_size": 8}
    ),
    "ResNet-18 at 64 px": EncoderConfig(name="resnet18", image_size=64, in_chans=3, stem="standard"),
}
PRODUCTION = {
    "ViT-B/16 at 224 px": EncoderConfig(name="vit_base_patch16_224", image_size=224, in_chans=3, stem="standard"),
    "ResNet-50 at 224 px": EncoderConfig(name="resnet50", image_size=224, in_chans=3, stem="standard"),
}


class Bench:
    """One encoder and the batches of one step.

    Args:
        encoder: what to build; weights are random.
        retain: retain images of a step, a multiple of 4; forget and third-party are a quarter of it each.
        precision: fp32, or bf16 as autocast around the forward.
    """

    def __init__(self, encoder: EncoderConfig, retain: int, device: str = "cpu", precision: str = "fp32") -> None:
        assert retain % 4 == 0 and retain >= 8, "a U-statistic needs 2 forgotten and 2 third-party images"
        self.cfg = RunConfig(encoder=encoder, precision=precision)
        self.device = torch.device(device)
        self.model: ContrastiveModel = build_model(self.cfg, None)
        if self.device.type != "cpu":  # tensors without values cannot be moved
            self.model.to(self.device, memory_format=torch.channels_last)  # as `Backend.synchronise` has it on a GPU
        counts = {"retain": retain, "forget": retain // 4, "third_party": retain // 4}
        self.batches = {role: self._batch(role, count) for role, count in counts.items()}

    def _batch(self, role: str, count: int) -> Batch:
        size = self.cfg.encoder.image_size
        epochs, labels = np.zeros(count, dtype=np.int64), torch.zeros(count, dtype=torch.int64)
        ids, shape = [f"{role}-{i}" for i in range(count)], (3, size, size)

        def cut(ids: Sequence[str], epochs: np.ndarray, views: Sequence[int]) -> Tensor:
            return torch.randint(0, 256, (len(ids), len(views), *shape), dtype=torch.uint8)

        return Batch(ids, epochs, labels, cut, cut(ids, epochs, range(4)))

    def _forward(self, images: Tensor) -> EncoderOutput:
        """As `Backend` runs it: autocast around the forward alone."""
        if self.cfg.precision == "fp32":
            return self.model(images)
        with torch.autocast(self.device.type, torch.bfloat16):
            out = self.model(images)
        return EncoderOutput(*(part.float() for part in out))

    def step(self, name: str, **constraint: int) -> Callable[[], None]:
        """A function that runs one step of `name` (of STEPS): loss and backward, gradients dropped before.

        constraint: settings of the constraint other than the defaults.
        """
        cfg, method = self.cfg, Finetune(self.cfg)
        if name != "plain":
            cfg = replace(cfg, constraint=settings_of(EVALUATOR, name, **constraint))
            method = ThirdParty(cfg)
        ctx = Context(cfg, make_objective(cfg.objective), self.model, self._forward, self.device, step=1)
        batches = self.batches if name != "plain" else {"retain": self.batches["retain"]}
        return lambda: self._run(method, ctx, batches)

    def _run(self, method: Method, ctx: Context, batches: dict[str, Batch]) -> None:
        self.model.zero_grad(set_to_none=True)
        method.loss(ctx, batches).loss.backward()
