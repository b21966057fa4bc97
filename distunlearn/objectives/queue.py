"""The key queue of MoCo (He et al. 2020, "Momentum Contrast", section 3.2), with ids, so that it can forget.

A ring of past momentum keys. Unlike the paper's it starts empty, not random, and `purge` empties the
slots of given images: empty slots are masked out of every loss, never refilled with invented keys, and
are overwritten as the ring comes round. Every rank holds the same queue: push gathered keys only.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distunlearn.errors import ConfigError, NumericsError
from distunlearn.objectives.memory_bank import Bank

# Id of an empty slot. Whether a slot counts is decided by `valid` alone, so an image whose hash were this
# very number would still be handled correctly.
EMPTY_ID = torch.iinfo(torch.int64).min


class KeyQueue:
    """First-in first-out store of `size` keys.

    keys: [K, D] normalised (zeros where empty). ids: int64 [K] (EMPTY_ID where empty).
    valid: bool [K]. pointer: next slot to be written, in 0 .. K - 1.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        assert size > 0 and dim > 0, "a queue has a positive size and dimension"
        self.keys = torch.zeros(size, dim, device=device, dtype=dtype)
        self.ids = torch.full((size,), EMPTY_ID, device=device, dtype=torch.int64)
        self.valid = torch.zeros(size, device=device, dtype=torch.bool)
        self.pointer = 0

    @property
    def size(self) -> int:
        """Slots K, empty ones included."""
        return self.keys.shape[0]

    def push(self, keys: Tensor, ids: Tensor) -> None:
        """Write keys [m, D] and their ids [m] over the oldest slots, in order; of m > K only the last K stay.

        The keys must be those of all ranks (`Bank.gather`), or the ranks' queues drift apart.
        """
        assert keys.shape[1:] == self.keys.shape[1:] and ids.shape == keys.shape[:1], "keys [m, D] with one id each"
        count = keys.shape[0]
        slots = (self.pointer + torch.arange(count, device=self.ids.device)) % self.size
        kept = slice(max(0, count - self.size), None)
        slots = slots[kept]
        self.keys[slots] = keys[kept].detach().to(self.keys)
        self.ids[slots] = ids[kept].to(self.ids)
        self.valid[slots] = True
        self.pointer = (self.pointer + count) % self.size

    def purge(self, ids: Tensor) -> int:
        """Empty every slot whose image is among ids (int64 [m]); returns how many keys were removed."""
        gone = self.valid & torch.isin(self.ids, ids.to(self.ids))
        self.keys[gone] = 0
        self.ids[gone] = EMPTY_ID
        self.valid[gone] = False
        return int(gone.sum())

    def bank(self, temperature: float) -> Bank:
        """A snapshot as the bank of this step: copies, so that a later push does not disturb a pending backward."""
        return Bank(self.keys.clone(), self.ids.clone(), temperature, self.valid.clone())

    def to(self, device: torch.device | str) -> KeyQueue:
        """Move the tensors to a device, in place; returns self."""
        self.keys, self.ids, self.valid = self.keys.to(device), self.ids.to(device), self.valid.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of keys, ids, valid and pointer (int64, 0 dimensions): plain tensors that safetensors can store."""
        return {
            "keys": self.keys.clone(),
            "ids": self.ids.clone(),
            "valid": self.valid.clone(),
            "pointer": torch.tensor(self.pointer, dtype=torch.int64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a saved state; nothing is changed if it does not fit.

        Raises:
            ConfigError: a tensor is missing, or of another shape or type than this queue's.
            NumericsError: a key is not finite.
        """
        own = self.state_dict()
        for name, mine in own.items():
            found = state.get(name)
            if found is None or found.shape != mine.shape or found.is_floating_point() != mine.is_floating_point():
                what = "nothing" if found is None else f"{tuple(found.shape)} {found.dtype}"
                raise ConfigError(
                    f"the saved key queue has {what} as '{name}' where {tuple(mine.shape)} {mine.dtype} is expected; "
                    "set objective.queue_size and objective.output_dim as in the run that saved it"
                )
        pointer = int(state["pointer"])
        if not 0 <= pointer < self.size:
            raise ConfigError(
                f"the saved key queue points at slot {pointer} where 0 to {self.size - 1} is expected; "
                "load another checkpoint"
            )
        if not bool(torch.isfinite(state["keys"]).all()):
            raise NumericsError("the saved key queue holds keys that are not finite; load another checkpoint")
        self.keys.copy_(state["keys"])
        self.ids.copy_(state["ids"])
        self.valid.copy_(state["valid"])
        self.pointer = pointer
