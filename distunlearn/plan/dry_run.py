"""Images, and memory, of a training by its method's own code on tensors without values.

Steps of the real `calibrate` and `loss` run under torch's FakeTensorMode: shapes are followed, nothing is computed. So
what is planned cannot differ from what the method does, and a method from outside is planned like any other. A value
that the code asks for (a norm, a loss) is tiny: above 0 and below every bound.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distunlearn.config.schema import RunConfig
from distunlearn.data.schedule import Batch
from distunlearn.distributed.world import World
from distunlearn.encoders.model import ContrastiveModel, MomentumEncoder
from distunlearn.engine.backends.base import Backend
from distunlearn.engine.optimizer import make_optimizer
from distunlearn.engine.session import CALIBRATION_LIMIT
from distunlearn.errors import DistunlearnError
from distunlearn.methods.base import Method
from distunlearn.objectives import make_objective
from distunlearn.objectives.forward import Context
from distunlearn.objectives.queue import KeyQueue

TINY = 1e-30  # what a number that nobody computed counts as


class NotFollowed(Exception):
    """Code of a part from outside needs values, so its images cannot be counted before; the run itself is fine."""


@dataclass(frozen=True)
class Counted:
    """What a training takes.

    images: through an encoder in all steps, every view and every extra pass, over all processes.
    calibration_images: the same before the first step.
    peak_bytes: of tensors alive at one time in one process without sharding: weights, gradients, moments, activations;
        no image outside the batch, no library, no workspace. 0: nothing is trained.
    """

    images: int = 0
    calibration_images: int = 0
    peak_bytes: int = 0


class LiveBytes(TorchDispatchMode):
    """Within it, the bytes of all storages that operations make, as long as they are alive.

    `peak` is the largest sum so far. Tensors made before count once they are shown to `see`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _any_value(args[0])
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.any and isinstance(found, FakeTensor):
            found.nothing = True  # type: ignore[attr-defined]  # code asks `any` for what is wrong
        for value in tree_leaves(found):
            if isinstance(value, Tensor):
                self.see(value)
        return found

    def see(self, value: Tensor) -> None:
        """Count the storage of a tensor as it is now, once, until it is gone."""
        storage = value.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            weakref.finalize(storage, self._gone, key)
        self.live += storage.nbytes() - self._known.get(key, 0)
        self._known[key] = storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)


def _any_value(scalar: FakeTensor) -> float | int | bool:
    """What code that asks for a value gets: that of a constant of the code, false for `any`, else `TINY`, 1 or true."""
    if scalar.constant is not None:
        return scalar.constant.item()
    if getattr(scalar, "nothing", False):
        return False
    return True if scalar.dtype is torch.bool else TINY if scalar.dtype.is_floating_point else 1


def count_training(
    cfg: RunConfig, method: Method, model: ContrastiveModel, steps: int, counts: Mapping[str, int]
) -> Counted:
    """Run one step of every kind (`Method.step_kind`) of a training, and its calibration, on tensors without values.

    Args:
        model: as `build_model` gives it; only shapes are read.
        counts: images by role.

    Raises:
        NotFollowed: the method's code needs values, as `tensor.numpy()` does.
        DistunlearnError: what its code refuses.
    """
    if method.steps == "none" or steps == 0:
        return Counted()
    kinds: dict[Hashable, list[int]] = {}
    for step in range(steps):
        kinds.setdefault(method.step_kind(step), []).append(step)
    momentum = MomentumEncoder(model) if make_objective(cfg.objective).needs_momentum else None
    fake, live = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
    try:
        with torch.random.fork_rng(devices=[]), fake, live:
            run = _Run(cfg, method, lambda real: _hollow(real, fake, live), model, momentum)
            calibration = run.calibrate(counts)
            images = sum(run.step(same[0]) * len(same) for same in kinds.values())
    except DistunlearnError:
        raise
    except Exception as error:
        raise NotFollowed(f"{method.name} needs values ({type(error).__name__}: {str(error)[:200]})") from error
    return Counted(images, calibration, live.peak)


def _hollow(model: ContrastiveModel, fake: FakeTensorMode, live: LiveBytes) -> ContrastiveModel:
    """The same modules with weights and buffers of the same shapes, which hold nothing and are counted."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(fake.from_tensor(parameter.detach()), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = fake.from_tensor(buffer)
    for value in memo.values():
        live.see(value)
    return copy.deepcopy(model, memo)


class _Run:
    """A training by one process with a backend that shards nothing; batches are this process's share."""

    def __init__(
        self,
        cfg: RunConfig,
        method: Method,
        hollow: Callable[[ContrastiveModel], ContrastiveModel],
        model: ContrastiveModel,
        momentum: MomentumEncoder | None,
    ) -> None:
        self.cfg, self.method = cfg, method
        self.optim = cfg.unlearn if method.steps == "unlearn" else cfg.pretrain
        self.backend = Backend(cfg, World(0, 1, torch.device("cpu")))
        trained, objective = hollow(model), make_objective(cfg.objective)
        if momentum is not None:
            momentum.model = hollow(momentum.model)
        optimizer = make_optimizer(self.optim, trained)
        forward = self.backend.prepare(trained, optimizer, clip=self.optim.clip)
        for parameter in trained.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        self.backend.step()  # from the second step on there are moments beside the activations
        original = None
        if "teacher" in method.needs_for(cfg):
            original = hollow(model).eval().requires_grad_(False)
        self.ctx = Context(
            cfg=cfg, objective=objective, model=trained, forward=forward, device=torch.device("cpu"),
            momentum=momentum, original=original, plain_forward=self.backend.plain_forward(),
            queue=KeyQueue(cfg.objective.queue_size, cfg.objective.output_dim) if objective.uses_queue else None,
            accumulate=self.optim.accumulate,
        )  # fmt: skip

    def calibrate(self, counts: Mapping[str, int]) -> int:
        """Images of the calibration."""
        self.method.calibrate(self.ctx, lambda role: self._batch(min(counts.get(role, 0), CALIBRATION_LIMIT)))
        return self._images()

    def step(self, step: int) -> int:
        """Images of one step. Of its micro-batches, which are alike, at most two are run."""
        ctx, count = self.ctx, self.optim.accumulate
        ctx.step = step
        images = 0
        for ctx.micro in range(min(2, count)):
            batches = {name: self._batch(size // count) for name, size in self.method.batch_sizes().items()}
            self.backend.backward(self.method.loss(ctx, batches).loss / count)
            images = count * self._images()
        self.backend.step()
        if ctx.momentum is not None:
            self.backend.update_momentum(ctx.momentum, ctx.model, self.cfg.objective.momentum)
        return images

    def _batch(self, count: int) -> Batch:
        encoder = self.cfg.encoder

        def cut(ids: Sequence[str], epochs: np.ndarray, views: Sequence[int]) -> torch.Tensor:
            size = encoder.image_size
            return torch.empty((len(ids), len(views), encoder.in_chans, size, size), dtype=torch.uint8)

        ids, labels = [str(row) for row in range(count)], torch.zeros(count, dtype=torch.int64)
        return Batch(ids, np.zeros(count, dtype=np.int64), labels, cut)

    def _images(self) -> int:
        """Images since the last call."""
        images, self.ctx.images = self.ctx.images, 0
        return images
