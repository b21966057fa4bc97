"""How the processes of a run find one another: fast, and with the name of the variable that is wrong.

Nobody waits longer than `join_s` for the others. What is wrong on this machine is found before: a variable that is
missing or impossible, an address that has no number. What contradicts the other processes is found in the store where
they meet: a rank that is taken, another WORLD_SIZE.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from distunlearn.errors import LaunchError, RankLostError

ORPHANED = 600.0  # seconds for a process whose launcher is gone to stop by itself
ADVICE = "start the processes by torchrun or `accelerate launch`, or export all of these variables"


def number(name: str, default: int) -> int:
    """The whole number in the variable `name`.

    Raises:
        LaunchError: it holds something else.
    """
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise LaunchError(f"the variable {name} is {text!r}, expected a whole number; unset it or use torchrun.")
    return int(text)


def meet(world: int, needs_local_rank: bool, patience: timedelta) -> tuple[dist.Store, int]:
    """The store in which all processes of the run have met, and this one's rank.

    Raises:
        LaunchError: a variable is missing, impossible, or contradicts another process.
        RankLostError: not all came within `patience`.
    """
    needed = ["RANK", "MASTER_ADDR", "MASTER_PORT", *(["LOCAL_RANK"] if needs_local_rank else [])]
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise LaunchError(f"WORLD_SIZE is {world}, but {', '.join(missing)} is not set; {ADVICE}.")
    rank = number("RANK", 0)
    if rank >= world:
        raise LaunchError(f"RANK is {rank}, expected less than WORLD_SIZE={world}; correct the variables.")
    place = _address()
    try:
        store, _, _ = next(rendezvous("env://", rank, world, timeout=patience))
        _compare(store, rank, world)
    except (dist.DistError, TimeoutError, RuntimeError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise LaunchError(
                f"MASTER_PORT is {os.environ['MASTER_PORT']}, which another program uses; choose another one, or use "
                "torchrun --standalone."
            ) from error
        raise RankLostError(
            f"rank {rank} of {world} did not find the others at {place} within {patience.total_seconds():g} s; check "
            f"that {world} processes run, each with its own RANK, all with the same WORLD_SIZE, MASTER_ADDR and "
            "MASTER_PORT, and reach this address."
        ) from error
    return store, rank


def _address() -> str:
    name, port = os.environ["MASTER_ADDR"], number("MASTER_PORT", 0)
    if not 0 < port < 1 << 16:  # at port 0 every process would look for the others at a port of nobody
        raise LaunchError(
            f"MASTER_PORT is {port}, expected a port number below 65536; use torchrun --standalone, which chooses a "
            "free one, or --master_port with a number."
        )
    try:
        socket.getaddrinfo(name, port)
    except (OSError, UnicodeError) as error:
        raise LaunchError(
            f"MASTER_ADDR is {name!r}, which has no address on this machine ({error}); set it to the name of the node "
            "of rank 0."
        ) from error
    return f"{name}:{port}"


def _compare(store: dist.Store, rank: int, world: int) -> None:
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store may outlive an attempt
    seats = dist.PrefixStore(f"distunlearn/{attempt}", store)
    if seats.add(f"rank {rank}", 1) > 1:
        raise LaunchError(f"RANK is {rank} in two processes; give every process a rank of its own.")
    if rank == 0:
        seats.set("world", str(world))
    announced = int(seats.get("world"))
    if announced != world:
        raise LaunchError(
            f"WORLD_SIZE is {world} for rank {rank} and {announced} for rank 0; set the same in all processes."
        )
    seats.set(f"joined {rank}", "")
    seats.wait([f"joined {other}" for other in range(world)])  # nobody connects to one that has refused


def watch_launcher() -> None:
    """A process that torchrun started asks itself to stop when torchrun is gone, and ends if it cannot stop."""
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ and parent != 1:
        threading.Thread(target=_wait_for_end, args=(parent, _ask_to_stop), name="launcher", daemon=True).start()


def _wait_for_end(parent: int, then: Callable[[], None]) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    then()


def _ask_to_stop() -> None:
    print("the launcher of this process is gone; it stops", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHANED)
    os._exit(RankLostError.exit_code)
