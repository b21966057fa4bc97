"""What `distunlearn plan` estimates time and cost for. Imports nothing heavy: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass

from distunlearn.errors import ConfigError

__all__ = ["Target"]


@dataclass(frozen=True)
class Target:
    """Which GPUs, how many, and what replaces the assumptions about them."""

    gpu: str = ""  # also estimate time, memory and cost on this GPU: a100, h100, h200 or l40s
    world: int = 0  # with --gpu: processes, one for each GPU; 0: one
    mfu: float = 0.0  # with --gpu: share of the GPU's data-sheet rate that training reaches; 0: an assumed one
    price: float = 0.0  # with --gpu: price of an hour of one GPU; 0: an assumed one

    def check(self) -> None:
        """Raises:
        ConfigError: numbers that cannot be, or that say nothing without a GPU.
        """
        for name in ("world", "mfu", "price"):
            value = getattr(self, name)
            if not 0 <= value < float("inf") or (name == "mfu" and value > 1):
                limit = "0 to 1" if name == "mfu" else "0 or more"
                raise ConfigError(f"--{name} is {value}, expected {limit}.")
            if value and not self.gpu:
                raise ConfigError(f"--{name} says nothing without a GPU to estimate for; add --gpu, such as h100.")
