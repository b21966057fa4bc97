"""What a launcher (torchrun, accelerate launch, srun) said of this process, before a process group exists."""

from __future__ import annotations

import os


def announced_rank() -> int:
    """RANK of this process; 0 without a launcher, or where RANK is not a number."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0


def is_main() -> bool:
    """True on the one process that speaks where all would say the same."""
    return announced_rank() == 0
