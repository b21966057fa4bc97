"""How the processes of a run find one another: fast, and with the name of the variable that is wrong.

What travels is plain data (see `plain_data`), and a token of the launch keeps processes of others out; the tensors
themselves are not protected: the network between the machines is taken to be the cluster's own. Nobody waits longer
than `join_s` for the others. What is wrong on this machine is found before: a variable that is
missing or impossible, an address that has no number. What contradicts the other processes is found in the store where
they meet: a rank that is taken, another WORLD_SIZE.
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import json
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from distunlearn.common.launcher import number
from distunlearn.errors import LaunchError, RankLostError

TOKEN = "DISTUNLEARN_LAUNCH_TOKEN"  # of one launch, the same in all its processes and nobody else's
MEETING = "distunlearn/meeting"
ORPHANED = 600.0  # seconds for a process whose launcher is gone to stop by itself
ADVICE = "start the processes by torchrun or `accelerate launch`, or export all of these variables"


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
        store = _compare(_store(rank, patience), rank, world, patience, os.environ.get(TOKEN, ""))
    except (dist.DistError, OSError, RuntimeError) as error:
        if getattr(error, "errno", 0) == errno.EADDRINUSE or re.search("EADDRINUSE|address already in use", str(error)):
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


def _store(rank: int, patience: timedelta) -> dist.Store:
    """The store at MASTER_ADDR: that of torchrun's agent, or one that the main rank opens.

    On an address of this machine alone nobody else is listened to.
    """
    host, port = os.environ["MASTER_ADDR"], number("MASTER_PORT", 0)
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    options: dict[str, Any] = {"is_master": serves, "timeout": patience, "wait_for_workers": False}
    bound = _loopback(host, port) if serves else None
    if bound is not None:
        options["master_listen_fd"] = bound.detach()
    return dist.TCPStore(host, port, **options)


def _loopback(host: str, port: int) -> socket.socket | None:
    """A socket at an address that only this machine reaches; None: other machines are meant."""
    family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if not ipaddress.ip_address(place[0]).is_loopback:
        return None
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(place)
        bound.listen(1024)
    except BaseException:
        bound.close()
        raise
    return bound


def _compare(store: dist.Store, rank: int, world: int, patience: timedelta, token: str) -> dist.Store:
    """Meet the others; returns the store of this meeting.

    The main rank opens a meeting under a name of its own, for a store may outlive an attempt, and torchrun's agents
    count their attempts each for itself. Every rank brings a number of its own, and proves by it that it knows the
    token of the launch, if there is one. The meeting begins when the main rank has heard all others.
    """
    nonce = secrets.token_hex(16)
    if rank == 0:
        store.set(MEETING, nonce)
    end = time.monotonic() + patience.total_seconds()
    seen = ""
    while True:
        meeting = store.get(MEETING).decode()
        here = dist.PrefixStore(f"distunlearn/{meeting}", store)
        if meeting != seen:
            seen = meeting
            _take_seat(here, rank, world, nonce, token)
        if rank == 0:
            here.wait([f"seat {other}" for other in range(world)])
            here.set("seats", json.dumps([here.get(f"seat {other}").decode() for other in range(world)]))
        if here.check(["seats"]):
            seats = json.loads(here.get("seats"))
            if seats[rank] == nonce:
                break
            if "TORCHELASTIC_RUN_ID" not in os.environ:
                raise LaunchError(f"RANK is {rank} in two processes; give every process a rank of its own.")
        if time.monotonic() > end:
            raise TimeoutError("the others did not come")
        time.sleep(0.02)
    _prove(here, rank, seats, token)
    return here


def _take_seat(here: dist.Store, rank: int, world: int, nonce: str, token: str) -> None:
    if "TORCHELASTIC_RUN_ID" not in os.environ and here.add(f"taken {rank}", 1) > 1:
        raise LaunchError(f"RANK is {rank} in two processes; give every process a rank of its own.")
    if rank == 0:
        here.set("world", str(world))
        here.set("token", str(bool(token)))
    announced = int(here.get("world"))
    if announced != world:
        raise LaunchError(
            f"WORLD_SIZE is {world} for rank {rank} and {announced} for rank 0; set the same in all processes."
        )
    if here.get("token").decode() != str(bool(token)):
        raise LaunchError(
            f"{TOKEN} is {'set' if token else 'not set'} for rank {rank} and not so for rank 0; set the same in all "
            "processes."
        )
    here.set(f"seat {rank}", nonce)


def _prove(here: dist.Store, rank: int, seats: list[str], token: str) -> None:
    """Every rank knows the token, shown over the numbers that all have brought; nobody says the token itself.

    Raises:
        LaunchError: one does not.
    """

    def proof(of: int) -> str:
        return hmac.digest(token.encode(), f"{of} {' '.join(seats)}".encode(), "sha256").hex()

    here.set(f"proof {rank}", proof(rank))
    here.wait([f"proof {other}" for other in range(len(seats))])
    told = [here.get(f"proof {other}") for other in range(len(seats))]
    strange = [other for other, found in enumerate(told) if not hmac.compare_digest(found, proof(other).encode())]
    if strange:
        raise LaunchError(
            f"rank {strange[0]} does not know the token of this launch ({TOKEN}): a process of another launch, or of "
            "somebody else, has taken its place; start all processes again with one token, on another MASTER_PORT."
        )


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
