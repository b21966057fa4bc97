"""What a launcher (torchrun, accelerate launch, srun) said of this process, before a process group exists."""

from __future__ import annotations

import os

from distunlearn.errors import LaunchError


def announced_rank() -> int:
    """RANK of this process among the WORLD_SIZE that a launcher started; 0 where that is one process, or nonsense.

    A RANK without a WORLD_SIZE is left over from something else: whoever is alone speaks.
    """
    rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return int(rank) if rank.isdecimal() and world.isdecimal() and int(rank) < int(world) else 0


def number(name: str, default: int) -> int:
    """The whole number in the variable `name`; `default` where it is not set, or empty.

    Raises:
        LaunchError: it holds something else.
    """
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise LaunchError(f"the variable {name} is {text!r}, expected a whole number; unset it or use torchrun.")
    return int(text)


def is_main() -> bool:
    """True on the one process that speaks where all would say the same."""
    return announced_rank() == 0


def restarts_left() -> int:
    """How often torchrun would start the processes again, were one to end with a code other than 0."""
    return max(0, number("TORCHELASTIC_MAX_RESTARTS", 0) - number("TORCHELASTIC_RESTART_COUNT", 0))
