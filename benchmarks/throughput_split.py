"""Where the time of a step goes: timers around the package's own functions, each moment counted once.

The innermost timer counts, with one exception: all of the constraint's own forwards and views are the constraint's, in
which only communication is told apart. What is left of a step (ledger, metrics, checks) is "other".

Communication is what this process waits for in collectives called from Python, within forward and backward too. DDP
averages gradients in C++ beside the backward; what of that the backward waits for is taken from DDP's own log.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from distunlearn.config.registry import EVALUATOR, OBJECTIVE, find
from distunlearn.data.loading.stream import Batches
from distunlearn.distributed import collectives
from distunlearn.encoders.model import ContrastiveModel, MomentumEncoder
from distunlearn.engine.backends import Backend
from distunlearn.methods import third_party, training
from distunlearn.objectives import forward

__all__ = ["PARTS", "Split"]

PARTS = ("data", "views", "forward", "backward", "constraint", "communication", "optimizer", "other")
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor",
    "reduce_scatter_single", "reduce_scatter", "reduce", "broadcast", "all_gather_object", "barrier",
    "all_to_all_single", "batch_isend_irecv",
)  # fmt: skip


class Split:
    """Exclusive seconds by part since the last `take`; `install` patches the functions for the life of the process.

    waits: at both ends of every part, for what the GPU has still to do.
    """

    def __init__(self) -> None:
        self.waits = False
        self.seconds: Counter[str] = Counter()
        self._stack: list[list[Any]] = []  # [part, start, seconds of inner timers]
        self._ddp: DistributedDataParallel | None = None

    def install(self, backend: Backend) -> None:
        patch = self._patch
        patch(Batches, "at", "data")
        patch(forward, "make_view", "views")
        patch(ContrastiveModel, "forward", "forward")
        patch(MomentumEncoder, "__call__", "forward")
        patch(training, "task_loss", "forward")
        patch(third_party, "embed", "forward")  # of the retained images; the others go through the evaluator
        objectives = {kind for name in OBJECTIVE.table for kind in find(OBJECTIVE, name).__mro__}
        for kind in objectives:
            if "task_loss" in vars(kind):
                patch(kind, "task_loss", "forward")
        for kind in (find(EVALUATOR, name) for name in EVALUATOR.table):
            if "constrain" in vars(kind):
                patch(kind, "constrain", "constraint")
        patch(third_party.ThirdParty, "loss", "constraint")
        for kind in type(backend).__mro__[:-1]:
            for name, part in (("backward", "backward"), ("step", "optimizer"), ("grad_norm", "optimizer"),
                               ("update_momentum", "optimizer")):  # fmt: skip
                if name in vars(kind):
                    patch(kind, name, part)
        for name in COLLECTIVES:
            if hasattr(dist, name):
                patch(dist, name, "communication")
        patch(collectives, "_all_gather_flat", "communication")
        patch(dist.Work, "wait", "communication")
        created = DistributedDataParallel.__init__

        def note(module: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
            created(module, *args, **kwargs)
            module._set_ddp_runtime_logging_sample_rate(1)
            self._ddp = module

        DistributedDataParallel.__init__ = note

    def _patch(self, owner: Any, name: str, part: str) -> None:
        setattr(owner, name, self._timed(getattr(owner, name), part))

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            inside = bool(self._stack) and self._stack[-1][3]
            sticky = inside or (part == "constraint" and any(frame[0] == "constraint" for frame in self._stack))
            own = "constraint" if inside and part != "communication" else part
            if self.waits:
                torch.cuda.synchronize()
            self._stack.append([own, time.perf_counter(), 0.0, sticky])
            try:
                return function(*args, **kwargs)
            finally:
                if self.waits:
                    torch.cuda.synchronize()
                own, start, inner, _ = self._stack.pop()
                passed = time.perf_counter() - start
                self.seconds[own] += passed - inner
                if self._stack:
                    self._stack[-1][2] += passed

        return timed

    def take(self, total: float) -> dict[str, float]:
        """The parts of a step of `total` seconds; starts anew."""
        found = {part: self.seconds[part] for part in PARTS[:-1]}
        self.seconds.clear()
        if self._ddp is not None:
            log = self._ddp._get_ddp_logging_data()
            exposed = log.get("backward_comm_time", 0) - log.get("backward_compute_comm_overlap_time", 0)
            moved = min(max(0.0, exposed / 1e9), found["backward"])
            found["backward"] -= moved
            found["communication"] += moved
        found["other"] = max(0.0, total - sum(found.values()))
        return found
