"""The training loop: the same for pretraining, retraining and every way to forget.

Step = batches of the schedule -> loss of the method -> backward -> finite check over ranks (up to here once for each
micro-batch) -> optimizer -> momentum encoder -> ledger, metrics, now and then a checkpoint. State at step k is
(weights, optimizer, momentum encoder, queue, method, k): data order and views are pure functions of the step, so that
a killed run, started again, ends in the same weights.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distunlearn.config.schema import PretrainConfig, UnlearnConfig
from distunlearn.data.loading.stream import Batches, RoleFeeder
from distunlearn.data.schedule import Batch
from distunlearn.engine import fault_injection
from distunlearn.engine.backends import Backend
from distunlearn.engine.backends.tensor_shards import Stored, whole
from distunlearn.engine.checkpoint.async_save import Saver, agreed_checkpoint
from distunlearn.engine.checkpoint.format import KEEP, KEEP_ALL, Checkpoint, files_digest
from distunlearn.engine.checkpoint.tensors import optimizer_state, read_state
from distunlearn.engine.consumption import REPLACED, Consumption
from distunlearn.engine.ledger import Ledger
from distunlearn.engine.metrics_log import Telemetry
from distunlearn.engine.nan_guard import NumericsGuard, Place
from distunlearn.engine.optimizer import learning_rate, peak_rate
from distunlearn.engine.preemption import StopRequest
from distunlearn.engine.watchdog import Watch
from distunlearn.errors import DataError, RankLostError, StoppedError
from distunlearn.methods.base import Method
from distunlearn.objectives.forward import Context


@dataclass
class Phase:
    """One training phase. `folder` holds its checkpoints; `digest` is what a resumed run must agree with."""

    name: str
    folder: Path
    steps: int
    optim: PretrainConfig | UnlearnConfig
    method: Method
    feeders: Mapping[str, RoleFeeder]
    sample: Callable[[str], Batch]
    forget_ids: frozenset[str]
    digest: str
    names_forget: str = "forget"  # consumed role whose ids the ledger names; "" where members are trained on
    refuse: Callable[[Collection[str]], None] | None = None  # raises if so many images may not be undecodable
    begins: str | None = None  # state digest of the encoder that it begins with; None: fresh weights, or a foreign file


@dataclass(frozen=True)
class PhaseResult:
    """`images` counts every image passed through an encoder, over all ranks and attempts; `seconds` likewise."""

    steps: int
    images: int
    seconds: float
    attempts: int
    started: dict[str, float]


def train_phase(
    phase: Phase,
    ctx: Context,
    backend: Backend,
    ledger: Ledger,
    telemetry: Telemetry,
    stop: StopRequest,
    watch: Watch,
) -> PhaseResult:
    """Run `phase` from its newest checkpoint, or from step 0, to its end or to a stop.

    Raises:
        NumericsError: a loss or gradient is not finite on any rank, or a declared bound is passed; nothing is
            updated, and `nan-step-XXXXXXXX.json` in the phase's folder names the samples.
        RankLostError: the ranks are not at the same place, or their momentum encoders, queues or methods differ.
        DataError: no checkpoint verifies, or they belong to another configuration.
        StoppedError: `stop` was asked for, on any rank; the state is saved.
    """
    folder, note = phase.folder / "checkpoints", functools.partial(telemetry.note, phase.name)
    batches = Batches(phase.feeders, ctx.device, phase.steps * phase.optim.accumulate)
    keep = KEEP_ALL if ctx.cfg.evidence.keep == "all" else KEEP
    with watch.training(), batches, Saver(folder, backend, ctx.cfg.checkpoint, ledger, stop, note, keep) as saver:
        return _Runner(phase, ctx, backend, ledger, telemetry, stop, watch, saver, batches).run()


@dataclass(frozen=True)
class _Part:
    """What is left of a micro-batch after its backward. metrics: its loss among them."""

    metrics: dict[str, float]
    consumed: dict[str, list[str]]
    ids: dict[str, list[str]]
    replaced: list[str]


def _merged(parts: Sequence[Mapping[str, list[str]]]) -> dict[str, list[str]]:
    """The ids of all micro-batches, by name."""
    return {name: [i for part in parts for i in part[name]] for name in parts[0]}


def _mean(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Every figure averaged over the micro-batches that have it."""
    found = {name: [part[name] for part in parts if name in part] for part in parts for name in part}
    return {name: sum(values) / len(values) for name, values in found.items()}


def _sums(state: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Three numbers of each tensor: the sum of magnitudes, the sum, and a sum in which places count."""
    found = {}
    for name, value in state.items():
        wide = value.detach().double().flatten()
        places = torch.arange(wide.numel(), dtype=torch.float64, device=wide.device).cos()
        found[name] = torch.stack([wide.abs().sum(), wide.sum(), (wide * places).sum()]).tolist()
    return found


def _close(found: Mapping[str, Sequence[float]], expected: Mapping[str, Sequence[float]]) -> bool:
    """Alike but for rounding: processors of different make round differently."""
    return found.keys() == expected.keys() and all(
        abs(a - b) <= 1e-5 * sums[0] for name, sums in expected.items() for a, b in zip(found[name], sums, strict=True)
    )


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class _Runner:
    def __init__(
        self, phase: Phase, ctx: Context, backend: Backend, ledger: Ledger, telemetry: Telemetry, stop: StopRequest,
        watch: Watch, saver: Saver, batches: Batches,
    ) -> None:  # fmt: skip
        self.phase, self.ctx, self.backend = phase, ctx, backend
        self.ledger, self.telemetry, self.stop, self.watch, self.saver = ledger, telemetry, stop, watch, saver
        self.batches = batches
        bounded = phase.names_forget == "forget" and phase.name == "unlearn"
        self.consumption = Consumption(phase, backend.world, ledger, telemetry)
        self.guard = NumericsGuard(phase.name, phase.folder, ctx, backend, bounded=bounded)
        self.first = 0
        self.saved = 0  # steps done when the state was saved last
        self.folder = phase.folder / "checkpoints"
        self.attempt = 1
        self.elapsed = 0.0
        self.started: dict[str, float] = {}
        self.head = ""  # hash over every step so far and the ids that this process had in it

    def run(self) -> PhaseResult:
        phase, ctx = self.phase, self.ctx
        self._at("start", 0, slow=True)
        fault_injection.reach("start", None, phase.name)
        note = functools.partial(self.telemetry.note, phase.name)
        checkpoint = agreed_checkpoint(self.folder, self.backend.world, self.ledger, note)
        first = self.first = self._restore(checkpoint)
        began = phase.begins if checkpoint is None else files_digest(checkpoint.facts["files"])
        heads = [] if checkpoint is None else checkpoint.facts["ranks"]
        self.ledger.start(
            phase.name, first, attempt=self.attempt, world=ctx.world, steps=phase.steps, state=began, ranks=heads
        )
        clock = time.monotonic()
        if checkpoint is None:
            self.started = phase.method.calibrate(ctx, phase.sample)
            if self.started:
                self.telemetry.log(phase.name, first, {f"start/{k}": v for k, v in self.started.items()})
        with self.telemetry.progress(phase.name, phase.steps, first) as progress:
            for step in range(first, phase.steps):
                self._at("agreement", step)
                stop = self.stop.agreed(self.backend.world, zlib.crc32(phase.name.encode()), step, self.watch.count)
                if stop and step > first:  # every attempt gets on by a step
                    self._leave(step, clock)
                metrics = self._step(step)
                self.telemetry.log(phase.name, step + 1, metrics)
                progress.update(step + 1, loss=metrics["loss"], images=ctx.images * ctx.world)
                done = step + 1
                if done % phase.optim.checkpoint_every == 0 and done < phase.steps:
                    self.elapsed, clock = self.elapsed + time.monotonic() - clock, time.monotonic()
                    self._save_watched(done)
        self._at("checkpoint", phase.steps, slow=True)
        self.saver.wait()
        self.elapsed += time.monotonic() - clock
        images = ctx.images * ctx.world
        self.ledger.done(phase.name, phase.steps, images=images, ranks=self.backend.world.gather_objects(self.head))
        self.ledger.sync()
        return PhaseResult(phase.steps, images, self.elapsed, self.attempt, self.started)

    def _leave(self, step: int, clock: float) -> None:
        """Save the state after `step` steps and end.

        Raises:
            StoppedError: always.
        """
        self._at("checkpoint", step, slow=True)
        self.saver.wait()
        self.elapsed += time.monotonic() - clock
        if step != self.saved and self.backend.is_prepared:
            self._save_watched(step)
            self.saver.wait()
        reason = self.stop.honoured(self.backend.world)
        raise StoppedError(
            f"{self.phase.name} was stopped by {reason} after step {step} of {self.phase.steps}, and its state is "
            "saved; the same command goes on from there."
        )

    # -- one step ------------------------------------------------------------------------------------------------

    def _step(self, step: int) -> dict[str, float]:
        phase, ctx, backend = self.phase, self.ctx, self.backend
        ctx.step = step
        rate = ctx.rate = learning_rate(step, phase.steps, peak_rate(phase.optim), phase.optim.warmup)
        backend.set_learning_rate(rate)
        parts = [self._micro_batch(step, micro, rate) for micro in range(phase.optim.accumulate)]
        self._at("gradient norm", step)
        norm = backend.grad_norm()
        figures = [part.metrics for part in parts]
        place = Place(step, rate, ids=_merged([part.ids for part in parts]), parts=figures)
        own = {**_merged([part.consumed for part in parts]), REPLACED: [i for part in parts for i in part.replaced]}
        strays = self.guard.require(torch.as_tensor(norm), "gradient norm", place, count=self.consumption.strays(own))
        self._at("update", step)
        if not fault_injection.reach("update", step, phase.name):
            backend.step()
        if phase.method.adjusts:
            backend.adjust(functools.partial(phase.method.adjust, ctx))
        if ctx.momentum is not None:
            self._at("momentum encoder", step)
            if not fault_injection.reach("momentum", step, phase.name):
                backend.update_momentum(ctx.momentum, ctx.model, ctx.cfg.objective.momentum)
        self._at("ledger", step)
        fault_injection.reach("ledger", step, phase.name)
        self.head = _digest([self.head, phase.name, step, own])
        return {"lr": rate, "grad_norm": float(norm), **self.consumption.account(step, own, strays, _mean(figures))}

    def _micro_batch(self, step: int, micro: int, rate: float) -> _Part:
        """Forward and backward of one part of the step's batches; the gradients of all parts are averaged."""
        phase, ctx, backend = self.phase, self.ctx, self.backend
        count = ctx.accumulate = phase.optim.accumulate
        ctx.micro = micro
        self._at("data", step)
        fault_injection.reach("data", step, phase.name)
        batches = self.batches.at(ctx.draw)
        ids = {name: batch.ids for name, batch in batches.items()}
        with backend.micro_batch(last=micro == count - 1):
            self._at("loss", step)
            place = Place(step, rate, micro, ids)
            out = self.guard.loss(lambda: phase.method.loss(ctx, batches), place)
            loss = fault_injection.poison_gradient("gradient", out.loss, step, phase.name)
            self._at("backward", step)
            fault_injection.reach("backward", step, phase.name)
            backend.backward(loss / count)
            # Only now is a value of the loss looked at: a GPU has its backward to do while this waits for the forward.
            self._at("finite check", step)
            metrics = self.guard.check(out, place)
        replaced = [i for batch in batches.values() for i in batch.replaced]
        return _Part(metrics, out.consumed, ids, replaced)

    def _at(self, place: str, step: int, *, slow: bool = False) -> None:
        """The first step of an attempt may compile, and takes its time."""
        self.watch.at(place, self.phase.name, step, slow=slow or step == self.first)

    # -- state ---------------------------------------------------------------------------------------------------

    def _save_watched(self, step: int) -> None:
        self._at("checkpoint", step, slow=True)
        heads = self._require_same_state()
        fault_injection.reach("save", step, self.phase.name)
        self._save(step, heads)
        fault_injection.reach("saved", step, self.phase.name)

    def _require_same_state(self) -> list[str]:
        """What every rank keeps a copy of is alike on all of them: the main rank's is what a checkpoint holds.

        Returns:
            `head` of every rank.

        Raises:
            RankLostError: it is not.
        """
        ctx = self.ctx
        copies: dict[str, Mapping[str, Tensor]] = {"method": self.phase.method.state_dict()}
        if ctx.momentum is not None:
            # Its running statistics are each rank's own where sync_batchnorm is off; so are the parts of a sharded one.
            parts = {n: p for n, p in ctx.momentum.model.named_parameters() if not isinstance(p, DTensor)}
            copies["momentum encoder"] = {"updates": torch.tensor(ctx.momentum.updates), **parts}
        copies |= {"queue": ctx.queue.state_dict()} if ctx.queue else {}
        sums = {name: _sums(state) for name, state in copies.items()}
        gathered = self.backend.world.gather_objects((sums, self.head))
        everyone = [found for found, _ in gathered]
        for name in copies:
            others = [rank for rank, found in enumerate(everyone) if not _close(found[name], everyone[0][name])]
            if others:
                error = RankLostError(
                    f"{self.phase.name}: the {name} of rank {others[0]} is not that of rank 0; nothing is saved; start "
                    "the run again from the last checkpoint."
                )
                error.agreed = True
                raise error
        return [head for _, head in gathered]

    def _save(self, step: int, heads: list[str]) -> None:
        ctx = self.ctx
        extras = {f"queue.{k}": v for k, v in ctx.queue.state_dict().items()} if ctx.queue else {}
        extras |= {f"method.{k}": v for k, v in self.phase.method.state_dict().items()}
        facts = {
            "phase": self.phase.name,
            "digest": self.phase.digest,
            "backend": ctx.cfg.backend,
            "world": ctx.world,
            "images_per_rank": ctx.images,
            "seconds": self.elapsed,
            "attempt": self.attempt,
            "started": self.started,
            "ranks": heads,
        }
        self.saver.save(step, extras, facts, ctx.momentum.model if ctx.momentum else None)
        self.saved = step

    def _restore(self, checkpoint: Checkpoint | None) -> int:
        if checkpoint is None:
            return 0
        facts, ctx = checkpoint.facts, self.ctx
        if facts["digest"] != self.phase.digest:
            raise DataError(
                f"{checkpoint.folder} was written under another configuration (digest {facts['digest'][:12]}, now "
                f"{self.phase.digest[:12]}); resume with the settings in run.yaml or use a new folder."
            )
        state = read_state(checkpoint)

        def stored(prefix: str) -> dict[str, Stored]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        def part(prefix: str) -> dict[str, Tensor]:
            return {name: whole(value).clone() for name, value in stored(prefix).items()}

        self.backend.load_full_state(stored("model."))
        self.backend.load_optimizer_state(optimizer_state(checkpoint, state))
        if ctx.momentum is not None:
            self.backend.load_full_state(stored("momentum."), ctx.momentum.model)
        if ctx.queue is not None:
            ctx.queue.load_state_dict(part("queue."))
        self.phase.method.load_state_dict(part("method."))
        ctx.images = facts["images_per_rank"]
        self.elapsed = facts["seconds"]
        self.attempt = facts["attempt"] + 1
        self.started = facts["started"]
        self.saved = checkpoint.step
        heads = facts["ranks"]  # of other processes: a new one each, from all of them
        self.head = heads[ctx.rank] if len(heads) == ctx.world else _digest([heads, ctx.rank])
        self.saver.resumed(checkpoint.step)
        self.telemetry.note(self.phase.name, f"goes on from step {checkpoint.step} (attempt {self.attempt})")
        return checkpoint.step
