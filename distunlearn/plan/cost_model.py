"""What a training step costs: time of computing and of collectives, by a model of a few measured parameters.

    T = F / rate + V / sweep + fixed + G hook + S / copy + sum over collectives of T_c

F: floating point operations of this process; V: bytes of weights that its optimizer sweeps over; G: how often a backend
that shards weights gathers a unit or scatters its gradient, each with Python of its own; S: bytes of weights that a
backend that shards anything lays out anew for it. G and S are 0 for `single` and `ddp`. For M bytes over W processes,
each with a link of latency a and bandwidth b (Thakur, Rabenseifner and Gropp, "Optimization of collective communication
operations in MPICH", 2005, for the volumes; latency as of a tree):

    all-gather, reduce-scatter   ceil(log2 W) a + (W - 1) / W M / b          M: the whole, gathered tensor
    all-reduce                   twice that

Nothing overlaps: where it does, an estimate is too slow. T is linear in (1 / rate, 1 / sweep, fixed, hook, 1 / copy, a,
1 / b), so that these are fitted by least squares of relative errors, none below 0. Which collectives a backend runs:

    ddp     all-reduce of the gradients, in buckets of 25 MB
    zero1   all-reduce of the gradients, all-gather of the weights
    zero2   reduce-scatter of the gradients, all-gather of the weights
    fsdp2   all-gather of the weights for every forward and backward, reduce-scatter of the gradients, unit by unit
    zero3   the same
    besides the momentum encoder's gather under fsdp2 and zero3, the objective's embeddings (all-gather; all-reduce in
    the backward), and two small collectives for every batch norm and forward

Shapes and units: bytes, seconds, operations per second; a multiply-add is two operations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["BACKENDS", "Call", "Machine", "Measured", "Work", "collective_time", "collectives", "fit", "leave_one_out",
           "step_time"]  # fmt: skip

BACKENDS = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
BUCKET = 25 << 20  # bytes of gradients that DDP sends at a time
SMALL = 4096  # bytes: a batch norm's statistics; latency is what they cost


@dataclass(frozen=True)
class Work:
    """One step of one process. flops: by kind of encoder, so that each kind has its own rate.

    weights: bytes, float32, trained. units: parts that fsdp2 and zero3 gather one by one. forwards: passes with
    gradients through the encoder. batchnorms: batch norms that a forward synchronises. embeddings: bytes of the
    gathered embeddings of all processes. momentum: bytes of a momentum encoder's weights, 0 without one.
    """

    flops: Mapping[str, float]
    weights: float
    units: int = 1
    forwards: int = 1
    batchnorms: int = 0
    embeddings: float = 0.0
    momentum: float = 0.0


@dataclass(frozen=True)
class Call:
    """`count` collectives over `size` bytes each: all_reduce, all_gather or reduce_scatter."""

    kind: str
    size: float
    count: int = 1


@dataclass(frozen=True)
class Machine:
    """rate: operations/s by kind of encoder. sweep, bandwidth, copy: bytes/s. latency, fixed, hook: seconds."""

    rate: Mapping[str, float]
    sweep: float
    fixed: float
    latency: float
    bandwidth: float
    hook: float = 0.0
    copy: float = math.inf


@dataclass(frozen=True)
class Measured:
    """A step that was timed."""

    work: Work
    backend: str
    world: int
    seconds: float


def collectives(work: Work, backend: str, world: int) -> list[Call]:
    """The collectives of one step; see the module's text."""
    assert backend in BACKENDS, backend
    if world == 1:
        return []
    calls = []
    if backend == "ddp":
        buckets = max(1, math.ceil(work.weights / BUCKET))
        calls.append(Call("all_reduce", work.weights / buckets, buckets))
    elif backend in ("zero1", "zero2"):
        calls.append(Call("all_reduce" if backend == "zero1" else "reduce_scatter", work.weights))
        calls.append(Call("all_gather", work.weights))
    elif backend in ("fsdp2", "zero3"):
        part = work.weights / work.units
        calls.append(Call("all_gather", part, 2 * work.units * work.forwards))
        calls.append(Call("reduce_scatter", part, work.units))
        if work.momentum:
            calls.append(Call("all_gather", work.momentum / work.units, work.units))
    if work.embeddings:
        calls += [Call("all_gather", work.embeddings), Call("all_reduce", work.embeddings)]
    if work.batchnorms:
        norms = work.batchnorms * work.forwards
        calls += [Call("all_gather", SMALL, norms), Call("all_reduce", SMALL, norms)]
    return calls


def _latencies(call: Call, world: int) -> float:
    """How many latencies a call costs in all."""
    return call.count * math.ceil(math.log2(world)) * (2 if call.kind == "all_reduce" else 1)


def _sent(call: Call, world: int) -> float:
    """Bytes that pass a process's link."""
    return call.count * call.size * (world - 1) / world * (2 if call.kind == "all_reduce" else 1)


def collective_time(call: Call, world: int, machine: Machine) -> float:
    """Seconds."""
    return _latencies(call, world) * machine.latency + _sent(call, world) / machine.bandwidth


def _swept(work: Work, backend: str, world: int) -> float:
    """Bytes of weights that this process's optimizer (and momentum encoder, which is whole everywhere) goes over."""
    return work.weights / (1 if backend in ("single", "ddp") else world) + work.momentum


def _gathers(work: Work, backend: str, world: int) -> int:
    """How often a unit's weights are gathered or its gradient is scattered."""
    return work.units * (2 * work.forwards + 1) if world > 1 and backend in ("fsdp2", "zero3") else 0


def _laid_out(work: Work, backend: str, world: int) -> float:
    """Bytes of weights that the backend copies into buffers of its own and back."""
    return work.weights if world > 1 and backend not in ("single", "ddp") else 0.0


def step_time(work: Work, backend: str, world: int, machine: Machine) -> dict[str, float]:
    """Seconds of a step: compute, optimizer, sharding, communication, fixed, total."""
    parts = {
        "compute": sum(flops / machine.rate[kind] for kind, flops in work.flops.items()),
        "optimizer": _swept(work, backend, world) / machine.sweep,
        "sharding": _gathers(work, backend, world) * machine.hook + _laid_out(work, backend, world) / machine.copy,
        "communication": sum(collective_time(call, world, machine) for call in collectives(work, backend, world)),
        "fixed": machine.fixed,
    }
    return {**parts, "total": sum(parts.values())}


def _row(point: Measured, kinds: Sequence[str]) -> list[float]:
    """Coefficients of (1 / rate of every kind, 1 / sweep, fixed, latency, 1 / bandwidth, hook, 1 / copy)."""
    calls = collectives(point.work, point.backend, point.world)
    return [
        *(point.work.flops.get(kind, 0.0) for kind in kinds),
        _swept(point.work, point.backend, point.world),
        1.0,
        sum(_latencies(call, point.world) for call in calls),
        sum(_sent(call, point.world) for call in calls),
        _gathers(point.work, point.backend, point.world),
        _laid_out(point.work, point.backend, point.world),
    ]


def fit(points: Sequence[Measured]) -> Machine:
    """The parameters that fit the measured steps best, by the sum of squared relative errors, none below 0.

    A parameter that the points say nothing of, or that is best at 0, costs nothing (an infinite rate or bandwidth).

    Raises:
        ValueError: no points, or a time that is not positive.
    """
    from scipy.optimize import nnls

    if not points or any(not point.seconds > 0 for point in points):
        raise ValueError("a fit needs measured steps, each of a time above 0")
    kinds = sorted({kind for point in points for kind in point.work.flops})
    rows = np.array([_row(point, kinds) for point in points]) / np.array([[point.seconds] for point in points])
    scale = np.abs(rows).max(0)
    scale[scale == 0] = 1.0
    found = nnls(rows / scale, np.ones(len(points)))[0] / scale

    def speed(inverse: float) -> float:
        return 1 / inverse if inverse > 0 else math.inf

    *rates, sweep, fixed, latency, inverse_bandwidth, hook, inverse_copy = found.tolist()
    return Machine(
        {kind: speed(rate) for kind, rate in zip(kinds, rates, strict=True)}, speed(sweep), fixed, latency,
        speed(inverse_bandwidth), hook, speed(inverse_copy),
    )  # fmt: skip


def leave_one_out(points: Sequence[Measured]) -> list[float]:
    """predicted / measured - 1 of every point, by the fit to all others."""
    found = []
    for index, point in enumerate(points):
        machine = fit([*points[:index], *points[index + 1 :]])
        found.append(step_time(point.work, point.backend, point.world, machine)["total"] / point.seconds - 1)
    return found
