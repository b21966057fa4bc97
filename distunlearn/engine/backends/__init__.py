"""Backends: how one training step is spread over processes. A method never knows which one runs it.

`single` one process; `ddp` whole copies (accelerate); `fsdp2` sharded weights (torch's fully_shard); `zero1`,
`zero2`, `zero3` sharded optimizer, gradients, weights (DeepSpeed). All of them average parameter gradients over
the processes, step and clip alike, and save the same checkpoints, so that a run may go on under another one.
"""

from __future__ import annotations

from distunlearn.config.schema import RunConfig
from distunlearn.distributed.process_group import join
from distunlearn.encoders.compile import require_compiler
from distunlearn.engine.backends.base import Backend
from distunlearn.errors import ConfigError

__all__ = ["Backend", "open_backend"]


def open_backend(cfg: RunConfig) -> Backend:
    """Set the CPU threads, join the processes of the launcher, and return the backend that `cfg` names.

    May be called once per verb: the process group is made by the first call and destroyed at exit.

    Raises:
        ConfigError: the launcher's variables are incomplete, a GPU, package or compiler is missing, or `single` was
            given several processes.
        RankLostError: the other processes did not come, or not all of them.
    """
    world = join(cfg)
    if cfg.runtime.compile:
        require_compiler()
    if cfg.backend == "single":
        return Backend(cfg, world)
    if cfg.backend == "ddp":
        from distunlearn.engine.backends.ddp import DDP

        return DDP(cfg, world)
    if cfg.backend == "fsdp2":
        from distunlearn.engine.backends.fsdp2 import FSDP2

        return FSDP2(cfg, world)
    if cfg.backend in ("zero1", "zero2", "zero3"):
        from distunlearn.engine.backends.zero import Zero

        return Zero(cfg, world, stage=int(cfg.backend[-1]))
    raise ConfigError(f"backend is {cfg.backend!r}; expected single, ddp, fsdp2, zero1, zero2 or zero3.")
