"""What one step of a run asks of the network and of the host, counted: collectives, bytes, objects, blocking reads.

    python benchmarks/scaling.py --cells vit12:fsdp2:sketch resnet50:ddp:head --worlds 8 64 1024 4096

The training loop's own step runs as rank 0 of W processes, in torch's fake process group: every rank is taken to hold
what this one holds. Nothing is timed, so counts are exact and the same on every machine. With `--hollow` tensors have
no values, so that encoders of real size fit. GPUs: not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distunlearn.config.registry import EVALUATOR, METHOD, OBJECTIVE, fitting
from distunlearn.config.schema import EncoderConfig, PretrainConfig, RunConfig, RuntimeConfig, UnlearnConfig
from distunlearn.data.schedule import Batch
from distunlearn.distributed.world import World
from distunlearn.encoders.model import MomentumEncoder, build_model
from distunlearn.engine import loop
from distunlearn.engine.backends import Backend, ddp, fsdp2, open_backend
from distunlearn.engine.optimizer import make_optimizer
from distunlearn.methods.base import Method, method_class
from distunlearn.methods.training import Pretrain
from distunlearn.objectives import KeyQueue, make_objective
from distunlearn.objectives.forward import Context
from distunlearn.plan.dry_run import LiveBytes

__all__ = ["Step", "count_step", "counting", "fake_group"]

SMALL = {"patch_size": 8, "embed_dim": 48, "depth": 12, "num_heads": 2, "class_token": False, "global_pool": "avg"}
ENCODERS = {
    "vit12": EncoderConfig(name="vit_tiny_patch16_224", image_size=32, in_chans=3, stem="standard", args=SMALL),
    "resnet50": EncoderConfig(name="resnet50", image_size=32, in_chans=3, stem="standard"),
    "resnet50_224": EncoderConfig(name="resnet50", image_size=224, in_chans=3, stem="standard"),
    "vit_base": EncoderConfig(name="vit_base_patch16_224", image_size=224, in_chans=3, stem="standard"),
    "vit_large": EncoderConfig(name="vit_large_patch16_224", image_size=224, in_chans=3, stem="standard"),
    "vit_giant": EncoderConfig(name="vit_giant_patch14_224", image_size=224, in_chans=3, stem="standard"),
}
IMAGES = 2  # of each role, on each rank
READS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__")
BEFORE_BACKWARD = ("data", "loss")
KINDS = {
    "allgather": "all_gather", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce", "all_reduce": "all_reduce", "broadcast": "broadcast", "reduce": "reduce",
}  # fmt: skip


@dataclass
class Step:
    """Counts of one step by place of the loop. bytes: of what a collective gives this rank. peak_bytes: alive at once.

    weights: of the encoder, over all ranks. momentum_weights: of the momentum encoder, on this one; momentum_rows: one
    row of each of its weights. collectives, sizes: by (place, kind). reads: blocking ones, by place. objects: exchanges
    of plain data, by place. phi: differences of two coordinates that the distances of the constraint take on this rank.
    """

    collectives: Counter = field(default_factory=Counter)
    sizes: Counter = field(default_factory=Counter)
    reads: Counter = field(default_factory=Counter)
    objects: Counter = field(default_factory=Counter)
    weights: int = 0
    momentum_weights: int = 0
    momentum_rows: int = 0
    peak_bytes: int = 0
    phi: int = 0

    def total(self, what: str = "collectives", *, places: tuple[str, ...] = (), kind: str = "") -> int:
        """Sum over these places (none named: all) and kinds."""
        found: Mapping[Any, int] = getattr(self, what)
        split = {key if isinstance(key, tuple) else (key, ""): count for key, count in found.items()}
        return sum(n for (p, k), n in split.items() if (not places or p in places) and kind in ("", k))


class _Collectives(TorchDispatchMode):
    """Collectives, pairs of the distances, and in `made` the storages that operations wrote to."""

    def __init__(self, step: Step, at: list[str]) -> None:
        super().__init__()
        self.step, self.at, self.made = step, at, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1].strip("_")
            kind = next((k for start, k in KINDS.items() if start in name), None)
            if kind is not None:
                self.step.collectives[self.at[0], kind] += 1
                result = found if func.namespace == "_c10d_functional" else args[0]
                tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
                self.step.sizes[self.at[0], kind] += sum(t.numel() * t.element_size() for t in tensors)
        if func is torch.ops.aten._cdist_forward.default:
            self.step.phi += found.numel() * args[0].shape[-1]
        self.made.update(t.untyped_storage()._cdata for t in tree_leaves(found) if isinstance(t, Tensor))
        return found


class _Reads(TorchFunctionMode):
    """Reads, by the host, of values that this step made: for them it waits. One of an earlier step is there."""

    def __init__(self, step: Step, at: list[str], made: set[int]) -> None:
        super().__init__()
        self.step, self.at, self.made = step, at, made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS and args and isinstance(args[0], Tensor):
            self.step.reads[self.at[0]] += args[0].untyped_storage()._cdata in self.made
        return func(*args, **(kwargs or {}))


def _ids(role: str, count: int) -> list[str]:
    return [f"{role}{row}" for row in range(count)]


def _batch(cfg: RunConfig, role: str, count: int) -> Batch:
    size, channels = cfg.encoder.image_size, cfg.encoder.in_chans

    def cut(ids: Any, epochs: np.ndarray, views: Any) -> Tensor:
        return torch.randint(0, 256, (len(ids), len(views), channels, size, size), dtype=torch.uint8)

    epochs, sizes = np.zeros(count, dtype=np.int64), (count,) * dist.get_world_size()
    return Batch(_ids(role, count), epochs, torch.arange(count) % 2, cut, sizes=sizes)


@contextlib.contextmanager
def fake_group(world: int) -> Iterator[None]:
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": "1"}
    with mock.patch.dict(os.environ, {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        try:
            yield
        finally:
            dist.destroy_process_group()


def _mesh_made_before(world: int) -> Any:
    """A mesh reads numbers of its own, which a tensor without values has not."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
    return mock.patch.object(fsdp2, "init_device_mesh", lambda *a, **k: mesh)


def configuration(
    encoder: str, backend: str, evaluator: str, world: int, objective: str = "mocov3", **other: Any
) -> RunConfig:
    """evaluator: or "pretrain". other: settings of the top level."""
    batch = IMAGES * world
    return RunConfig(
        encoder=ENCODERS[encoder], backend=backend, runtime=RuntimeConfig(threads=1),
        objective=fitting(OBJECTIVE, objective, hidden_dim=64, output_dim=32),
        pretrain=PretrainConfig(batch=batch), method=fitting(METHOD, "third_party"),
        unlearn=UnlearnConfig(retain_batch=batch, forget_batch=batch, third_party_batch=batch),
        constraint=fitting(EVALUATOR, "head" if evaluator == "pretrain" else evaluator, check_every=1000), **other,
    )  # fmt: skip


def count_step(cfg: RunConfig, world: int, *, pretrain: bool = False, hollow: bool = False) -> Step:
    """The second step of a phase: the first one checks more."""
    step, at = Step(), ["start"]
    fake = FakeTensorMode(allow_non_fake_inputs=True) if hollow else contextlib.nullcontext()
    live = LiveBytes() if hollow else contextlib.nullcontext()
    going = _without_values(live, cfg.backend == "zero3") if isinstance(live, LiveBytes) else contextlib.nullcontext()
    with fake_group(world), _mesh_made_before(world), fake, live, going:
        runner = _runner(cfg, Pretrain(cfg) if pretrain else method_class(cfg)(cfg), at)
        runner._step(1)
        with counting(step, at):
            runner._step(2)
        step.weights = runner.backend.num_weights
        for weight in runner.ctx.momentum.model.parameters() if runner.ctx.momentum else ():
            step.momentum_weights += (weight.to_local() if isinstance(weight, DTensor) else weight).numel()
            step.momentum_rows += weight[:1].numel() if not isinstance(weight, DTensor) else weight.shape[1:].numel()
        step.peak_bytes = getattr(live, "peak", 0)
        runner.backend.release()
    return step


@contextlib.contextmanager
def _without_values(live: LiveBytes, zero3: bool) -> Iterator[None]:
    """What asks tensors for values, or where they lie, goes without: nothing is tested for being finite or equal on all
    ranks, nothing moves, and DDP's reducer, which is compiled, is `_HollowDDP`. Storages that fsdp2 empties are seen.
    """
    checked = "deepspeed.runtime.zero.{}.assert_ints_same_as_other_ranks"
    with contextlib.ExitStack() as stack:
        for where in ("partition_parameters", "partitioned_param_coordinator", "stage3") if zero3 else ():
            stack.enter_context(mock.patch(checked.format(where), lambda ints: None))
        for name in ("alloc_storage", "free_storage"):
            right = getattr(_fsdp_param, name)
            stack.enter_context(mock.patch.object(_fsdp_param, name, functools.partial(_seen_by, live, right)))
        stack.enter_context(mock.patch.object(World, "finite_and_sum", lambda *a: (True, 0)))
        stack.enter_context(mock.patch.object(nn.Module, "to", lambda module, *a, **k: module))
        stack.enter_context(mock.patch.object(ddp, "DDP", _HollowDDP))
        yield


def _seen_by(live: LiveBytes, resize: Callable[[Tensor], None], tensor: Tensor) -> None:
    resize(tensor)
    live.see(tensor)


class _HollowDDP(Backend):
    """Whole weights, and what torch's reducer holds and sends for them: a bucket of gradients after the other."""

    def _wrap(self) -> Callable[[Tensor], Any]:
        weights = [p for p in self.model.parameters() if p.requires_grad][::-1]
        parts, _ = dist._compute_bucket_assignment_by_size(weights, [2**20, 25 * 2**20], [False] * len(weights))
        self.buckets = [torch.empty(sum(weights[row].numel() for row in part)) for part in parts]
        return self.model

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        for bucket in self.buckets:
            dist.all_reduce(bucket)


@contextlib.contextmanager
def counting(step: Step, at: list[str]) -> Iterator[None]:
    """Within it everything is counted, at the place that `at` names."""
    right = World.gather_objects

    def counted(self: World, value: Any) -> list[Any]:
        step.objects[at[0]] += 1
        return right(self, value)

    collectives = _Collectives(step, at)
    with mock.patch.object(World, "gather_objects", counted), collectives, _Reads(step, at, collectives.made):
        yield


def _summed(_, bucket):  # without annotations, which torch would check
    dist.all_reduce(bucket.buffer())
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _momentum(cfg: RunConfig) -> MomentumEncoder:
    """Built anew: tensors without values cannot be copied."""
    made = object.__new__(MomentumEncoder)
    made.model, made.updates = build_model(cfg, None).requires_grad_(False), 0
    made.model.predictor = None
    return made


def _runner(cfg: RunConfig, method: Method, at: list[str]) -> Any:
    """The loop's runner without a run directory: batches, ledger and telemetry take part in name only."""
    backend, objective = open_backend(cfg), make_objective(cfg.objective)
    optim = cfg.unlearn if method.steps == "unlearn" else cfg.pretrain
    model = build_model(cfg, None)
    momentum = _momentum(cfg) if objective.needs_momentum else None
    forward = backend.prepare(model, make_optimizer(optim, model), clip=optim.clip)
    if momentum is not None:
        backend.follow(momentum)
    if hasattr(forward, "register_comm_hook"):  # the fake group's all-reduce has no result, which DDP wants
        forward.register_comm_hook(None, _summed)
    ctx = Context(
        cfg=cfg, objective=objective, model=model, forward=forward, device=backend.device, momentum=momentum,
        queue=KeyQueue(cfg.objective.queue_size, cfg.objective.output_dim) if objective.uses_queue else None,
        world=backend.world.size, plain_forward=backend.plain_forward(),
    )  # fmt: skip
    method.calibrate(ctx, lambda role: _batch(cfg, role, 8))
    names = list(method.batch_sizes())
    batches = SimpleNamespace(at=lambda draw: {name: _batch(cfg, name, IMAGES) for name in names})

    def mark(place: str, *_: Any, **__: Any) -> None:
        at[0] = place

    nothing = SimpleNamespace(step=lambda *a: None, note=lambda *a: None)
    feeders = {
        name: SimpleNamespace(ids_by_rank=lambda draw, w, name=name: [_ids(name, IMAGES)] + [[]] * (w - 1))
        for name in names
    }
    phase = loop.Phase("count", Path(), 10, optim, method, feeders, lambda role: None, frozenset(), "")
    watch = SimpleNamespace(at=mark, count=0)
    return loop._Runner(phase, ctx, backend, nothing, nothing, None, watch, None, batches)


def cell(name: str, world: int, hollow: bool) -> list[str]:
    """A row of the table; name: ENCODER:BACKEND:EVALUATOR, "pretrain" in place of an evaluator; and ":own" where every
    rank has batch statistics of its own, which need no collective."""
    encoder, backend, evaluator, *own = name.split(":")
    cfg = configuration(encoder, backend, evaluator, world, sync_batchnorm=not own)
    found = count_step(cfg, world, pretrain=evaluator == "pretrain", hollow=hollow)
    numbers = [
        world, *(found.total(kind=kind) for kind in dict.fromkeys(KINDS.values())),
        found.total(places=("momentum encoder",)), found.total("objects"),
        found.total("reads", places=BEFORE_BACKWARD), found.total("reads"),
    ]  # fmt: skip
    alive = f"{found.peak_bytes / 2**30:.2f}" if hollow else ""
    return [
        name.replace(":", " "),
        *map(str, numbers),
        f"{found.total('sizes') / 2**20:.1f}",
        f"{found.phi / 1e6:.2f}",
        alive,
    ]


HEADER = ["step", "W", *dict.fromkeys(KINDS.values()), "of them momentum", "objects", "reads before the backward",
          "reads", "MiB received", "M differences of Phi", "GiB alive"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", default=["vit12:fsdp2:pretrain", "vit12:fsdp2:head", "vit12:fsdp2:sketch",
                        "resnet50:ddp:head"], metavar="ENCODER:BACKEND:EVALUATOR[:own]")  # fmt: skip
    parser.add_argument("--worlds", nargs="+", type=int, default=[2])
    parser.add_argument("--hollow", action="store_true", help="tensors without values, and the memory they would take")
    args = parser.parse_args()
    print("\n".join(f"| {' | '.join(row)} |" for row in (HEADER, ["---"] * len(HEADER))))
    for name in args.cells:
        for world in args.worlds:
            print(f"| {' | '.join(cell(name, world, args.hollow))} |", flush=True)


if __name__ == "__main__":
    main()
