"""The numerics guard: all ranks agree that a step is sound before any weight changes, or stop with a capture.

A step is unsound if on any rank a loss or a gradient is not finite, the method itself says so, or a bound that the
settings declare for a run that climbs a loss (`method.loss_bound`, `method.embedding_bound`) is passed. Then
`nan-step-XXXXXXXX.json` in the phase's folder tells what it was, of every rank: the parts of its loss, the norm of its
gradients and where they are not finite, ids, seed and random state; no images, no weights. Every rank raises the same
error after the file is written, so that a launcher ends none of them before.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distunlearn.common.files import write_json
from distunlearn.common.text import printable
from distunlearn.distributed.collectives import all_reduce_mean
from distunlearn.engine import fault_injection
from distunlearn.engine.backends.base import Backend
from distunlearn.errors import NumericsError
from distunlearn.methods.base import StepOutput
from distunlearn.objectives.forward import Context

NAMES = 20  # parameters that are named


@dataclass(frozen=True)
class Place:
    """Where a step is: for the capture."""

    step: int
    rate: float
    micro: int = 0
    ids: Mapping[str, list[str]] = field(default_factory=dict)
    parts: Sequence[Mapping[str, float]] = ()  # figures of the micro-batches so far


class NumericsGuard:
    """Of one phase. With `bounded` the declared bounds hold: in the phase that forgets, not in pretraining."""

    def __init__(self, phase: str, folder: Path, ctx: Context, backend: Backend, *, bounded: bool) -> None:
        self.phase, self.folder, self.ctx, self.backend = phase, folder, ctx, backend
        self.loss_bound = ctx.cfg.method.loss_bound if bounded else None
        self.embedding_bound = ctx.cfg.method.embedding_bound if bounded else None
        self._norm = torch.zeros((), device=ctx.device)
        if self.embedding_bound is not None:
            ctx.forward = self._measured(ctx.forward)

    def loss(self, call: Callable[[], StepOutput], place: Place) -> StepOutput:
        """The method's output, not looked at yet: that is for `check`.

        Raises:
            NumericsError: the method itself says that the step is not sound; `agreed`.
        """
        self._norm = torch.zeros((), device=self.ctx.device)
        try:
            out = call()
        except NumericsError as error:  # of figures that all ranks have, so that all of them are here
            out = StepOutput(torch.tensor(float("nan"), device=self.ctx.device))
            self.require(out.loss, "loss", place, out, str(error))
            raise  # the check was switched off
        out.loss = fault_injection.poison("loss", out.loss, place.step, self.phase)
        return out

    def check(self, out: StepOutput, place: Place) -> dict[str, float]:
        """The loss and the figures of an output that is sound on every rank; before any weight changes. Collective.

        Raises:
            NumericsError: it is not sound; `agreed`.
        """
        self.require(out.loss, "loss", place, out)
        self._require_bounds(out, place)
        return _read({"loss": out.loss, **out.metrics})

    def require(
        self, value: Tensor, what: str, place: Place, out: StepOutput | None = None, reason: str | None = None,
        count: int = 0,
    ) -> int:  # fmt: skip
        """Every rank learns of the first value that is not finite before any rank updates; returns the sum over the
        ranks of `count`, which travels along. Collective.

        Raises:
            NumericsError: there is one; `agreed`.
        """
        if fault_injection.reach("finite_check" if what == "loss" else "norm_check", place.step, self.phase):
            return count
        finite, total = self.backend.world.finite_and_sum(value, count)
        if not finite:
            self._stop(what, f"the {what} at step {place.step} is not finite", place, value, out, reason)
        return total

    def _require_bounds(self, out: StepOutput, place: Place) -> None:
        if self.loss_bound is not None:
            level = float(all_reduce_mean(out.loss.double()))
            if abs(level) > self.loss_bound:
                sentence = f"the loss reached {level:.4g} at step {place.step}, beyond method.loss_bound"
                self._stop("bound", f"{sentence} = {self.loss_bound:g}", place, out.loss, out, None)
        if self.embedding_bound is not None:
            largest = max(self.backend.world.gather_objects(float(self._norm)))
            if not largest <= self.embedding_bound:
                sentence = f"the largest norm of an embedding reached {largest:.4g} at step {place.step}"
                told = f"{sentence}, beyond method.embedding_bound = {self.embedding_bound:g}"
                self._stop("bound", told, place, out.loss, out, None)

    def _measured(self, forward: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def measure(images: Tensor) -> Any:
            out = forward(images)
            self._norm = torch.maximum(self._norm, out.embedding.detach().float().norm(dim=-1).max())
            return out

        return measure

    def _stop(
        self, what: str, sentence: str, place: Place, value: Tensor, out: StepOutput | None, reason: str | None
    ) -> None:
        path = self.folder / f"nan-step-{place.step:08d}.json"
        mine = {
            "rank": self.backend.world.rank,
            "value": _plain(float(value.detach().float().sum())),
            "finite": bool(torch.isfinite(value.detach()).all()),
            "parts": [_figures(part) for part in (*place.parts, *([out.metrics] if out else []))],
            "gradients": _gradients(self.backend),
            "ids": {name: list(ids) for name, ids in place.ids.items()},
            "reason": reason,
            "torch_rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        }
        ranks = self.backend.world.gather_objects(mine)
        reasons = [found["reason"] for found in ranks if found["reason"]]
        if self.backend.world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            names = list(place.ids)
            facts = {
                "phase": self.phase, "step": place.step, "micro_batch": place.micro, "what": what,
                "reason": reasons[0] if reasons else sentence, "seed": self.ctx.cfg.seed,
                "precision": self.ctx.cfg.precision, "learning_rate": place.rate,
                "ids": {name: [i for found in ranks for i in found["ids"][name]] for name in names}, "ranks": ranks,
            }  # fmt: skip
            write_json(path, facts)
        self.backend.world.barrier()
        culprits = [str(found["rank"]) for found in ranks if not found["finite"]]
        where = f" on rank {', '.join(culprits[:8])}" if self.backend.world.size > 1 and culprits else ""
        because = f" ({printable(reasons[0].rstrip('.'), 300)})" if reasons else ""
        error = NumericsError(
            f"{self.phase}: {sentence}{where}{because}; no weights were changed by this step, and {path} names its "
            "samples; lower the learning rate or the method's weights."
        )
        error.agreed = True
        raise error


def _read(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Numbers of Python; of those that lie on a GPU all are waited for at once."""
    tensors = {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}
    found = torch.stack([value.double().reshape(()) for value in tensors.values()]).tolist() if tensors else []
    return {**{name: float(value) for name, value in values.items() if name not in tensors},
            **dict(zip(tensors, found, strict=True))}  # fmt: skip


def _gradients(backend: Backend) -> dict[str, Any]:
    """Of this rank's gradients, or of its part of them: the norm of the finite ones, and names of the others.

    Where a backend keeps gradients out of sight (ZeRO) there is nothing to tell.
    """
    square, broken = 0.0, []
    for name, parameter in backend.model.named_parameters() if backend.is_prepared else ():
        if parameter.grad is None:
            continue
        gradient = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
        total = float(gradient.double().square().sum())
        if math.isfinite(total):
            square += total
        else:
            broken.append(name)
    return {"norm": math.sqrt(square), "not_finite": len(broken), "names": broken[:NAMES]}


def _figures(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain(float(value)) for name, value in part.items()}


def _plain(value: float) -> float | str:
    """JSON has no NaN."""
    return value if math.isfinite(value) else str(value)
