"""Joining the processes that a launcher started: one process group per process, made once, destroyed at exit.

torchrun and `accelerate launch` set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT;
under srun the batch script exports them. Afterwards rank and world are those of torch.distributed, never the
variables' and never accelerate's (which calls every process of a CPU run the main one of a world of 1).
"""

from __future__ import annotations

import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from distunlearn.common.launcher import number
from distunlearn.common.malloc import keep_freed_memory
from distunlearn.common.openmp import sleep_when_idle
from distunlearn.config.schema import RunConfig
from distunlearn.distributed.rendezvous import meet, watch_launcher
from distunlearn.distributed.world import World
from distunlearn.errors import ConfigError, RankLostError

# What gloo says where another process has gone; it has no error class of its own.
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "Socket closed")

# How long a rank waits in a collective operation once all have met (before: `join_s`). Longer work, of the main rank
# alone or of each, has no limit (`meeting.py`); a process that dies is noticed at once, one that hangs in training by
# `engine/watchdog.py`.
WAIT_LIMIT = timedelta(hours=2)


def join(cfg: RunConfig) -> World:
    """Set the threads, enter the process group if there is one to enter, and say where this process stands.

    Raises:
        ConfigError, RankLostError: see `open_backend`.
    """
    world = number("WORLD_SIZE", 1)
    _set_threads(cfg.runtime.threads, number("LOCAL_WORLD_SIZE", world))
    if cfg.backend == "single" and world > 1:
        raise ConfigError(f"backend=single cannot use {world} processes; set backend=ddp or start one process.")
    _refuse_unannounced_tasks()
    device = _device(number("LOCAL_RANK", 0))
    if device.type == "cpu":
        keep_freed_memory()
        sleep_when_idle()
    if cfg.backend == "single" and not dist.is_initialized():
        return World(0, 1, device)
    if not dist.is_initialized():
        _enter(world, device, cfg.runtime.join_s)
    found = dist.get_world_size()
    if found != world:
        raise RankLostError(f"the process group has {found} processes, but WORLD_SIZE is {world}; start the run anew.")
    return World(dist.get_rank(), found, device)


def _set_threads(threads: int, local_world: int) -> None:
    """threads: of the settings; 0: what OMP_NUM_THREADS says, else a share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked == "1" and "TORCHELASTIC_RUN_ID" in os.environ:
        asked = ""  # torchrun sets it where nobody has
    share = int(asked) if asked.isdecimal() and int(asked) else max(1, cores // max(1, local_world))
    torch.set_num_threads(threads or share)


def _refuse_unannounced_tasks() -> None:
    """Several srun tasks without RANK would be as many runs in one folder, each believing itself alone."""
    tasks = number("SLURM_STEP_NUM_TASKS", 1)
    if tasks > 1 and "RANK" not in os.environ:
        raise ConfigError(
            f"srun started {tasks} tasks, but RANK is not set; start the tasks by torchrun, or export RANK, "
            "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in each."
        )


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU of its own ({torch.cuda.device_count()} visible); start "
            "as many processes as there are GPUs, or set CUDA_VISIBLE_DEVICES= to run on the CPU."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _enter(world: int, device: torch.device, join_s: float) -> None:
    name = "nccl" if device.type == "cuda" else "gloo"
    bound = device if device.type == "cuda" else None
    if world == 1:
        # A world of one needs no address: nobody else is to find it.
        dist.init_process_group(name, store=dist.HashStore(), rank=0, world_size=1, device_id=bound)
    else:
        store, rank = meet(world, needs_local_rank=device.type == "cuda", patience=timedelta(seconds=join_s))
        store.set_timeout(WAIT_LIMIT)
        try:
            dist.init_process_group(name, store=store, rank=rank, world_size=world, timeout=WAIT_LIMIT, device_id=bound)
        except (dist.DistError, TimeoutError) as error:
            raise RankLostError(
                f"rank {rank} of {world} did not connect to the others ({str(error).splitlines()[0]}); check that "
                "every process runs and that their machines reach one another."
            ) from error
    watch_launcher()
    atexit.register(_leave)


def wait_for_all() -> None:
    """Return once all processes of the run have come here; at once where there is one. Collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def lost_rank(error: BaseException) -> str | None:
    """A sentence for an error that another process's end caused in a collective operation; None: another error."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    chain: BaseException | None = error
    while chain is not None:
        text = str(chain)
        if isinstance(chain, dist.DistError) or ("gloo" in text and any(sign in text for sign in GONE)):
            return (
                f"rank {dist.get_rank()} of {dist.get_world_size()} lost another one, which ended or no longer "
                "answers; see what that rank said first; the same command goes on from the last checkpoint."
            )
        chain = chain.__cause__ or chain.__context__
    return None


def _leave() -> None:
    """Without this torch warns at exit, and NCCL may hang."""
    if dist.is_initialized():
        dist.destroy_process_group()
